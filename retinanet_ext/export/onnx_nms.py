"""Non-maximum suppression as one operator of ONNX, which takes batches and classes as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retinanet_ext.export.forms import suppress_by_class


@torch.library.custom_op("retinanet_ext::suppress_by_class", mutates_args=())
def onnx_suppress_by_class(
    boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou_thresh: float
) -> Tensor:
    """:func:`suppress_by_class` as one operator, so that the exporter can translate it."""
    return suppress_by_class(boxes, scores, classes, num_classes, iou_thresh)


@onnx_suppress_by_class.register_fake
def _(boxes: Tensor, scores: Tensor, classes: Tensor, num_classes: int, iou: float) -> Tensor:
    return torch.empty_like(scores)


def to_onnx(boxes: Any, scores: Any, classes: Any, num_classes: int, iou_thresh: float) -> Any:
    """Translate the operator to ``NonMaxSuppression``, whose scores are (N, K, C)."""
    import numpy as np
    from onnxscript import opset18 as op

    labels = op.Constant(value_ints=list(range(num_classes)))
    is_class = op.Equal(op.Unsqueeze(classes, [1]), op.Unsqueeze(labels, [0, 2]))
    per_class = op.Where(is_class, op.Unsqueeze(scores, [1]), op.Constant(value_float=0.0))
    every = op.Constant(value_int=np.iinfo(np.int64).max)
    iou, above = op.Constant(value_float=iou_thresh), op.Constant(value_float=0.0)
    kept = op.NonMaxSuppression(boxes, per_class, every, iou, above)  # (image, class, candidate)
    kept = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)
    nothing = op.Mul(scores, op.Constant(value_float=0.0))
    return op.ScatterND(nothing, kept, op.GatherND(scores, kept))


TRANSLATIONS = {torch.ops.retinanet_ext.suppress_by_class.default: to_onnx}
