"""Exported files in their own runtimes, beside the model itself: differences and time per image.

    python benchmarks/bench_export.py --run output/mine [--threads 1] [--int8] [--save]

Each form in each format, on a test image of the run, landscape and portrait, one and two at a time.
"model" is ``model(inputs)`` in eager mode, up to the detections. The largest differences are of
scores (``raw``: logits and deltas) and of corners in pixels. With ``--int8`` the quantized file is
measured too, with the AP before and after.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import argument_parser, hardware, measure, save
from detectron2.config import CfgNode
from tabulate import tabulate

from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_folder import load_run, register_test_data
from retinanet_ext.export.exporter import export_run, test_images
from retinanet_ext.export.formats import FORMATS, Run
from retinanet_ext.export.forms import FORMS
from retinanet_ext.export.onnx_predictor import open_session
from retinanet_ext.export.verification import make_cases, verify

SHAPES = ("landscape", "portrait", "landscape twice", "portrait and plain")


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=7)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run with its data")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--int8", action="store_true", help="measure the quantized file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = load_run(args.run, ["MODEL.DEVICE", "cpu"])
    register_test_data(cfg)
    predictor = Predictor(cfg)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for file_format in args.formats:
            for form in args.forms:
                path = Path(folder, f"{form}{FORMATS[file_format].suffix}")
                rows += bench_file(args, cfg, predictor, path, file_format=file_format, form=form)
        if args.int8:
            rows += bench_file(args, cfg, predictor, Path(folder, "int8.onnx"), int8=True)
    print(f"{args.run}: {hardware()}, {args.threads} threads; ms per image, medians (quartiles)")
    print(tabulate([row.values() for row in rows], rows[0].keys(), disable_numparse=True))
    if args.save:
        args.run = args.run.name
        print(save("export", rows, args))


def bench_file(
    args: argparse.Namespace, cfg: CfgNode, predictor: Predictor, path: Path, **options: Any
) -> list[dict[str, Any]]:
    """Export one file, and return a row per shape of the batch."""
    exported = export_run(args.run, output=path, **options)
    metadata, model = exported.metadata, predictor.model
    file_format = "onnx int8" if "int8" in options else options["file_format"]
    run = load(path, args.threads)
    cases = make_cases(test_images(cfg, predictor), model, metadata.thresholds, metadata.min_side)
    rows = []
    for case in (case for case in cases if case.name in SHAPES):
        inputs = [{"image": image} for image in torch.from_numpy(case.images)]
        calls: dict[str, Callable[[], object]] = {
            "model": lambda inputs=inputs: model(inputs),
            "file": lambda case=case: run(case.images),
        }
        with torch.no_grad():
            times = measure(calls, args.repeat)
        number, _, height, width = case.images.shape
        compared = None
        if "int8" not in options:
            (compared,) = verify(run, model, metadata.form, metadata.thresholds, [case])
        rows.append(
            {
                "format": file_format,
                "form": metadata.form,
                "size": f"{height} x {width}",
                "batch": number,
                "largest difference": f"{compared.values:.1e}" if compared else "AP below",
                "pixels": f"{compared.pixels:.1e}" if compared else "",
                "ms per image, model": f"{1e3 * times['model'].median / number:.4g}",
                "ms per image, file": f"{1e3 * times['file'].median / number:.4g}",
                "model / file": times["model"].median / times["file"].median,
                "AP float32, int8": ap(exported),
            }
        )
    return rows


def ap(exported: Any) -> str | None:
    """Return the AP before and after quantization."""
    found = exported.quantization
    return found and f"{found.ap_float32:.2f}, {found.ap_int8:.2f}"


def load(path: Path, threads: int) -> Run:
    """Return a file's program, with that many threads."""
    if path.suffix != FORMATS["onnx"].suffix:
        (file_format,) = [each for each in FORMATS.values() if each.suffix == path.suffix]
        return file_format.load(path)
    session = open_session(path, threads)
    return lambda images: session.run(None, {"images": images})


if __name__ == "__main__":
    main()
