"""The two training losses, from labels and predictions (sections 3 and 4.1).

Shapes: N images, R anchors over all levels, A anchors per cell, K classes, M boxes, F pairs of an
anchor and its box. Boxes: XYXY in input pixels. Labels: -1 ignore, 0..K-1 class, K background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn
from torchvision.ops import complete_box_iou, distance_box_iou, generalized_box_iou

from retinanet_ext.errors import InputError
from retinanet_ext.losses import Interval
from retinanet_ext.losses.dense import dense_loss, dense_loss_per_image, signed_logits
from retinanet_ext.losses.functional import Alpha, class_weights, upcast_to_float32
from retinanet_ext.losses.module import LossModule
from retinanet_ext.losses.registry import UNBALANCED, BoundLoss
from retinanet_ext.modeling.box_quality import box_quality, iou_of_pairs
from retinanet_ext.modeling.loss_config import build_cls_loss, build_selection, read_cls_loss_weight
from retinanet_ext.modeling.matching import is_foreground
from retinanet_ext.sampling import OHEM, SelectAll

NORMALIZERS = ("foreground_ema", "foreground", "foreground_batch", "selected")
BOX_IOUS = {"giou": generalized_box_iou, "diou": distance_box_iou, "ciou": complete_box_iou}
LOG_PERIOD = 20  # iterations, as in Detectron2's PeriodicWriter


class ImageSums(NamedTuple):
    """Undivided losses and counts of anchors of each image, (N,) each."""

    loss_cls: Tensor
    loss_box_reg: Tensor
    num_foreground: Tensor
    num_selected: Tensor


class RetinaNetCriterion(nn.Module):
    """Classification loss of the selected anchors and box regression loss of the foreground.

    Its own state is the moving average of the normaliser ``foreground_ema``, a buffer, so that a
    resumed run continues with it. Loading weights without it (Detectron2's) keeps its value. The
    normaliser counts the anchors of the whole batch, over all processes and micro-batches, so that
    the result does not depend on how a batch is divided.

    Example:
        >>> from retinanet_ext.losses import bind_loss
        >>> criterion = RetinaNetCriterion(
        ...     num_classes=2, cls_loss=bind_loss("focal", gamma=2.0), alpha=0.25,
        ...     box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)), normalizer="foreground",
        ... )
        >>> anchors = torch.tensor([[0.0, 0, 8, 8], [8.0, 0, 16, 8]])  # R = 2: one row of two cells
        >>> losses = criterion(
        ...     anchors, [torch.zeros(1, 2, 1, 2)], torch.zeros(1, 2, 4),
        ...     torch.tensor([[1, 2]]), torch.tensor([[0, 0]]), torch.tensor([[0.0, 0, 8, 9]]),
        ... )
        >>> {name: round(loss.item(), 3) for name, loss in losses.items()}
        {'loss_cls': 0.433, 'loss_box_reg': 0.18}
    """

    loss_normalizer: Tensor
    alpha_weights: Tensor | None

    def __init__(
        self,
        *,
        num_classes: int,
        cls_loss: BoundLoss | LossModule,
        alpha: Alpha = UNBALANCED,
        selection: SelectAll | OHEM | None = None,
        normalizer: str = "foreground_ema",
        box2box_transform: Box2BoxTransform,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
        cls_loss_weight: float = 1.0,
    ) -> None:
        """
        Args:
            num_classes: K
            cls_loss: a loss of x_t, see :func:`~retinanet_ext.losses.bind_loss`, or a module
            alpha: class-balancing weight of a loss of x_t, one number or K; -1 for none
            selection: which anchors count; by default all that are not ignored
            normalizer: ``foreground_ema``, ``foreground``, ``foreground_batch`` or ``selected``;
                docs/keys.md explains them under ``MODEL.RETINANET.LOSS_NORMALIZER``
            box2box_transform: turns anchors and boxes into regression targets
            box_reg_loss_type: ``smooth_l1`` on the targets, or ``giou``, ``diou``, ``ciou``
            smooth_l1_beta: where smooth L1 turns from quadratic to linear; 0 for L1
            cls_loss_weight: factor of the classification loss

        Raises:
            InputError: if an argument is invalid; the message names its config key
        """
        super().__init__()
        if normalizer not in NORMALIZERS:
            raise InputError(
                f"MODEL.RETINANET.LOSS_NORMALIZER must be one of {NORMALIZERS}, got {normalizer!r}"
            )
        if box_reg_loss_type not in ("smooth_l1", *BOX_IOUS):
            raise InputError(
                "MODEL.RETINANET.BBOX_REG_LOSS_TYPE must be one of "
                f"{('smooth_l1', *BOX_IOUS)}, got {box_reg_loss_type!r}"
            )
        Interval("[0, inf)").check("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", smooth_l1_beta)
        self.num_classes = num_classes
        self.cls_loss = cls_loss
        self.register_buffer("alpha_weights", class_weights(alpha, num_classes), persistent=False)
        self.selection = selection or SelectAll()
        self.normalizer = normalizer
        self.box2box_transform = box2box_transform
        self.box_reg_loss_type = box_reg_loss_type
        self.smooth_l1_beta = smooth_l1_beta
        self.cls_loss_weight = cls_loss_weight
        # Detectron2's initial value; float64, so that averages equal those of Python's floats.
        self.register_buffer("loss_normalizer", torch.tensor(100.0, dtype=torch.float64))
        self._num_micro_batches = 1
        self._micro_counts: list[Tensor] = []
        # If a list, counts of anchors are put there and do not divide the losses (ValidationLoss).
        self.deferred_counts: list[Tensor] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode, box2box_transform: Box2BoxTransform) -> RetinaNetCriterion:
        """Build the criterion from a config; an ``InputError`` names the key it rejects."""
        node = cfg.MODEL.RETINANET
        cls_loss, alpha = build_cls_loss(cfg)
        return cls(
            num_classes=node.NUM_CLASSES,
            cls_loss=cls_loss,
            alpha=alpha,
            selection=build_selection(cfg),
            normalizer=node.LOSS_NORMALIZER,
            box2box_transform=box2box_transform,
            box_reg_loss_type=node.BBOX_REG_LOSS_TYPE,
            smooth_l1_beta=node.SMOOTH_L1_LOSS_BETA,
            cls_loss_weight=read_cls_loss_weight(cfg),
        )

    @property
    def is_dense(self) -> bool:
        """Whether all anchors count, by a loss of x_t: the fused path, which also compiles."""
        return isinstance(self.selection, SelectAll) and isinstance(self.cls_loss, BoundLoss)

    def forward(
        self,
        anchors: Tensor,
        logits: Sequence[Tensor],
        deltas: Tensor,
        labels: Tensor,
        matched_idxs: Tensor,
        gt_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Return the scalars ``loss_cls`` and ``loss_box_reg``.

        Args:
            anchors: (R, 4)
            logits: logits of each level, (N, A K, H, W)
            deltas: predicted box regression, (N, R, 4)
            labels: (N, R)
            matched_idxs: index of each anchor's box in ``gt_boxes``, (N, R)
            gt_boxes: boxes of all images, (M, 4)
        """
        cls_losses, selected = None, labels >= 0
        if not self.is_dense:
            rows = [permute_to_N_HWA_K(level, self.num_classes) for level in logits]
            quality = self.box_quality(anchors, deltas, labels, matched_idxs, gt_boxes)
            cls_losses = self.anchor_losses(torch.cat(rows, dim=1), labels, quality)
        if isinstance(self.selection, OHEM):
            boxes = anchors
            if self.selection.nms_boxes == "predictions":
                decode = self.box2box_transform.apply_deltas
                boxes = torch.stack([decode(image, anchors) for image in deltas.detach()])
            selected = self.selection(cls_losses.detach(), labels, boxes, self.num_classes)
        foreground = is_foreground(labels, self.num_classes)
        weights = self._image_weights(foreground.sum(1), selected.sum(1))
        if cls_losses is None:
            loss_cls = dense_loss(
                self.cls_loss,
                logits,
                labels,
                weights,
                self.alpha_weights,
                num_classes=self.num_classes,
            )
        else:
            loss_cls = _weighted_sum(torch.where(selected, cls_losses, 0).sum(1), weights)
        per_image = self._box_loss_per_image(
            anchors, upcast_to_float32(deltas), foreground & selected, matched_idxs, gt_boxes
        )
        loss_box_reg = _weighted_sum(per_image, weights)
        return {"loss_cls": loss_cls * self.cls_loss_weight, "loss_box_reg": loss_box_reg}

    def sums_per_image(
        self,
        anchors: Tensor,
        logits: Sequence[Tensor],
        deltas: Tensor,
        labels: Tensor,
        matched_idxs: Tensor,
        gt_boxes: Tensor,
    ) -> ImageSums:
        """Return what :meth:`divide` makes the losses of, if all anchors are selected.

        It has no state and no collective operation, so that it compiles to one graph. The arguments
        are those of :meth:`forward`.
        """
        foreground = is_foreground(labels, self.num_classes)
        return ImageSums(
            dense_loss_per_image(
                self.cls_loss, logits, labels, self.alpha_weights, num_classes=self.num_classes
            ),
            self._box_loss_per_image(
                anchors, upcast_to_float32(deltas), foreground, matched_idxs, gt_boxes
            ),
            foreground.sum(1),
            (labels >= 0).sum(1),
        )

    def divide(self, sums: ImageSums) -> dict[str, Tensor]:
        """Return the losses of :meth:`forward` from :meth:`sums_per_image`."""
        weights = self._image_weights(sums.num_foreground, sums.num_selected)
        loss_cls = _weighted_sum(sums.loss_cls, weights) * self.cls_loss_weight
        loss_box_reg = _weighted_sum(sums.loss_box_reg, weights)
        return {"loss_cls": loss_cls.to(loss_box_reg.dtype), "loss_box_reg": loss_box_reg}

    def anchor_losses(
        self, logits: Tensor, labels: Tensor, quality: Tensor | None = None
    ) -> Tensor:
        """Return the classification loss of each anchor, summed over classes, (N, R).

        OHEM selects by it. The loss of ignored anchors is 0.

        Args:
            logits: (N, R, K)
            labels: (N, R)
            quality: IoU of the foreground's decoded boxes with their ground truth, (N, R)

        Raises:
            InputError: the target of the loss is the quality, and there is none
        """
        if isinstance(self.cls_loss, LossModule):
            return self.cls_loss(logits, labels, quality)
        labels = labels[..., None, None]
        alpha_weights = logits.new_ones(2) if self.alpha_weights is None else self.alpha_weights
        ones = torch.ones_like(labels, dtype=logits.dtype)
        x_t, weight, _ = signed_logits(logits[..., None, None], labels, ones, alpha_weights)
        return (self.cls_loss(x_t) * weight).flatten(2).sum(2)

    def box_quality(
        self,
        anchors: Tensor,
        deltas: Tensor,
        labels: Tensor,
        matched_idxs: Tensor,
        gt_boxes: Tensor,
    ) -> Tensor | None:
        """Return the quality that :meth:`anchor_losses` takes, None if the loss does not need it.

        The arguments are those of :meth:`forward`.
        """
        if not (isinstance(self.cls_loss, LossModule) and self.cls_loss.needs_quality):
            return None
        foreground = is_foreground(labels, self.num_classes)
        return box_quality(
            self.box2box_transform, anchors, deltas, foreground, matched_idxs, gt_boxes
        )

    def _box_loss_per_image(
        self,
        anchors: Tensor,
        deltas: Tensor,
        counts: Tensor,
        matched_idxs: Tensor,
        gt_boxes: Tensor,
    ) -> Tensor:
        """Return the regression loss of each image, (N,), over the anchors in ``counts``, (N, R).

        It is computed for every anchor, because listing those that count would make the host wait
        for a GPU. The others get their own anchor as prediction and as target.
        """
        if not len(gt_boxes):
            return deltas[:, :0].sum((1, 2))
        marked = counts.unsqueeze(2)
        losses = self.box_losses(
            anchors.expand(len(deltas), -1, -1).flatten(0, 1),
            deltas.masked_fill(~marked, 0).flatten(0, 1),
            torch.where(marked, gt_boxes[matched_idxs], anchors).flatten(0, 1),
        )
        return torch.where(counts, losses.view_as(counts), 0).sum(1)

    def box_losses(self, anchors: Tensor, deltas: Tensor, gt_boxes: Tensor) -> Tensor:
        """Return the box regression loss of each pair, (F,), from three tensors (F, 4)."""
        if self.box_reg_loss_type == "smooth_l1":
            targets = self._box_targets(anchors, gt_boxes)
            return smooth_l1_loss(deltas, targets, beta=self.smooth_l1_beta).sum(1)
        boxes = self.box2box_transform.apply_deltas(deltas, anchors)
        return 1 - iou_of_pairs(BOX_IOUS[self.box_reg_loss_type], boxes, gt_boxes)

    def _box_targets(self, anchors: Tensor, gt_boxes: Tensor) -> Tensor:
        """Compute ``Box2BoxTransform.get_deltas`` without its assertion, which waits for a GPU."""
        sizes, gt_sizes = (boxes[:, 2:] - boxes[:, :2] for boxes in (anchors, gt_boxes))
        offsets = (gt_boxes[:, :2] + 0.5 * gt_sizes - (anchors[:, :2] + 0.5 * sizes)) / sizes
        targets = (*offsets.unbind(1), *(gt_sizes / sizes).log().unbind(1))
        weights = self.box2box_transform.weights
        return torch.stack([w * t for w, t in zip(weights, targets, strict=True)], dim=1)

    def begin_batch(self, num_micro_batches: int) -> None:
        """Treat the forward passes until :meth:`end_batch` as micro-batches of one batch.

        Their losses are divided by the last normaliser, because the batch's own is not known yet.
        """
        self._num_micro_batches = num_micro_batches
        self._micro_counts = []
        if isinstance(self.cls_loss, LossModule):
            self.cls_loss.begin_batch(num_micro_batches)

    @torch.no_grad()
    def end_batch(self) -> Tensor:
        """Return the factor, a scalar, for the micro-batches' losses and summed gradients.

        Multiplied by it, they equal those of one forward pass over all images, up to rounding.
        """
        counts, self._micro_counts = self._micro_counts, []
        self._num_micro_batches = 1
        if isinstance(self.cls_loss, LossModule):
            self.cls_loss.end_batch()
        if self.normalizer == "foreground":  # counted per image
            return torch.ones_like(self.loss_normalizer)
        provisional = self.loss_normalizer.clone()
        return provisional * self._batch_weight(torch.stack(counts).sum())

    @torch.no_grad()
    def _image_weights(self, num_foreground: Tensor, num_selected: Tensor) -> Tensor:
        """Return the factor of each image's summed loss, (N,), from its counts of anchors, (N,)."""
        log_mean_count("num_pos_anchors", num_foreground)
        num_images = len(num_foreground)
        if self.normalizer == "foreground":
            num_images *= self._num_micro_batches
            return 1 / (num_images * num_foreground.double().clamp(min=1))
        count = (num_selected if self.normalizer == "selected" else num_foreground).sum()
        if self.deferred_counts is not None:
            self.deferred_counts.append(count)
            return torch.ones_like(num_foreground, dtype=torch.float64)
        if self._num_micro_batches == 1:
            weight = self._batch_weight(count)
        else:
            self._micro_counts.append(count)
            weight = 1 / self.loss_normalizer
        return weight.expand(num_images)

    def _batch_weight(self, count: Tensor) -> Tensor:
        """Return the factor of this process's loss, from its count of anchors.

        DDP averages gradients over processes. With this factor the mean of the processes' losses is
        the loss of one process with all images.
        """
        count = count.double()
        if comm.get_world_size() > 1:
            dist.all_reduce(count)
        count = count.clamp(min=1)
        if self.normalizer == "foreground_ema":
            count = 0.9 * self.loss_normalizer + 0.1 * count
            # torch.compile (2.11) loses a write to a float64 CPU scalar, unless it is an alias.
            self.loss_normalizer.detach().copy_(count)
        return comm.get_world_size() / count

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "loss_normalizer", self.loss_normalizer)
        own = self.state_dict(prefix=prefix)
        for key in [key for key in state_dict if key.startswith(f"{prefix}cls_loss.")]:
            if key not in own:  # the statistic of another loss
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _weighted_sum(per_image: Tensor, weights: Tensor) -> Tensor:
    return (per_image * weights.to(per_image.dtype)).sum()


def log_mean_count(name: str, counts: Tensor) -> None:
    """Log the mean count per image.

    On a GPU, where ``.item()`` synchronises, log only at iterations that the writers flush.
    Compiled code logs nothing, because it cannot read values.
    """
    if not torch.compiler.is_compiling() and has_event_storage():
        storage = get_event_storage()
        if counts.device.type == "cpu" or (storage.iter + 1) % LOG_PERIOD == 0:
            storage.put_scalar(name, counts.double().mean().item())
