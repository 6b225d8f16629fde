"""One forward and backward pass with hooks that record where it is not finite.

Shapes: N images, R anchors over all levels, K classes. Boxes: XYXY in input pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from retinanet_ext.modeling.criterion import RetinaNetCriterion
from retinanet_ext.modeling.matching import is_foreground

HUGE_PIXEL = 1e6  # more than any image file holds

Batch = list[dict[str, Any]]
Report = dict[str, Any]


def compute_losses(model: nn.Module, batch: Batch, precision: str) -> dict[str, Tensor]:
    """Return a model's losses by name, computed in a precision."""
    device = next(model.parameters()).device
    enabled = precision != "float32"
    with torch.autocast(device.type, getattr(torch, precision), enabled=enabled):
        losses = model(batch)
    return losses if isinstance(losses, dict) else {"total_loss": losses}


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of a model's losses."""
    return torch.stack(list(losses.values())).sum()


class InstrumentedPass:
    """Run a micro-batch forward and backward and record what was not finite.

    Weights and their ``grad`` stay as they are; buffers change as in a step.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        precision: str,
        iteration: int,
        class_names: Sequence[str],
    ) -> None:
        self.batch = batch
        self.class_names = class_names
        self.levels = [name.upper() for name in getattr(model, "head_in_features", [])]
        self.layer: str | None = None  # first layer whose output is not finite
        self.predictions: dict[str, list[Tensor]] = {}  # by term, one (N, ., H, W) per level
        self.terms: dict[str, Tensor] = {}  # by term, loss per anchor, (N, R)
        self.matched_idxs = torch.empty(0)  # ground-truth box per anchor, (N, R)
        # Hooks do not run in compiled code.
        eager = torch.compiler.set_stance("force_eager")
        with EventStorage(iteration), self._watch(model) as seen_by_criterion, eager:
            losses = compute_losses(model, batch, precision)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(
            total_loss(losses), list(parameters.values()), allow_unused=True
        )
        self.losses = {name: loss.item() for name, loss in losses.items()}
        self._gradients = dict(zip(parameters, gradients, strict=True))
        if seen_by_criterion:  # after backward, which frees its memory
            self._record_terms(*seen_by_criterion)

    def pop_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and gradient of each parameter that has one, and release the gradient."""
        while self._gradients:
            name = next(iter(self._gradients))
            gradient = self._gradients.pop(name)
            if gradient is not None:
                yield name, gradient

    @contextmanager
    def _watch(self, model: nn.Module) -> Iterator[list[Any]]:
        """Record the first layer that is not finite and the predictions.

        Yields a list, to which the forward pass adds the criterion and its arguments.
        """
        seen: list[Any] = []

        def after_layer(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if self.layer is None and isinstance(output, Tensor):
                    self.layer = None if output.isfinite().all() else name

            return hook

        def after_head(module: nn.Module, args: Any, output: Any) -> None:
            # Some heads predict more, such as FCOS its centre-ness.
            for term, levels in zip(("loss_cls", "loss_box_reg"), output, strict=False):
                self.predictions[term] = [level.detach() for level in levels]

        def before_criterion(module: RetinaNetCriterion, args: Any, kwargs: Any) -> None:
            arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            seen.extend((module, arguments))

        handles = [
            layer.register_forward_hook(after_layer(name))
            for name, layer in model.named_modules()
            if not any(layer.children())
        ]
        if isinstance(model, DenseDetector):
            handles.append(model.head.register_forward_hook(after_head))
        criterion = getattr(model, "criterion", None)
        if isinstance(criterion, RetinaNetCriterion):
            handles.append(criterion.register_forward_pre_hook(before_criterion, with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _record_terms(self, criterion: RetinaNetCriterion, arguments: dict[str, Any]) -> None:
        labels, self.matched_idxs = arguments["labels"], arguments["matched_idxs"]
        rows = [permute_to_N_HWA_K(logits, criterion.num_classes) for logits in arguments["logits"]]
        quality = criterion.box_quality(**{k: v for k, v in arguments.items() if k != "logits"})
        losses = criterion.anchor_losses(torch.cat(rows, dim=1), labels, quality)
        self.terms["loss_cls"] = losses.masked_fill(labels < 0, 0)
        image, anchor = is_foreground(labels, criterion.num_classes).nonzero(as_tuple=True)
        box_losses = criterion.box_losses(
            arguments["anchors"][anchor],
            arguments["deltas"][image, anchor],
            arguments["gt_boxes"][self.matched_idxs[image, anchor]],
        )
        losses = box_losses.new_zeros(labels.shape)
        self.terms["loss_box_reg"] = losses.index_put((image, anchor), box_losses)
        self.anchors_of_levels = [row.shape[1] for row in rows]

    def first_fault(self) -> Report | None:
        """Return what was not finite first in the forward pass: term, level, layer, image, box."""
        for term, levels in self.predictions.items():
            finite = torch.stack([level.flatten(1).isfinite().all(1) for level in levels])
            if not finite.all():
                level, _ = (~finite).nonzero()[0].tolist()
                return self._fault(term, level=level, images=~finite.all(0))
        for term, losses in self.terms.items():
            if not losses.isfinite().all():
                image, anchor = (~losses.isfinite()).nonzero()[0].tolist()
                bounds = torch.tensor(self.anchors_of_levels).cumsum(0)
                level = int((anchor >= bounds).sum())
                box = None
                if term == "loss_box_reg":
                    before = sum(len(inputs["instances"]) for inputs in self.batch[:image])
                    box = int(self.matched_idxs[image, anchor]) - before
                return self._fault(term, level=level, images=~losses.isfinite().all(1), box=box)
        bad = [term for term, loss in self.losses.items() if not math.isfinite(loss)]
        return self._fault(bad[0]) if bad else None

    def _fault(
        self,
        term: str,
        *,
        level: int | None = None,
        images: Tensor | None = None,
        box: int | None = None,
    ) -> Report:
        """Return a fault. It names an image unless all images of several have the fault."""
        image = None
        if images is not None and (len(images) == 1 or not images.all()):
            image = self.batch[int(images.nonzero()[0])]
        return {
            "term": term,
            "level": None if level is None else self.levels[level],
            "layer": self.layer,
            "image": image and image_name(image),
            "box": box if image else None,
        }

    def image_faults(self) -> Iterator[Report]:
        """Yield the pixels and boxes of the batch that make every loss non-finite."""
        for inputs in self.batch:
            name = image_name(inputs)
            low, high = inputs["image"].double().aminmax()
            largest = max(-low.item(), high.item())
            if not largest < HUGE_PIXEL:
                finite = math.isfinite(largest)
                what = f"as large as {largest:g}" if finite else "that are not finite"
                yield {"image": name, "box": None, "text": f"{name} has pixel values {what}"}
            boxes = inputs["instances"].gt_boxes.tensor
            sides = boxes[:, 2:] - boxes[:, :2]
            usable = (sides > 0).all(1) & boxes.isfinite().all(1) & sides.prod(1).isfinite()
            for index in (~usable).nonzero()[:, 0].tolist():
                label = self._class_name(int(inputs["instances"].gt_classes[index]))
                box = ", ".join(f"{coordinate:g}" for coordinate in boxes[index].tolist())
                text = (
                    f"box {index} of {name}, [{box}] (XYXY, pixels; class {label}), is degenerate "
                    "(zero area, inverted or not finite): correct or drop that annotation"
                )
                yield {"image": name, "box": index, "text": text}

    def describe_images(self, number: int) -> Iterator[Report]:
        """Yield a description per image; ``number`` is the index of this micro-batch."""
        logits = [level.abs().flatten(1).amax(1) for level in self.predictions.get("loss_cls", [])]
        for index, inputs in enumerate(self.batch):
            instances = inputs["instances"]
            yield {
                "file_name": inputs.get("file_name"),
                "image_id": inputs.get("image_id"),
                "batch": number,
                "pixels": [value.item() for value in inputs["image"].double().aminmax()],
                "boxes": [
                    {"class": self._class_name(label), "box": box}
                    for label, box in zip(
                        instances.gt_classes.tolist(),
                        instances.gt_boxes.tensor.tolist(),
                        strict=True,
                    )
                ],
                "max_logit": {
                    name: level[index].item()
                    for name, level in zip(self.levels, logits, strict=False)
                },
                "losses": {
                    term: {
                        name: level.sum().item()
                        for name, level in zip(
                            self.levels, losses[index].split(self.anchors_of_levels), strict=True
                        )
                    }
                    for term, losses in self.terms.items()
                },
            }

    def _class_name(self, label: int) -> str:
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)


def image_name(inputs: dict[str, Any]) -> str:
    """Return file name and image id as text."""
    return f"image {inputs.get('file_name')} (image id {inputs.get('image_id')})"
