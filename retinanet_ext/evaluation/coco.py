"""COCO's box AP, also with more than 100 detections per image and with none at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

COCO_MAX_DETECTIONS = 100
"""Maximum number of detections per image and class that COCO's AP counts, by score."""

logger = logging.getLogger(__name__)


class BoxEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with two differences.

    If the detector may return more than 100 detections per image, AP counts as many; COCO's counts
    100. Without any detection, AP is 0 instead of NaN; NaN means that there are no objects.

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
        is_cocos = max_detections <= COCO_MAX_DETECTIONS
        # With another limit Detectron2 always uses pycocotools.
        super().__init__(
            dataset_name,
            output_dir=output_dir,
            max_dets_per_image=None if is_cocos else max_detections,
            use_fast_impl=is_cocos,
        )
        if not is_cocos:
            logger.info(
                "AP counts up to %d detections per image (TEST.DETECTIONS_PER_IMAGE), so it is not "
                "COCO's, which counts %d",
                max_detections,
                COCO_MAX_DETECTIONS,
            )

    def _derive_coco_results(
        self,
        coco_eval: COCOeval | None,
        iou_type: str,
        class_names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        if coco_eval is None:  # without detections Detectron2 evaluates nothing
            coco_eval = COCOeval(self._coco_api, COCO(), iou_type)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
        return super()._derive_coco_results(coco_eval, iou_type, class_names)
