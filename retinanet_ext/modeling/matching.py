"""Labels of anchors by IoU with the ground truth (section 4).

Shapes: N images, R anchors over all levels, K classes, M boxes of all images together. Boxes:
XYXY in input pixels. Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from retinanet_ext.errors import InputError

LOW_QUALITY_MATCHES = ("all", "ignored_band", "none")


class AnchorMatcher(Matcher):
    """Detectron2's matcher with a policy for the boxes that no anchor reaches.

    ``all`` and ``none`` are Detectron2's ``allow_low_quality_matches``; ``ignored_band`` is the
    authors' code, in which a box's best anchor becomes foreground only where it would otherwise
    be ignored. Unlike Detectron2's, a box that overlaps no anchor at all matches none, instead
    of every anchor it does not overlap.
    """

    def __init__(
        self, thresholds: list[float], labels: list[int], low_quality_matches: str = "all"
    ) -> None:
        """
        Args:
            thresholds: IoU limits in rising order, the paper's [0.4, 0.5]
            labels: 0 background, -1 ignore, 1 foreground; one more than thresholds
            low_quality_matches: one of :data:`LOW_QUALITY_MATCHES`
        """
        if low_quality_matches not in LOW_QUALITY_MATCHES:
            raise InputError(
                f"MODEL.RETINANET.LOW_QUALITY_MATCHES must be one of {LOW_QUALITY_MATCHES}, "
                f"got {low_quality_matches!r}"
            )
        rising = all(0 < t <= 1 for t in thresholds) and sorted(thresholds) == list(thresholds)
        if not rising or len(labels) != len(thresholds) + 1 or not set(labels) <= {-1, 0, 1}:
            raise InputError(
                "MODEL.RETINANET.IOU_THRESHOLDS must rise within (0, 1] and IOU_LABELS give a -1, "
                f"0 or 1 to each interval between them, got {thresholds} and {labels}"
            )
        super().__init__(list(thresholds), labels, low_quality_matches != "none")
        self.low_quality_matches = low_quality_matches

    def set_low_quality_matches_(self, match_labels: Tensor, match_quality_matrix: Tensor) -> None:
        background = match_labels == 0
        reached = match_quality_matrix.amax(dim=1) > 0
        super().set_low_quality_matches_(match_labels, match_quality_matrix[reached])
        if self.low_quality_matches == "ignored_band":
            match_labels[background] = 0


def is_foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Return the mask of labels that are a class."""
    return (labels >= 0) & (labels < num_classes)


@torch.no_grad()
def label_anchors(
    matcher: AnchorMatcher, anchors: Boxes, gt_instances: list[Instances], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Label every anchor of every image.

    Args:
        matcher: IoU to label
        anchors: the R anchors of all levels
        gt_instances: ``gt_boxes`` and ``gt_classes`` of each image; images without boxes are fine
        num_classes: K

    Returns:
        labels, (N, R) int64, and the box each anchor matches best as an index into the boxes of
        all images concatenated, (N, R) int64 (of no meaning where the anchor is background)
    """
    labels, matches = [], []
    first = 0
    for instances in gt_instances:
        match, match_labels = matcher(pairwise_iou(instances.gt_boxes, anchors))
        if len(instances):
            label = instances.gt_classes[match]
            label[match_labels == 0] = num_classes
            label[match_labels == -1] = -1
        else:
            label = torch.full_like(match, num_classes)
        labels.append(label)
        matches.append(match + first)
        first += len(instances)
    return torch.stack(labels), torch.stack(matches)


def check_targets(batched_inputs: list[dict], num_classes: int) -> None:
    """Refuse boxes and classes that would make the loss infinite, NaN or silently wrong.

    Args:
        batched_inputs: a batch as Detectron2's ``DatasetMapper`` makes it
        num_classes: K

    Raises:
        InputError: names the image, the box and what is wrong with it
    """
    for inputs in batched_inputs:
        instances = inputs["instances"]
        boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
        degenerate = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
        unknown = ~is_foreground(classes, num_classes)
        if not (degenerate | unknown).any():
            continue
        index = int((degenerate | unknown).nonzero()[0])
        name = inputs.get("file_name", inputs.get("image_id", "(no file_name)"))
        where = f"image {name}: box {index}, {boxes[index].tolist()} (XYXY, pixels)"
        if degenerate[index]:
            raise InputError(f"{where}, has no area or is not finite")
        raise InputError(
            f"{where}, has class {int(classes[index])}; "
            f"MODEL.RETINANET.NUM_CLASSES allows 0 to {num_classes - 1}"
        )
