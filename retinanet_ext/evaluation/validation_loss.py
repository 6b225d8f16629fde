"""The training losses on a test set."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from retinanet_ext.modeling import RetinaNetExt

logger = logging.getLogger(__name__)


class ValidationLoss(DatasetEvaluator):
    """Losses of the whole test set as one batch, in float32 and with the norms in eval mode.

    Each image goes through the network alone, so that the loss depends neither on padding nor on
    the number of processes. The normaliser divides by the counts of the test set itself, and its
    moving average is left as it is. The images must come with their ``instances``, as from
    ``Trainer.build_test_loader`` with ``TEST.LOSS``; others are left out.
    """

    def __init__(self, model: RetinaNetExt) -> None:
        self._model = model

    def reset(self) -> None:
        self._sums: Counter[str] = Counter()
        self._divisor = 0.0
        self._num_boxes = 0

    def process(self, inputs: list[dict[str, Any]], outputs: Any) -> None:
        """Add the losses of a batch, whose detections are not used."""
        for image in inputs:
            if "instances" in image:
                losses, divisor = self._undivided_losses(image)
                self._sums.update(losses)
                self._divisor += divisor
                self._num_boxes += len(image["instances"])

    def _undivided_losses(self, image: dict[str, Any]) -> tuple[dict[str, float], float]:
        """Return the summed losses of an image, and its part of the divisor."""
        model, criterion = self._model, self._model.criterion
        mode, criterion.deferred_counts = model.training, []
        # Of the detector alone: ``forward`` then returns losses, and the norms stay as they are.
        model.training = True
        try:
            with EventStorage():  # takes the counts that are logged in training
                # Not ``model(...)``, whose time is taken as that of inference.
                losses = model.forward([image])
            counts = criterion.deferred_counts
        finally:
            model.training, criterion.deferred_counts = mode, None
        # Without a count it is the normaliser "foreground", which divides per image.
        divisor = float(sum(counts)) if counts else 1.0
        return {name: loss.item() for name, loss in losses.items()}, divisor

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return ``{"validation": {"loss_cls": ..., "loss_box_reg": ..., "total_loss": ...}}``.

        It is empty if no image has a ground-truth box.
        """
        parts = comm.all_gather((self._sums, self._divisor, self._num_boxes))
        if not sum(num_boxes for _, _, num_boxes in parts):
            logger.warning("TEST.LOSS: the test images have no boxes, so they have no loss")
            return {}
        divisor = max(1.0, sum(part for _, part, _ in parts))
        names = dict.fromkeys(name for sums, _, _ in parts for name in sums)
        losses = {name: sum(sums[name] for sums, _, _ in parts) / divisor for name in names}
        return {"validation": {**losses, "total_loss": sum(losses.values())}}
