"""Drawn ground truth and detections, with what makes an evaluation hard."""

from copy import deepcopy

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CATEGORY_IDS = (9, 2, 5, 11)


def draw_boxes(seed, *, num_images=12, crowd=True, ties=True, max_detections=60):
    """Return an instances json and results: overlaps, crowd regions, equal scores, empty images."""
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(np.arange(3, 3 + 7 * num_images, 7)).tolist()
    annotations, results = [], []
    for image_id in image_ids:
        own = []
        for _ in range(rng.integers(0, 15)):
            box = rng.integers(0, 20, 4) * 10.0
            box[2:] += 10 * rng.integers(0, 5, 2) + 5
            own.append(
                {
                    "id": len(annotations) + len(own) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORY_IDS)),
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3] * rng.choice([1, 0.7])),
                    "iscrowd": int(crowd and rng.random() < 0.15),
                }
            )
        annotations += own
        for _ in range(rng.integers(0, max_detections)):
            category_id, box = int(rng.choice(CATEGORY_IDS)), rng.integers(0, 20, 4) * 10.0 + 5
            if own and rng.random() < 0.6:
                near = own[rng.integers(len(own))]
                box = np.array(near["bbox"]) + rng.integers(-2, 3, 4) * (5 if ties else 1.3)
                box[2:] = np.maximum(box[2:], 1)
                category_id = near["category_id"] if rng.random() < 0.8 else category_id
            score = float(np.round(rng.random(), 2) if ties else rng.random())
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "score": score,
                }
            )
    content = {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 300, "height": 300} for i in image_ids
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORY_IDS],
        "annotations": annotations,
    }
    return content, [results[i] for i in rng.permutation(len(results))]


def pycocotools_evaluation(content, results, max_detections=100):
    """Return pycocotools' evaluation, accumulated."""
    truth = COCO()
    truth.dataset = deepcopy(content)
    truth.createIndex()
    found = truth.loadRes(deepcopy(results)) if results else COCO()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.params.maxDets = [1, 2, max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation
