"""The commands that work on a trained run. As in :mod:`.cli`, each is a parser and a call."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from retinanet_ext.errors import InputError


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options and, as ``args.opts``, the config's KEY VALUE pairs after them."""
    from retinanet_ext.engine.config_load import split_arguments

    parser.epilog = "; ".join(filter(None, ["KEY VALUE: of the config, last", parser.epilog]))
    argv, opts = split_arguments(argv)
    args = parser.parse_intermixed_args(argv)
    args.opts = opts
    log_to_stderr("retinanet_ext", "detectron2.evaluation.evaluator")  # the second: progress
    return args


def log_to_stderr(*names: str) -> None:
    """Show what loggers say on stderr, because stdout is for the result."""
    from detectron2.utils.logger import setup_logger

    with contextlib.redirect_stdout(sys.stderr):
        for name in names:
            setup_logger(name=name)


def predict(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Detect objects in images and videos with a trained run, and write them."""
    from retinanet_ext.prediction import detection, job

    parser.epilog = "exit code 1: an image cannot be read"
    parser.usage = "%(prog)s [-h] RUN SOURCE [SOURCE ...] [options] [KEY VALUE ...]"
    add = parser.add_argument
    add("run", metavar="RUN", help="OUTPUT_DIR of a training")
    add("sources", nargs="+", metavar="SOURCE", help="image, video, folder, glob or .txt list")
    add("--output", type=Path, metavar="FOLDER", help="default: one of its own in RUN/predictions")
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
        add("--overlap", type=float, metavar="FRACTION", help="of tiles; default: 0.2"),
        add("--tta", action="store_true", help="detect in mirrored images, too"),
    ]
    args = _parse(parser, argv)
    if args.overlap is None:
        args.overlap = detection.DetectionOptions.overlap
    elif not args.tile:
        raise InputError("--overlap counts only with --tile")
    detection.keep_freed_memory()
    summary = job.predict(
        args.run,
        args.sources,
        job.DetectionOptions(**{o.dest: getattr(args, o.dest) for o in options}),
        out=args.output,
        format=args.format,
        draw=args.draw,
        crops=args.crops,
        opts=[*args.opts, *(["MODEL.WEIGHTS", args.weights] if args.weights else [])],
    )
    print(summary)
    if summary.unreadable:
        print(f"{parser.prog}: {summary.complaint}", file=sys.stderr)
    return int(bool(summary.unreadable))


def evaluate(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Show what a run, or any detector, finds and misses: curves, thresholds, errors, pictures."""
    from retinanet_ext.engine import run_evaluation
    from retinanet_ext.evaluation.thresholds import THRESHOLDS

    parser.usage = "%(prog)s [-h] RUN [options] [KEY VALUE ...] | --gt FILE --dt FILE [options]"
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
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: RUN/evaluation")
    args = _parse(parser, argv)
    criterion = args.save_thresholds or "f1"
    if args.run and not (args.gt or args.dt or args.images):
        reports = run_evaluation.evaluate_run(
            args.run,
            args.opts,
            criterion=criterion,
            save_thresholds=bool(args.save_thresholds),
            out=args.output,
        )
    elif args.gt and args.dt and not (args.run or args.save_thresholds or args.opts):
        out = args.output or Path("output/evaluation")
        reports = run_evaluation.evaluate_files(args.gt, args.dt, images=args.images, out=out)
    else:
        parser.error(
            "give the folder of a run, before the options, or --gt and --dt without "
            "--save-thresholds and KEY VALUE"
        )
    print(run_evaluation.summarize(reports))
    if args.save_thresholds:
        print(f"Wrote {Path(args.run) / THRESHOLDS}")
    return 0


def compare(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Compare two runs on the same test images: differences in AP and their intervals."""
    from retinanet_ext.engine import compare_runs

    parser.add_argument("runs", nargs="*", metavar="RUN", help="OUTPUT_DIR of two trainings: a, b")
    for side in ("a", "b"):
        what = "runs that differ in the seed, or detections of --gt in COCO's format"
        parser.add_argument(f"--{side}", nargs="+", metavar="RUN | JSON", default=[], help=what)
    parser.add_argument("--gt", metavar="JSON", help="annotations in COCO's format")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: a new one beside b's evaluation"
    )
    parser.usage = "%(prog)s [-h] RUN RUN | --a RUN ... --b RUN ... [options] [KEY VALUE ...]"
    args = _parse(parser, argv)
    a, b = (args.a, args.b) if args.a or args.b else (args.runs[:1], args.runs[1:])
    if not a or not b or (args.runs and args.runs != [*a, *b]) or len(args.runs) > 2:
        parser.error("give two runs, or those of --a and those of --b")
    if args.gt and (args.runs or args.opts):
        parser.error("--gt is given with files of detections, --a and --b, alone")
    how = {"num_resamples": args.resamples, "out": args.output}
    with contextlib.redirect_stdout(sys.stderr):  # what pycocotools prints
        if args.gt:
            text, folder = compare_runs.compare_files(args.gt, a, b, **how)
        else:
            text, folder = compare_runs.compare_runs(a, b, opts=args.opts, **how)
    print(text)
    print(f"\nWrote {folder}/comparison.html, .json and .txt")
    return 0


def export(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Write a run's detector as an ONNX, PT2 or TorchScript file, and compare it with the model."""
    from retinanet_ext.export.exporter import export_run

    parser.epilog = "exit code 1: the file differed from the model, and is gone"
    parser.add_argument("run", help="folder of a run, such as output/mine")
    formats = "onnx (default), pt2 or torchscript"
    parser.add_argument("--format", default="onnx", metavar="NAME", help=formats)
    forms = "what the program returns: raw, boxes or detections (default)"
    parser.add_argument("--form", default="detections", metavar="NAME", help=forms)
    where = "default: RUN/export/FORM.SUFFIX"
    parser.add_argument("--output", type=Path, metavar="FILE", help=where)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier file")
    cut = "lowest score; default: the run's thresholds, or its own"
    parser.add_argument("--score", type=float, help=cut)
    parser.add_argument("--thresholds", metavar="FILE", help="lowest score per class")
    parser.add_argument("--int8", action="store_true", help="quantize the network of an ONNX file")
    parser.add_argument(
        "--calibration-images", type=int, default=64, metavar="N", help="with --int8; default: 64"
    )
    args = _parse(parser, argv)
    exported = export_run(
        args.run,
        file_format=args.format,
        form=args.form,
        output=args.output,
        overwrite=args.overwrite,
        score=args.score,
        thresholds=args.thresholds,
        int8=args.int8,
        calibration_images=args.calibration_images,
        opts=args.opts,
    )
    print(exported)
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


def advise(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Recommend the loss for a config and its data, from what was measured on others."""
    from retinanet_ext.engine import load_config
    from retinanet_ext.experiments import advice

    parser.add_argument("--config-file", help="as for training; default: that of --run")
    parser.add_argument("--run", type=Path, help="a first training with SOLVER.LOSS_FILM_PERIOD")
    parser.add_argument(
        "--regret", action="store_true", help="show what the advice loses on what was measured"
    )
    args = _parse(parser, argv)
    config_file = args.config_file or (args.run and args.run / "config.yaml")
    if bool(config_file) == args.regret:
        parser.error("give --config-file or --run, or --regret alone")
    if args.regret:
        print(advice.describe_regret())
    else:
        print(advice.advise(load_config(config_file, args.opts), args.run))
    return 0


def export_weights(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Make a weights file that Detectron2's own RetinaNet loads, from a checkpoint of training."""
    from retinanet_ext.engine import checkpoint

    parser.add_argument("checkpoint", help="such as OUTPUT_DIR/model_final.pth")
    parser.add_argument("output", help="the .pth file to write; must not exist")
    args = parser.parse_args(argv)
    checkpoint.export_weights(args.checkpoint, args.output)
    print(f"Wrote {args.output}")
    return 0
