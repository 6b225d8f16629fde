"""The command line ``retinanet-ext COMMAND``: each command is a parser and a call.

A command imports what it needs when it runs, because ``retinanet-ext --help`` is then fast. Its
docstring is its help.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet_ext import run_commands
from retinanet_ext.errors import InputError, UnexpectedResultsError, explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM = "retinanet-ext"
ROOT = Path(__file__).resolve().parents[1]
"""The checkout: the folder of ``train_net.py`` and ``configs/``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 if an argument or a file cannot be used.

    Raises:
        Exception: one that :func:`~retinanet_ext.errors.explain` does not know
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="What is done before and after a training; train_net.py trains and evaluates.",
        epilog=f"{PROGRAM} COMMAND --help lists the options of a command.",
    )
    commands = parser.add_subparsers(
        title="commands", dest="name", metavar="COMMAND", required=True
    )
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, add_help=False)
    name = parser.parse_args(argv[:1]).name
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=command.__doc__)
    try:
        return command(parser, argv[1:])
    except (InputError, OSError, UnexpectedResultsError) as error:
        end = explain(error)
        if end is None:
            raise
        code, line = end
        print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print(f"{parser.prog}: cut off", file=sys.stderr)
        return 130


def check_data(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Check the data of a config before training: what is wrong, what the anchors cover."""
    from retinanet_ext.data import validation_report as report
    from retinanet_ext.engine import load_config
    from retinanet_ext.evaluation.data_page import write_data_page

    parser.epilog = "exit code 1: training would refuse the data"
    parser.add_argument("--config-file", required=True, help="as for training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all of it as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page")
    parser.add_argument(
        "--search-anchors", action="store_true", help="look for anchors that cover more boxes"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values")
    args = parser.parse_args(argv)
    if args.output:
        report.prepare_output(args.output)
    if args.report:
        report.prepare_output(args.report, "--report")
    cfg = load_config(args.config_file, args.opts)
    result = report.check_data(cfg, search_anchors=args.search_anchors)
    print(result.text)
    if args.output:
        result.write(args.output)
        print(f"\nWrote {args.output}")
    if args.report:
        write_data_page(result, args.report)
        print(f"\nWrote {args.report}")
    return result.exit_code


def plot_losses(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Draw losses: figure 1, 5 or 6 of the paper, registered losses, or the films of runs."""
    from retinanet_ext.analysis.plots import draw_losses, save_figure

    parser.add_argument(
        "what",
        nargs="*",
        metavar="1 | 5 | 6 | LOSS",
        help="a figure, or losses such as cross_entropy focal:gamma=3 focal_star:gamma=4,beta=0",
    )
    parser.add_argument(
        "--film",
        nargs="+",
        metavar="RUN",
        help="instead: OUTPUT_DIR of trainings with SOLVER.LOSS_FILM_PERIOD",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/figures"),
        metavar="FILE | FOLDER",
        help="a .svg or .png file, or a folder for both; default: output/figures",
    )
    args = parser.parse_args(argv)
    if bool(args.what) == bool(args.film):
        parser.error("give a figure or losses, or the runs of --film")
    name, figure = _draw_films(args.film) if args.film else draw_losses(args.what)
    files = [args.output]
    if not args.output.suffix:
        files = [args.output / f"{name}{suffix}" for suffix in (".svg", ".png")]
    for path in files:
        save_figure(figure, path)
        print(f"Wrote {path}")
    return 0


def _draw_films(folders: Sequence[str]) -> tuple[str, Figure]:
    """Print what the films of runs say, and return the name and the figure of them."""
    from retinanet_ext.analysis.film_figure import film_figure
    from retinanet_ext.experiments.film_report import describe_films, read_films

    films = read_films(folders)
    print(describe_films(folders, films))
    return "film", film_figure(films)


def experiments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Run the paper's experiments: list the tables, run rows, report the results."""
    from retinanet_ext.experiments.presets import PRESETS, list_tables
    from retinanet_ext.experiments.report import write_reports

    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show the tables, or the rows of one")
    listing.add_argument("--table", action="append", default=[], metavar="NAME")
    run = commands.add_parser("run", help="run rows that are not finished yet", allow_abbrev=False)
    run.add_argument(
        "--table",
        action="append",
        default=[],
        metavar="NAME",
        help="default: all that need no weights",
    )
    run.add_argument("--row", action="append", default=[], metavar="NAME", help="default: all")
    presets = "; ".join(f"{preset.name}: {preset.what}" for preset in PRESETS.values())
    run.add_argument("--preset", required=True, metavar="NAME", help=presets)
    run.add_argument("--seeds", type=int, metavar="N", help="default: the preset's")
    run.add_argument("--first-seed", type=int, default=1, metavar="N", help="default: 1")
    run.add_argument("--num-gpus", type=int, default=1, metavar="N", help="of each row")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time")
    run.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="for all rows")
    report = commands.add_parser("report", help="write the reports anew")
    for command in (run, report):
        command.add_argument(
            "--output", type=Path, default=Path("output/experiments"), metavar="FOLDER"
        )
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            return _run_rows(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: cut off; the same command goes on from here", file=sys.stderr)
        return 130
    if args.command == "list":
        print(list_tables(args.table))
    else:
        for path in write_reports(args.output):
            print(path)
    return 0


def _run_rows(args: argparse.Namespace) -> int:
    """Run the rows and write their report; 1 if a row failed or could not be run."""
    from retinanet_ext.experiments.plan import plan
    from retinanet_ext.experiments.record import FAILED
    from retinanet_ext.experiments.report import write_report
    from retinanet_ext.experiments.runner import run_campaign

    run_commands.log_to_stderr("retinanet_ext")
    campaign, runs = plan(
        args.preset,
        tables=args.table,
        rows=args.row,
        seeds=args.seeds,
        first_seed=args.first_seed,
        num_gpus=args.num_gpus,
        opts=args.opts,
        root=ROOT,
        output=args.output,
    )
    records = run_campaign(campaign, runs, root=ROOT, jobs=args.jobs)
    print(*write_report(campaign.folder), sep="\n")
    return int(len(records) < len(runs) or any(run.status == FAILED for run in records))


def sample_set(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Draw the sample set at a point of the imbalance dial, as COCO json and images."""
    from retinanet_ext.data.dial import IMBALANCE_DIAL
    from retinanet_ext.data.sample_set import SampleSet, export_sample_set

    parser.epilog = "docs/dial.md says how another detector is put on the dial"
    parser.add_argument("folder", type=Path, help="a new folder: {train,val}.json, train/, val/")
    ratio = "foreground to background anchors; default: 1:100"
    parser.add_argument("--ratio", choices=IMBALANCE_DIAL, default="1:100", help=ratio)
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--num-train", **number, help="images; default: as table dial")
    parser.add_argument("--num-val", **number, help="images; default: as table dial")
    parser.add_argument("--seed", **number, default=0, help="other pictures of the same kind")
    args = parser.parse_args(argv)
    keys = SampleSet.config_defaults() | IMBALANCE_DIAL[args.ratio] | {"SEED": args.seed}
    numbers = {"NUM_TRAIN": args.num_train, "NUM_VAL": args.num_val}
    keys |= {key: value for key, value in numbers.items() if value is not None}
    export_sample_set(SampleSet.from_config(keys), args.folder)
    print(f"Wrote {args.folder}: {keys['NUM_TRAIN']} + {keys['NUM_VAL']} images")
    return 0


def replay(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Repeat a training step that was not finite, from the file that training saved of it."""
    from detectron2.utils.logger import setup_logger

    from retinanet_ext.engine.replay import replay_step

    parser.epilog = "exit code 0: not finite again, 1: finite this time, 2: no such step"
    parser.add_argument("file", help="such as OUTPUT_DIR/non_finite/iter_0000041_rank0.pth")
    args = parser.parse_args(argv)
    setup_logger(name="retinanet_ext")
    report = replay_step(args.file)
    print(json.dumps(report, indent=2, allow_nan=False))
    if report["reproduced"]:
        print(f"reproduced: {report['cause']}")
        return 0
    print("not reproduced: loss and gradient are finite this time", file=sys.stderr)
    return 1


def doctor(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Check the environment: packages, card, disk and load, a line each with the remedy."""
    from retinanet_ext.doctor import PROBLEM, describe, diagnose

    parser.epilog = "exit code 1: there is a problem; warnings do not stop a training"
    parser.add_argument(
        "--output", type=Path, default=Path("output"), metavar="FOLDER", help="of the runs"
    )
    args = parser.parse_args(argv)
    lines = diagnose(args.output)
    print(describe(lines))
    return int(any(line.status == PROBLEM for line in lines))


COMMANDS: dict[str, Callable[[argparse.ArgumentParser, Sequence[str]], int]] = {
    "check-data": check_data,
    "evaluate": run_commands.evaluate,
    "predict": run_commands.predict,
    "compare": run_commands.compare,
    "export": run_commands.export,
    "export-weights": run_commands.export_weights,
    "advise": run_commands.advise,
    "analyze-loss": run_commands.analyze_loss,
    "plot-losses": plot_losses,
    "experiments": experiments,
    "sample-set": sample_set,
    "replay": replay,
    "doctor": doctor,
}
