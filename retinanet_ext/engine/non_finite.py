"""Why a step was not finite: it is repeated and looked into.

Shapes: N images, R anchors over all levels, L levels, K classes. Boxes: XYXY in input pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from retinanet_ext.engine.config_warnings import usual_learning_rate
from retinanet_ext.errors import first_line
from retinanet_ext.modeling.criterion import RetinaNetCriterion
from retinanet_ext.modeling.matching import is_foreground

HUGE_PIXEL = 1e6  # beyond what an image file holds
LARGE = 1e3  # as a weight or a logit: those of a model in training stay within tens

REMEDY = "lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True"

Batch = list[dict[str, Any]]
Report = dict[str, Any]


@dataclass(kw_only=True)
class StepSnapshot:
    """What a process did in one step, its weights left out.

    Attributes:
        cfg: of the run
        batches: ``SOLVER.GRAD_ACCUM_STEPS`` of them, as they came from the mapper
        iteration, rank, num_processes: which step, and whose part of it
        precision: ``float32``, ``float16`` or ``bfloat16``
        learning_rate: the highest of the optimizer's groups
        has_updated: whether the optimizer has changed the weights since they were loaded
        losses: of the step, on this process
        seed: of the generators of random numbers in this step
    """

    cfg: CfgNode
    batches: list[Batch]
    iteration: int
    rank: int
    num_processes: int
    precision: str
    learning_rate: float
    has_updated: bool
    losses: dict[str, float]
    seed: int


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


def begin_step(model: nn.Module, num_batches: int) -> Callable[[], Tensor | float]:
    """Take the next batches that a model is given as parts of one step.

    Returns:
        called after the last of them, it gives what to multiply the sum of their losses and of
        their gradients by
    """
    criterion = getattr(model, "criterion", None)
    if num_batches == 1 or criterion is None:
        return lambda: 1 / num_batches
    criterion.begin_batch(num_batches)
    return criterion.end_batch


def class_names(cfg: CfgNode) -> list[str]:
    """Return the names of the training data's classes, none where they are not registered."""
    names = [name for name in cfg.DATASETS.TRAIN if name in MetadataCatalog]
    return list(MetadataCatalog.get(names[0]).get("thing_classes", [])) if names else []


