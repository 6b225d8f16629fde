"""The time of COCO's evaluation: pycocotools, Detectron2's extension, and hotcoco, which is used.

    python benchmarks/bench_evaluation.py [--images 5000 --classes 80]

Drawn boxes and detections: about 7 objects and 70 detections per image, as a detector with a low
score threshold returns. Evaluation begins with the annotations indexed and the detections as a list
of records, and ends with the summary. All arrays are compared: they must be pycocotools' bit for
bit, and Detectron2's to 1e-12. The last row is all figures of ``retinanet-ext evaluate``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import argument_parser, measure, save
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.coco import evaluate_boxes
from retinanet_ext.evaluation.detector_report import evaluate_detections
from retinanet_ext.evaluation.threshold_choice import Criterion

ARRAYS = ("precision", "recall", "scores")


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    content, results = draw(args.images, args.classes)
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    evaluated: dict[str, COCOeval] = {}

    def run(name: str, evaluator: type[COCOeval] | None) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if evaluator is None:
                evaluated[name] = evaluate_boxes(truth, results)
                return
            evaluation = evaluator(truth, truth.loadRes(results), "bbox")
            evaluated[name] = evaluation
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()

    def report() -> None:
        evaluate_detections(BoxData.from_coco(content, results), Criterion())

    ways = {"pycocotools": COCOeval, "detectron2": COCOeval_opt, "retinanet_ext": None}
    calls: dict[str, Callable[[], object]] = {
        name: lambda name=name, way=way: run(name, way) for name, way in ways.items()
    }
    timings = measure(calls | {"all figures": report}, args.repeat, warmup=0)
    for name, tolerance in (("retinanet_ext", 0.0), ("detectron2", 1e-12)):
        for array in ARRAYS:
            ours, reference = (evaluated[n].eval[array] for n in (name, "pycocotools"))
            np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance)
    base = timings["pycocotools"].median
    rows: list[dict[str, Any]] = [
        {"way": name, "time": timing, "of pycocotools": round(timing.median / base, 4)}
        for name, timing in timings.items()
    ]
    print(f"{len(content['annotations'])} objects, {len(results)} detections")
    shown = [{**row, "time": str(row["time"])} for row in rows]
    print(tabulate(shown, {"way": "", "time": "ms", "of pycocotools": "of pycocotools"}))
    if args.save:
        print(save("evaluation", rows, args))


def draw(num_images: int, num_classes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return an instances json and results, of objects around which detections scatter."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.poisson(7.3)):
            box, category_id = _draw_box(rng), int(rng.integers(num_classes)) + 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
            for _ in range(rng.integers(0, 6)):
                near = box + rng.normal(0, 0.1, 4) * np.tile(box[2:], 2)
                results.append(_record(image_id, category_id, near, rng.beta(3, 2)))
        for _ in range(rng.integers(20, 80)):
            category_id = int(rng.integers(num_classes)) + 1
            results.append(_record(image_id, category_id, _draw_box(rng), rng.beta(1, 6)))
    return {
        "info": {},
        "images": [{"id": i + 1, "width": 640, "height": 480} for i in range(num_images)],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(num_classes)],
        "annotations": annotations,
    }, results


def _draw_box(rng: np.random.Generator) -> np.ndarray:
    size = np.exp(rng.normal(4, 0.9, 2)).clip(6, 400)
    return np.concatenate([rng.random(2) * ((640, 480) - size).clip(1), size])


def _record(image_id: int, category_id: int, box: np.ndarray, score: float) -> dict[str, Any]:
    box = np.array([*box[:2], *np.maximum(box[2:], 1)])
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box.tolist(),
        "score": float(score),
    }


if __name__ == "__main__":
    main()
