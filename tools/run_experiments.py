#!/usr/bin/env python3
"""Run the paper's experiments: list the tables, run rows, report the results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retinanet_ext.errors import InputError
from retinanet_ext.experiments import runner
from retinanet_ext.experiments.presets import PRESETS, list_tables
from retinanet_ext.experiments.record import FAILED
from retinanet_ext.experiments.report import write_report, write_reports

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the command line; 1 if a row failed or could not be run."""
    args = parse_arguments()
    try:
        if args.command == "list":
            print(list_tables(args.table))
            return 0
        if args.command == "report":
            for path in write_reports(args.output):
                print(path)
            return 0
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
        records = runner.run_campaign(campaign, runs, root=ROOT)
        print(*write_report(campaign.folder), sep="\n")
        return int(len(records) < len(runs) or any(one.status == FAILED for one in records))
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
    run.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="for all rows")

    report = commands.add_parser("report", help="write the reports anew")
    for command in (run, report):
        command.add_argument(
            "--output", type=Path, default=Path("output/experiments"), metavar="FOLDER"
        )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
