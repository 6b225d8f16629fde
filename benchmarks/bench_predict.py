"""Images per second of `retinanet-ext predict`, beside a loop over Detectron2's DefaultPredictor.

    python benchmarks/bench_predict.py --run output/mine --images mine/images [--batch 8] [--save]

Both read the images from files and use the same config and weights. What a call starts with,
loading the weights, is left out; writing the log is not. Faster settings of the same run follow:
they are keys of the config, which the loop may set too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import argument_parser, hardware, measure, save
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from tabulate import tabulate

from retinanet_ext.engine import Predictor
from retinanet_ext.engine.run_folder import load_run
from retinanet_ext.prediction.detection import DetectionOptions, detect_files, keep_freed_memory
from retinanet_ext.prediction.detection_log import DetectionLog
from retinanet_ext.prediction.image_sources import SourceFile, find_files

BASELINE = "DefaultPredictor, one by one"
SETTINGS = {
    "predict": (),
    "predict, channels last": ("MODEL.CHANNELS_LAST", "True"),
    "predict, bfloat16": ("TEST.PRECISION", "bfloat16"),
}
"""Name of a way -> keys and values that it sets."""


def make_call(run: str, opts: tuple[str, ...], files: list[SourceFile], batch: int) -> Callable:
    """Return a call that detects the files as `retinanet-ext predict` does."""
    cfg = load_run(run, opts)
    predictor = Predictor(cfg, thresholds=None)
    kept = set(range(cfg.MODEL.RETINANET.NUM_CLASSES))

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            log = DetectionLog(Path(folder), {})
            detect_files(predictor, files, DetectionOptions(batch), log, kept=kept, iou_thresh=0.5)

    return call


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=5)
    parser.add_argument("--run", required=True, help="OUTPUT_DIR of a training")
    parser.add_argument("--images", nargs="+", required=True, help="as predict's SOURCE")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    files = find_files(args.images)
    one_by_one = DefaultPredictor(load_run(args.run, ["MODEL.DEVICE", args.device]))

    def loop() -> None:
        for file in files:
            one_by_one(read_image(file.path, format="BGR"))

    calls: dict[str, Callable] = {BASELINE: loop}
    for way in args.ways:
        opts = ("MODEL.DEVICE", args.device, *SETTINGS[way])
        calls[way] = make_call(args.run, opts, files, args.batch)
    times = measure(calls, args.repeat)
    rows = [
        {
            "name": name,
            "images_per_second": len(files) / time.median,
            "of_the_baseline": times[BASELINE].median / time.median,
            "time": time,
        }
        for name, time in times.items()
    ]
    print(f"{len(files)} images, {hardware(args.device)}, {args.threads} threads; medians")
    table = [[r["name"], *(f"{r[k]:.2f}" for k in [*r][1:3]), str(r["time"])] for r in rows]
    print(tabulate(table, ["", "images/s", "times", "ms"], disable_numparse=True))
    if args.save:
        args.images = len(files)
        del args.run, args.ways
        print(f"Wrote {save('predict', rows, args)}")


if __name__ == "__main__":
    main()