def explain_step(model: nn.Module, step: StepSnapshot) -> Report:
    """Return what :func:`diagnose` says, or a report of its failure, whose "cause" says why.

    An explanation needs memory that the step did not, and meets hooks and heads of any kind; what
    it fails of changes nothing about the step. "reproduced" is True then: nothing says otherwise.
    """
    try:
        return diagnose(model, step)
    except Exception as error:
        cause = f"the explanation failed: {type(error).__name__}: {first_line(error)[:200]}"
        return _plain(
            {
                "cause": cause,
                "iteration": step.iteration,
                "rank": step.rank,
                "num_processes": step.num_processes,
                "precision": step.precision,
                "reproduced": True,
                "losses": step.losses,
            }
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Have operations that processes share be this process's own, so that no other waits for it."""
    is_initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = is_initialized


@_alone()
def diagnose(model: nn.Module, step: StepSnapshot) -> Report:
    """Repeat a step's forward and backward passes on this process and say what is not finite.

    The normaliser and statistics of SyncBN are those of this process's images. Buffers change as in
    a step; weights and their ``grad`` stay as they are.

    Args:
        model: in training mode, as before the step, not wrapped for several processes
        step: one that was not finite on some process

    Returns:
        numbers, text, lists and dicts alone: the likely "cause" in one sentence; whether the step
        "reproduced" as not finite on this process; what was "first" so (term, level, layer, image,
        box); losses, gradient, weights and learning rate; and each image with its largest logit
        and its losses, summed over anchors before the normaliser, by level
    """
    torch.manual_seed(step.seed)
    gradients: dict[str, Tensor] = {}
    image_fault, first, images = None, None, []
    end_step = begin_step(model, len(step.batches))
    for number, batch in enumerate(step.batches):  # of each is kept what is said of it alone
        one = InstrumentedPass(model, batch, step)
        for name, gradient in one.pop_gradients():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        image_fault = image_fault or next(one.image_faults(), None)
        first = first or one.first_fault()
        images += one.describe_images(number)
    scale = end_step()
    for name in gradients:  # one in two copies at a time
        gradients[name] = gradients[name] * scale
    gradient_norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    # From the last layer to the first, as backward goes.
    gradient_fault = _first_not_finite(reversed(gradients.items()))
    weight_fault = _first_not_finite(_weights(model))
    if first is None and not math.isfinite(gradient_norm):  # which large numbers are enough for
        first = {
            "term": "gradient",
            "level": None,
            "layer": gradient_fault["name"] if gradient_fault else _largest(gradients.items())[0],
            "image": None,
            "box": None,
        }
    if first and image_fault:
        first |= {key: image_fault[key] for key in ("image", "box")}
    largest_name, largest = _largest(model.named_parameters())
    finite_in_float32 = step.precision == "float16" and _is_finite_in_float32(model, step.batches)
    report = {
        "iteration": step.iteration,
        "rank": step.rank,
        "num_processes": step.num_processes,
        "precision": step.precision,
        "reproduced": first is not None,
        "first": first,
        "losses": step.losses,
        "gradient": {"norm": gradient_norm, "not_finite": gradient_fault},
        "weights": {
            "largest": largest,
            "largest_name": largest_name,
            "not_finite": weight_fault,
        },
        "learning_rate": {
            "now": step.learning_rate,
            "base": step.cfg.SOLVER.BASE_LR,
            "usual": usual_learning_rate(step.cfg)[1],
            "images": step.cfg.SOLVER.IMS_PER_BATCH,
        },
        "max_logit": _max(v for image in images for v in image["max_logit"].values()),
        "images": images,
    }
    cause = _cause(step, report, image_fault["text"] if image_fault else "", finite_in_float32)
    return _plain({"cause": cause, **report})


class InstrumentedPass:
    """A batch's way through the model and back, with what was seen on it."""

    def __init__(self, model: nn.Module, batch: Batch, step: StepSnapshot) -> None:
        self.batch = batch
        self.class_names = class_names(step.cfg)
        self.levels = [name.upper() for name in getattr(model, "head_in_features", [])]
        self.layer: str | None = None  # the first whose output is not finite
        self.predictions: dict[str, list[Tensor]] = {}  # by term, of each level (N, ., H, W)
        self.terms: dict[str, Tensor] = {}  # the loss of each anchor, (N, R)
        self.matched_idxs = torch.empty(0)  # the box of each anchor, (N, R)
        # Generated code knows nothing of the hooks.
        eager = torch.compiler.set_stance("force_eager")
        with EventStorage(step.iteration), self._watch(model) as seen_by_criterion, eager:
            losses = compute_losses(model, batch, step.precision)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(
            total_loss(losses), list(parameters.values()), allow_unused=True
        )
        self.losses = {name: loss.item() for name, loss in losses.items()}
        self._gradients = dict(zip(parameters, gradients, strict=True))
        if seen_by_criterion:  # once backward has freed its memory
            self._note_terms(*seen_by_criterion)

    def pop_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradient of each parameter that has one, and forget it."""
        while self._gradients:
            name = next(iter(self._gradients))
            gradient = self._gradients.pop(name)
            if gradient is not None:
                yield name, gradient

    @contextmanager
    def _watch(self, model: nn.Module) -> Iterator[list[Any]]:
        """Note the first layer that is not finite and the predictions.

        Yields a list, to which the criterion and its arguments are added.
        """
        seen: list[Any] = []

        def after_layer(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if self.layer is None and isinstance(output, Tensor):
                    self.layer = None if output.isfinite().all() else name

            return hook

        def after_head(module: nn.Module, args: Any, output: Any) -> None:
            # Some heads predict more, such as FCOS's centre-ness.
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
    def _note_terms(self, criterion: RetinaNetCriterion, arguments: dict[str, Any]) -> None:
        labels, self.matched_idxs = arguments["labels"], arguments["matched_idxs"]
        rows = [permute_to_N_HWA_K(logits, criterion.num_classes) for logits in arguments["logits"]]
        losses = criterion.anchor_losses(torch.cat(rows, dim=1), labels)
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
        """Return what was first not finite on the way to the losses: term, level, image, box."""
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
        """Return a fault; its image is named where not every image of several has it."""
        image = None
        if images is not None and (len(images) == 1 or not images.all()):
            image = self.batch[int(images.nonzero()[0])]
        return {
            "term": term,
            "level": None if level is None else self.levels[level],
            "layer": self.layer,
            "image": image and _image_name(image),
            "box": box if image else None,
        }

    def image_faults(self) -> Iterator[Report]:
        """Yield what in the batch itself no loss can be computed from."""
        for inputs in self.batch:
            name = _image_name(inputs)
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
                    f"box {index} of {name}, [{box}] (XYXY, pixels; class {label}), has no area or "
                    "is not finite: correct or drop that annotation"
                )
                yield {"image": name, "box": index, "text": text}

    def describe_images(self, number: int) -> Iterator[Report]:
        """Yield a description of each image of the batch, the micro-batch of that number."""
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


def _cause(step: StepSnapshot, report: Report, image_fault: str, finite_in_float32: bool) -> str:
    """Return the likely cause in one sentence, the surest evidence first."""
    first, weights = report["first"], report["weights"]
    if fault := weights["not_finite"]:
        text = f"weight {fault['name']} is not finite (in {fault['values']} of its values)"
        if not step.has_updated:
            return f"{text} since it was loaded: the file is damaged, start from other weights"
        if weights["largest"] < LARGE:
            return (
                f"{text}, while no other exceeds {weights['largest']:.3g}: it was damaged, not "
                "trained to this; go on from an earlier checkpoint"
            )
        return f"{text}: the model has diverged; {_rate(step)}"
    if image_fault:
        return image_fault
    if first is None:
        return (
            "repeated on this process alone the step is finite: the sum of the processes' "
            "gradients is not, or the device does not compute the same twice"
        )
    if finite_in_float32:
        return (
            f"float16 overflows, first in {first['layer'] or first['term']}, and float32 does not: "
            "set SOLVER.AMP.PRECISION bfloat16"
        )
    sizes = f"weights reach {weights['largest']:.3g} ({weights['largest_name']}), and "
    if math.isfinite(report["max_logit"]):
        sizes += f"logits {report['max_logit']:.3g}"
    else:
        sizes += f"{first['layer'] or first['term']} is not finite"
    grown = not (report["max_logit"] < LARGE and weights["largest"] < LARGE)
    if grown and not step.has_updated:
        return (
            f"{sizes} before the first update: these weights are damaged, or MODEL.PIXEL_MEAN "
            "and PIXEL_STD are not those they were trained with"
        )
    if grown:
        return f"the model has diverged: {sizes}; {_rate(step)}"
    if first["term"] != "gradient":
        return f"{first['term']} is not finite although boxes, pixels, weights and logits are"
    hint = ""
    if (
        step.cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
        and step.cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA < 1
    ):
        hint = "; of Detectron2's focal loss it is not at gamma below 1, of RetinaNetExt's it is"
    return f"all losses are finite and the gradient is not, first in {first['layer']}{hint}"


def _rate(step: StepSnapshot) -> str:
    usual = usual_learning_rate(step.cfg)[1]
    ratio = step.learning_rate / usual
    text = f"{ratio:.3g} times the usual {usual:g}" if ratio > 1 else f"the usual being {usual:g}"
    return (
        f"learning rate {step.learning_rate:g} is {text} for {step.cfg.SOLVER.IMS_PER_BATCH} "
        f"images: {REMEDY}"
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what the forward pass of training reads, which statistics of BatchNorm are not."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from module.named_buffers(name, recurse=False)


def _first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Report | None:
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            return {"name": name, "values": int((~tensor.isfinite()).sum())}
    return None


@torch.no_grad()
def _largest(parameters: Iterable[tuple[str, Tensor]]) -> tuple[str, float]:
    """Return the name and size of the largest finite weight."""
    sizes = {name: p.abs().nan_to_num(0, 0, 0).max().item() for name, p in parameters if p.numel()}
    name = max(sizes, key=sizes.__getitem__)
    return name, sizes[name]


@torch.no_grad()
def _is_finite_in_float32(model: nn.Module, batches: list[Batch]) -> bool:
    with EventStorage():
        losses = [compute_losses(model, batch, "float32") for batch in batches]
    return all(loss.isfinite().all() for values in losses for loss in values.values())


def _max(values: Iterable[float]) -> float:
    """Return the largest, NaN if there is one, 0 if there are none."""
    return torch.tensor([0.0, *values], dtype=torch.float64).max().item()


def _image_name(inputs: dict[str, Any]) -> str:
    return f"image {inputs.get('file_name')} (image id {inputs.get('image_id')})"


def _plain(value: Any) -> Any:
    """Return what JSON can hold: numbers that are not finite as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
