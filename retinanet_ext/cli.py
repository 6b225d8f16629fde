"""The command line ``retinanet-ext COMMAND``: each command is a parser and a call.

A command imports what it needs when it runs, because ``retinanet-ext --help`` is then fast. Its
docstring is its help.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from retinanet_ext.errors import InputError

PROGRAM = "retinanet-ext"
ROOT = Path(__file__).resolve().parents[1]
"""The checkout: the folder of ``train_net.py`` and ``configs/``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 if an argument or a file cannot be used."""
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
    except InputError as error:
        from retinanet_ext.errors import explain

        code, line = explain(error)
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
        report.refuse_existing(args.output)
    if args.report:
        report.refuse_existing(args.report, "--report")
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


def compare(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Compare two runs on the same test images: differences in AP and their intervals."""
    from detectron2.utils.logger import setup_logger

    from retinanet_ext.engine import compare_runs

    parser.add_argument("runs", nargs="*", metavar="RUN", help="OUTPUT_DIR of two trainings: a, b")
    for side in ("a", "b"):
        what = "runs that differ in the seed, or detections of --gt in COCO's format"
        parser.add_argument(f"--{side}", nargs="+", metavar="RUN | JSON", default=[], help=what)
    parser.add_argument("--gt", metavar="JSON", help="annotations in COCO's format")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: evaluation/compare_... of run b"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="for all runs"
    )
    args = parser.parse_args(argv)
    a, b = (args.a, args.b) if args.a or args.b else (args.runs[:1], args.runs[1:])
    if not a or not b or (args.runs and args.runs != [*a, *b]) or len(args.runs) > 2:
        parser.error("give two runs, or those of --a and those of --b")
    if args.gt and (args.runs or args.opts):
        parser.error("--gt is given with files of detections, --a and --b, alone")
    how = {"num_resamples": args.resamples, "out": args.out}
    with contextlib.redirect_stdout(sys.stderr):  # what pycocotools prints, and the log
        setup_logger(name="retinanet_ext")
        if args.gt:
            text, folder = compare_runs.compare_files(args.gt, a, b, **how)
        else:
            text, folder = compare_runs.compare_runs(a, b, opts=args.opts, **how)
    print(text)
    print(f"\nWrote {folder}/comparison.html, .json and .txt")
    return 0


