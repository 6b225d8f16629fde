"""COCO's box AP, also with more than 100 detections per image and with none at all."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.box_data import BoxData
from retinanet_ext.evaluation.detection_metrics import COCO_MAX_DETECTIONS, precision_recall
from retinanet_ext.evaluation.outputs import DETECTIONS

logger = logging.getLogger(__name__)


class BoxEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with three differences.

    If the detector may return more than 100 detections per image, AP counts as many; COCO's counts
    100. Without any detection, AP is 0 instead of NaN; NaN means that there are no objects. AP has
    the digits of pycocotools, in a fraction of its time and without Detectron2's extension.

    Example:
        >>> from detectron2.data import MetadataCatalog
        >>> file = "tests/fixtures/bccd_mini/instances_train_raw.json"
        >>> _ = MetadataCatalog.get("bccd_mini").set(json_file=file)
        >>> evaluator = BoxEvaluator("bccd_mini", max_detections=300, output_dir="output/mini")
    """

    def __init__(self, dataset_name: str, *, max_detections: int, output_dir: str) -> None:
        """
        Args:
            dataset_name: name in Detectron2's catalogs
            max_detections: ``TEST.DETECTIONS_PER_IMAGE``; up to 100 the AP is COCO's
            output_dir: folder that the detections are written to
        """
        # Detectron2's own fast implementation is not used.
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False)
        self._max_detections = max(max_detections, COCO_MAX_DETECTIONS)
        if max_detections > COCO_MAX_DETECTIONS:
            logger.info(
                "AP counts up to %d detections per image (TEST.DETECTIONS_PER_IMAGE), so it is not "
                "COCO's, which counts %d",
                max_detections,
                COCO_MAX_DETECTIONS,
            )

    def _eval_predictions(
        self, predictions: Sequence[Mapping[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        """Write the detections, and evaluate those of all images or of ``img_ids``."""
        results = list(itertools.chain(*(image["instances"] for image in predictions)))
        class_ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if class_ids is not None:
            category_ids = {label: category_id for category_id, label in class_ids.items()}
            for result in results:
                result["category_id"] = category_ids[result["category_id"]]
        if self._output_dir:
            Path(self._output_dir, DETECTIONS).write_text(json.dumps(results))
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        evaluated = evaluate_boxes(self._coco_api, results, self._max_detections, img_ids)
        names = self._metadata.get("thing_classes")
        self._results["bbox"] = self._derive_coco_results(evaluated, "bbox", class_names=names)


def evaluate_boxes(
    truth: COCO,
    results: list[dict[str, Any]],
    max_detections: int = COCO_MAX_DETECTIONS,
    image_ids: Sequence[int] | None = None,
) -> COCOeval:
    """Return pycocotools' evaluation of boxes, with its ``eval`` and ``stats``.

    The arrays are computed by hotcoco. pycocotools computes them where the two may differ or
    hotcoco needs what is not there: for some of the images, numbers that are not finite, annotation
    ids that are not different positive integers, annotations without ``area``, and annotations with
    ``ignore`` but not ``iscrowd``, which pycocotools counts as objects.

    Args:
        truth: the ground truth
        results: the detections in COCO's results format; there may be none
        max_detections: per image and class
        image_ids: images to evaluate, by default all
    """
    evaluated = COCOevalMaxDets(truth, COCO(), "bbox")
    evaluated.params.maxDets = [1, 10, max_detections]
    data = _plain_data(truth, results) if image_ids is None else None
    if data is not None:
        # Each key as from ``accumulate``.
        arrays = precision_recall(data, evaluated.params.maxDets)
        evaluated.eval = vars(arrays) | {"params": evaluated.params}
    else:
        if results:
            evaluated.cocoDt = truth.loadRes(results)
        if image_ids is not None:
            evaluated.params.imgIds = list(image_ids)
        evaluated.evaluate()
        evaluated.accumulate()
    evaluated.summarize()
    return evaluated


def _plain_data(truth: COCO, results: Sequence[Mapping[str, Any]]) -> BoxData | None:
    annotations = truth.dataset["annotations"]
    ids = {a["id"] if isinstance(a.get("id"), int) else 0 for a in annotations}
    if len(ids) < len(annotations) or min(ids, default=1) < 1:
        return None
    if any("area" not in a or (a.get("ignore") and not a.get("iscrowd")) for a in annotations):
        return None
    try:
        return BoxData.from_coco(truth.dataset, results)
    except InputError:
        return None
