#!/usr/bin/env python3
"""Run the paper's experiments: list the tables, run rows, report the results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retinanet_ext.errors import InputError
from retinanet_ext.experiments import runner
from retinanet_ext.experiments.presets import PRESETS
from retinanet_ext.experiments.record import FAILED

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the command line."""
    args = parse_arguments()
    try:
        return {"list": list_tables, "run": run_rows, "report": write_reports}[args.command](args)
    except InputError as error:
        print(f"run_experiments.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run_experiments.py: cut off; the same command goes on from here", file=sys.stderr)
        return 130


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show the tables, or the rows of one")
    listing.add_argument("--table", action="append", default=[], metavar="NAME")

    run = commands.add_parser("run", help="run rows that are not finished yet", allow_abbrev=False)
    run.add_argument("--table", action="append", default=[], metavar="NAME", help="default: all")
    run.add_argument("--row", action="append", default=[], metavar="NAME", help="default: all")
    presets = "; ".join(f"{preset.name}: {preset.what}" for preset in PRESETS.values())
    run.add_argument("--preset", required=True, metavar="NAME", help=presets)
    run.add_argument("--seeds", type=int, metavar="N", help="default: the preset's")
    run.add_argument("--num-gpus", type=int, default=1, metavar="N", help="of each row")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time")
    run.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="for all rows")

    report = commands.add_parser("report", help="write the pages anew")
    for command in (run, report):
        command.add_argument(
            "--output", type=Path, default=Path("output/experiments"), metavar="FOLDER"
        )
    return parser.parse_args()


def list_tables(args: argparse.Namespace) -> int:
    """Show the tables, or the rows of some."""
    print(runner.describe(args.table))
    return 0


def run_rows(args: argparse.Namespace) -> int:
    """Run rows, then write the report; 1 if one failed."""
    campaign, runs = runner.plan(
        args.preset,
        tables=args.table,
        rows=args.row,
        seeds=args.seeds,
        num_gpus=args.num_gpus,
        opts=args.opts,
        root=ROOT,
        output=args.output,
    )
    records = runner.run(campaign, runs, root=ROOT, jobs=args.jobs)
    report(campaign.folder)
    return int(any(one.status == FAILED for one in records))


def write_reports(args: argparse.Namespace) -> int:
    """Write the report of each campaign below --output."""
    campaigns = sorted(path.parent for path in args.output.glob(f"*/{runner.CAMPAIGN}"))
    if not campaigns:
        raise InputError(f"{args.output} holds no experiments; --output names their folder")
    code = 0
    for campaign in campaigns:
        try:
            report(campaign)
        except InputError as error:
            code = 2
            print(f"run_experiments.py: error: {error}", file=sys.stderr)
    return code


def report(campaign: Path) -> None:
    """Write a campaign's report and say where."""
    from retinanet_ext.experiments.report import write_report

    for path in write_report(campaign):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