def analyze_loss(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Measure on which anchors a checkpoint's loss lies, at several gamma (figure 4)."""
    from detectron2.utils.logger import setup_logger

    from retinanet_ext.experiments import loss_analysis

    parser.add_argument("--config-file", required=True, help="as for training")
    parser.add_argument("--weights", required=True, help="such as OUTPUT_DIR/model_final.pth")
    parser.add_argument(
        "--dataset", choices=("train", "test"), default="test", help="of the config; default: test"
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="at most, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the images and the sample")
    parser.add_argument(
        "--output", metavar="FOLDER", help="default: loss_cdf-DATASET beside the weights"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values")
    args = parser.parse_args(argv)
    setup_logger(name="retinanet_ext")
    text = loss_analysis.analyze_loss(
        args.config_file,
        args.weights,
        args.opts,
        dataset=args.dataset,
        num_images=args.num_images,
        seed=args.seed,
        output=args.output,
    )
    print(text)
    return 0


def plot_losses(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Draw losses: figure 1, 5 or 6 of the paper, or registered losses of your choice."""
    from retinanet_ext.analysis.plots import draw_losses, save_figure

    parser.add_argument(
        "what",
        nargs="+",
        metavar="1 | 5 | 6 | LOSS",
        help="a figure, or losses such as cross_entropy focal:gamma=3 focal_star:gamma=4,beta=0",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/figures"),
        metavar="FILE | FOLDER",
        help="a .svg or .png file, or a folder for both; default: output/figures",
    )
    args = parser.parse_args(argv)
    name, figure = draw_losses(args.what)
    files = [args.output]
    if not args.output.suffix:
        files = [args.output / f"{name}{suffix}" for suffix in (".svg", ".png")]
    for path in files:
        save_figure(figure, path)
        print(f"Wrote {path}")
    return 0


def experiments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Run the paper's experiments: list the tables, run rows, report the results."""
    from retinanet_ext.experiments.presets import PRESETS, list_tables
    from retinanet_ext.experiments.report import write_reports

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

    campaign, runs = plan(
        args.preset,
        tables=args.table,
        rows=args.row,
        seeds=args.seeds,
        num_gpus=args.num_gpus,
        opts=args.opts,
        root=ROOT,
        output=args.output,
    )
    records = run_campaign(campaign, runs, root=ROOT)
    print(*write_report(campaign.folder), sep="\n")
    return int(len(records) < len(runs) or any(run.status == FAILED for run in records))


def evaluate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Show what a run, or any detector, finds and misses: curves, thresholds, errors, pictures."""
    from detectron2.utils.logger import setup_logger

    from retinanet_ext.engine import run_evaluation
    from retinanet_ext.evaluation.thresholds import THRESHOLDS

    parser.add_argument("run", nargs="?", help="OUTPUT_DIR of a training")
    parser.add_argument("--gt", type=Path, metavar="FILE", help="instead: COCO's instances json")
    parser.add_argument("--dt", type=Path, metavar="FILE", help="with it: COCO's results json")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of --gt, for pictures")
    parser.add_argument(
        "--save-thresholds",
        nargs="?",
        const="f1",
        metavar="f1 | precision=P | recall=R",
        help="write thresholds.json into the run, which its Predictor uses; default: f1",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/evaluation")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config values")
    args = parser.parse_intermixed_args(argv)
    criterion = args.save_thresholds or "f1"
    setup_logger(name="retinanet_ext")
    if args.run and not (args.gt or args.dt or args.images):
        reports = run_evaluation.evaluate_run(
            args.run,
            args.opts,
            criterion=criterion,
            save_thresholds=bool(args.save_thresholds),
            out=args.out,
        )
    elif args.gt and args.dt and not (args.run or args.save_thresholds):
        out = args.out or Path("output/evaluation")
        reports = run_evaluation.evaluate_files(args.gt, args.dt, images=args.images, out=out)
    else:
        parser.error("give the folder of a run, or --gt and --dt without --save-thresholds")
    print(run_evaluation.summarize(reports))
    if args.save_thresholds:
        print(f"Wrote {Path(args.run) / THRESHOLDS}")
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


def export_weights(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Make a weights file that Detectron2's own RetinaNet loads, from a checkpoint of training."""
    from retinanet_ext.engine import checkpoint

    parser.add_argument("checkpoint", help="such as OUTPUT_DIR/model_final.pth")
    parser.add_argument("output", help="the .pth file to write; must not exist")
    args = parser.parse_args(argv)
    checkpoint.export_weights(args.checkpoint, args.output)
    print(f"Wrote {args.output}")
    return 0


def predict(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Detect objects in images and videos with a trained run, and write them."""
    from detectron2.utils.logger import setup_logger

    from retinanet_ext.prediction import detection, job

    parser.epilog = "KEY VALUE: of the config. Exit code 1: an image cannot be read"
    parser.usage = "%(prog)s [-h] RUN SOURCE [SOURCE ...] [options] [KEY VALUE ...]"
    add = parser.add_argument
    add("run", metavar="RUN", help="OUTPUT_DIR of a training")
    add("sources", nargs="+", metavar="SOURCE", help="image, video, folder, glob or .txt list")
    add("--out", type=Path, metavar="FOLDER", help="default: one of its own in RUN/predictions")
    add("--format", choices=job.WRITERS, default="json", help="default: json")
    add("--draw", action="store_true", help="write images and videos with boxes, too")
    add("--crops", action="store_true", help="write each detection as an image, too")
    add("--weights", metavar="FILE", help="default: the best or last of the run")
    options = [
        add("--score", type=float, help="lowest score; default: the run's thresholds, or its own"),
        add("--thresholds", metavar="FILE", help="lowest score per class"),
        add("--classes", nargs="+", default=(), metavar="NAME", help="default: all"),
        add("--batch", type=int, default=8, metavar="N", help="images at a time; default: 8"),
        add("--tile", type=int, default=0, metavar="PIXELS", help="detect in tiles, too"),
        add("--overlap", type=float, default=0.2, help="of tiles, a fraction; default: 0.2"),
        add("--tta", action="store_true", help="detect in flipped and larger images, too"),
    ]
    argv, opts = job.split_arguments(argv)
    args = parser.parse_intermixed_args(argv)
    setup_logger(name="retinanet_ext")
    detection.keep_freed_memory()
    summary = job.predict(
        args.run,
        args.sources,
        job.DetectionOptions(**{o.dest: getattr(args, o.dest) for o in options}),
        out=args.out,
        format=args.format,
        draw=args.draw,
        crops=args.crops,
        opts=[*opts, *(["MODEL.WEIGHTS", args.weights] if args.weights else [])],
    )
    print(summary)
    if summary.unreadable:
        print(f"{parser.prog}: {summary.complaint}", file=sys.stderr)
    return int(bool(summary.unreadable))


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
    "predict": predict,
    "check-data": check_data,
    "compare": compare,
    "evaluate": evaluate,
    "analyze-loss": analyze_loss,
    "plot-losses": plot_losses,
    "experiments": experiments,
    "replay": replay,
    "export-weights": export_weights,
    "doctor": doctor,
}
