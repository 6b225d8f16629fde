"""Explain a non-finite loss or gradient by re-running the step with forward hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from retinanet_ext.engine.config_warnings import usual_learning_rate
from retinanet_ext.engine.instrumented_pass import (
    Batch,
    InstrumentedPass,
    Report,
    compute_losses,
    total_loss,
)
from retinanet_ext.errors import first_line

LARGE = 1e3  # weights and logits of a model that trains stay within tens

REMEDY = "lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True"


@dataclass(kw_only=True)
class StepSnapshot:
    """One process's share of a training step, without the weights.

    Attributes:
        cfg: config of the run
        batches: ``SOLVER.GRAD_ACCUM_STEPS`` micro-batches as the mapper returned them
        iteration: index of the step
        rank, num_processes: this process and the number of processes
        precision: ``float32``, ``float16`` or ``bfloat16``
        learning_rate: highest of the optimizer's parameter groups
        has_updated: whether the optimizer has changed the weights since they were loaded
        losses: this process's losses
        seed: seed of the random number generators for this step
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


def begin_step(model: nn.Module, num_batches: int) -> Callable[[], Tensor | float]:
    """Have the model treat its next ``num_batches`` batches as micro-batches of one step.

    Returns:
        a function to call after the last one; it returns the factor for the sum of their losses
        and of their gradients
    """
    criterion = getattr(model, "criterion", None)
    if num_batches == 1 or criterion is None:
        return lambda: 1 / num_batches
    criterion.begin_batch(num_batches)
    return criterion.end_batch


def class_names(cfg: CfgNode) -> list[str]:
    """Return the class names of the training data, none if the data are not registered."""
    names = [name for name in cfg.DATASETS.TRAIN if name in MetadataCatalog]
    return list(MetadataCatalog.get(names[0]).get("thing_classes", [])) if names else []


def explain_step(model: nn.Module, step: StepSnapshot) -> Report:
    """Return the report of :func:`diagnose`, or if that fails a report whose "cause" says why.

    The explanation may fail, because it needs more memory than the step and meets heads of any
    kind. That must not change how the step is dealt with, so "reproduced" is True then.
    """
    try:
        return diagnose(model, step)
    except Exception as error:
        cause = f"the explanation failed: {type(error).__name__}: {first_line(error)[:200]}"
        return _plain({"cause": cause, **_describe(step), "reproduced": True})


def _describe(step: StepSnapshot) -> Report:
    names = ("iteration", "rank", "num_processes", "precision", "losses")
    return {name: getattr(step, name) for name in names}


@contextmanager
def _alone() -> Iterator[None]:
    """Compute collective operations on this process only, because only some processes explain.

    The check is patched because each user has its own switch: torch's SyncBN, Detectron2's
    naiveSyncBN and the criterion's normaliser agree on nothing but ``is_initialized``.
    """
    is_initialized = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = is_initialized


@_alone()
def diagnose(model: nn.Module, step: StepSnapshot) -> Report:
    """Re-run a step's forward and backward passes on this process and report what is not finite.

    The normaliser and SyncBN see this process's images only. Buffers change as in a step; weights
    and their ``grad`` do not.

    Args:
        model: in training mode, in the state before the step, not wrapped in DDP
        step: a step that was not finite on some process

    Returns:
        what JSON can hold: the likely "cause" in one sentence; whether the step "reproduced" as
        non-finite; what was non-finite "first" (term, level, layer, image, box); losses, gradient,
        weights and learning rate; per image the largest logit per level, and the losses per level
        summed over anchors before the normaliser
    """
    torch.manual_seed(step.seed)
    gradients, image_fault, first, images = _rerun(model, step)
    gradient_norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    # From the last layer to the first, in the order of backward.
    gradient_fault = _first_not_finite(reversed(gradients.items()))
    if first is None and not math.isfinite(gradient_norm):  # large finite gradients suffice
        layer = gradient_fault["name"] if gradient_fault else _largest(gradients.items())[0]
        first = {"term": "gradient", "level": None, "layer": layer, "image": None, "box": None}
    if first and image_fault:
        first |= {key: image_fault[key] for key in ("image", "box")}
    largest_name, largest = _largest(model.named_parameters())
    report = {
        **_describe(step),
        "reproduced": first is not None,
        "first": first,
        "gradient": {"norm": gradient_norm, "not_finite": gradient_fault},
        "weights": {
            "largest": largest,
            "largest_name": largest_name,
            "not_finite": _first_not_finite(_weights(model)),
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
    finite_in_float32 = step.precision == "float16" and _is_finite_in_float32(model, step.batches)
    cause = _cause(step, report, image_fault["text"] if image_fault else "", finite_in_float32)
    return _plain({"cause": cause, **report})


def _rerun(
    model: nn.Module, step: StepSnapshot
) -> tuple[dict[str, Tensor], Report | None, Report | None, list[Report]]:
    """Return gradients, the first fault of an image, the first fault at all, and the images."""
    names = class_names(step.cfg)
    gradients: dict[str, Tensor] = {}
    image_fault, first, images = None, None, []
    end_step = begin_step(model, len(step.batches))
    for number, batch in enumerate(step.batches):
        run = InstrumentedPass(
            model, batch, precision=step.precision, iteration=step.iteration, class_names=names
        )
        for name, gradient in run.pop_gradients():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        image_fault = image_fault or next(run.image_faults(), None)
        first = first or run.first_fault()
        images += run.describe_images(number)
    scale = end_step()
    for name in gradients:  # one by one, so that at most one exists twice
        gradients[name] = gradients[name] * scale
    return gradients, image_fault, first, images


def _cause(step: StepSnapshot, report: Report, image_fault: str, finite_in_float32: bool) -> str:
    """Return the likely cause in one sentence; the most certain evidence decides."""
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
            "the step is finite when repeated on this process alone: the sum of the processes' "
            "gradients is not, or the device does not compute the same result twice"
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
        hint = (
            "; Detectron2's focal loss has no finite gradient at gamma below 1, RetinaNetExt's has"
        )
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
    """Yield parameters and buffers except BatchNorm statistics, which training does not read."""
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
        return all(total_loss(compute_losses(model, b, "float32")).isfinite() for b in batches)


def _max(values: Iterable[float]) -> float:
    """Return the largest value; NaN if one is NaN, 0 if there are none."""
    return torch.tensor([0.0, *values], dtype=torch.float64).max().item()


def _plain(value: Any) -> Any:
    """Return what JSON can hold, with non-finite numbers as text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
