"""The film of figure 4, written during training: ``OUTPUT_DIR/loss_film.json``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils import comm
from torch import Tensor

from retinanet_ext.analysis.film import GROUPS, QUANTITIES, Film, group_sums
from retinanet_ext.config_keys import loss_parameter_keys, read_key
from retinanet_ext.engine.config_load import load_config
from retinanet_ext.engine.metrics import archive_superseded_metrics
from retinanet_ext.errors import InputError
from retinanet_ext.files import to_json
from retinanet_ext.losses import LOSSES
from retinanet_ext.modeling import RetinaNetExt
from retinanet_ext.modeling.criterion import RetinaNetCriterion
from retinanet_ext.modeling.matching import is_foreground
from retinanet_ext.sampling import SelectAll

LOSS_FILM = "loss_film.json"


class LossFilm(HookBase):
    """Record which anchors carry the loss of the batch that is trained, and its gradient.

    Every ``SOLVER.LOSS_FILM_PERIOD`` iterations, from the first on, one line of JSON is appended
    to ``loss_film.json``. The gradient is that of the training step with respect to the logits of
    the classifier, summed over micro-batches and processes; the loss is computed by the
    criterion's own formula. The training is bit for bit that without the hook.

    It comes before the hook that saves checkpoints. Otherwise a run that is killed between the two
    would resume without the line of the checkpoint's iteration.
    """

    def __init__(self, model: RetinaNetExt, class_names: Sequence[str]) -> None:
        """
        Args:
            model: the model that is trained, without ``DistributedDataParallel``
            class_names: K names; empty: the classes are named by their numbers
        """
        self._criterion: RetinaNetCriterion = model.criterion
        self._levels = list(model.head_in_features)
        self._classes = list(class_names) or [str(k) for k in range(model.num_classes)]
        self._sums: Tensor | None = None  # (L, 2, 3, K) at an iteration that is recorded

    def before_train(self) -> None:
        """Move the lines of iterations that run again to ``loss_film_superseded.json``.

        Raises:
            InputError: the lines before them are of another run
        """
        if not comm.is_main_process():
            return
        cfg = self.trainer.cfg
        self._path = Path(cfg.OUTPUT_DIR, LOSS_FILM)
        seed = getattr(self.trainer.data_loader, "seed", cfg.SEED)
        self._run = {"seed": seed, "cls_loss": describe_cls_loss(cfg)}
        archive_superseded_metrics(self._path, self.trainer.start_iter)
        if self._path.exists():
            _check_run(self._path, _read_lines(self._path), self._run, self._classes)

    def before_step(self) -> None:
        cfg = self.trainer.cfg
        if self.trainer.iter % cfg.SOLVER.LOSS_FILM_PERIOD:
            return
        device = self._criterion.loss_normalizer.device
        shape = (len(self._levels), len(QUANTITIES), len(GROUPS), len(self._classes))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._passes_left = cfg.SOLVER.GRAD_ACCUM_STEPS
        self._handle = self._criterion.register_forward_hook(self._watch, with_kwargs=True)

    def _watch(
        self,
        criterion: RetinaNetCriterion,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        losses: dict[str, Tensor],
    ) -> None:
        """Wait for the gradient of each level's logits."""
        self._passes_left -= 1
        if not self._passes_left:  # a step that is not finite is explained by further passes
            self._handle.remove()
        arguments = inspect.signature(criterion.forward).bind(*args, **kwargs).arguments
        labels = arguments["labels"]
        weights = torch.ones_like(labels, dtype=torch.float64)
        if criterion.normalizer == "foreground":  # the only one that differs between images
            weights /= is_foreground(labels, criterion.num_classes).sum(1, keepdim=True).clamp(1)
        first = 0
        for level, logits in enumerate(arguments["logits"]):
            count = logits[0].numel() // criterion.num_classes
            part = slice(first, first + count)
            first += count
            logits.register_hook(
                partial(self._add, level, logits.detach(), labels[:, part], weights[:, part])
            )

    def _add(
        self, level: int, logits: Tensor, labels: Tensor, weights: Tensor, gradient: Tensor
    ) -> None:
        """Add the sums of a level, in backward; per image, because the temporaries are large."""
        criterion = self._criterion
        alphas = criterion.alpha_weights
        for image in zip(*(t.split(1) for t in (logits, labels, weights, gradient)), strict=True):
            image_logits, image_labels, image_weights, image_gradient = image
            rows, slopes = (
                permute_to_N_HWA_K(t, criterion.num_classes) for t in (image_logits, image_gradient)
            )
            if not isinstance(criterion.selection, SelectAll):
                # The loss has no gradient at anchors that are not selected.
                image_weights = image_weights * (slopes != 0).any(2)
            self._sums[level] += group_sums(
                criterion.cls_loss,
                rows,
                image_labels,
                slopes,
                image_weights,
                image_weights.new_ones(2) if alphas is None else alphas,
            )

    def after_step(self) -> None:
        if self._sums is None:
            return
        sums, self._sums = self._sums, None
        if comm.get_world_size() > 1:
            dist.all_reduce(sums)
        if comm.is_main_process():
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(to_json(self._describe(sums.cpu()), ensure_ascii=False) + "\n")

    def _describe(self, sums: Tensor) -> dict[str, Any]:
        """Return a record. Shares are of the whole, so that those of all levels sum to 1."""
        shares = sums / sums.sum((0, 2, 3), keepdim=True)
        levels = zip(self._levels, shares.sum(3), strict=True)
        classes = zip(self._classes, shares.sum(0).unbind(2), strict=True)
        return {
            "iteration": self.trainer.iter,
            **self._run,
            **_by_quantity(shares.sum((0, 3))),
            "levels": {name: _by_quantity(part) for name, part in levels},
            "classes": {name: _by_quantity(part) for name, part in classes},
        }


def _by_quantity(shares: Tensor) -> dict[str, list[float]]:
    """Return shares, (2, 3), by quantity, with five digits."""
    rows = zip(QUANTITIES, shares.tolist(), strict=True)
    return {quantity: [float(f"{share:.5g}") for share in row] for quantity, row in rows}


def describe_cls_loss(cfg: CfgNode) -> str:
    """Return the classification loss of a config in words: ``focal, gamma 2, alpha 0.25``."""
    node = cfg.MODEL.RETINANET.CLS_LOSS
    values = {name: read_key(cfg, k) for name, k in loss_parameter_keys(LOSSES[node.NAME]).items()}
    if node.CLASS_ALPHA:
        values.pop("alpha", None)
    parts = [node.NAME, *(f"{name} {value:g}" for name, value in values.items())]
    if node.CLASS_ALPHA:
        parts.append(f"class alpha {' '.join(map(str, node.CLASS_ALPHA))}")
    if node.WEIGHT != 1:
        parts.append(f"weight {node.WEIGHT}")
    if cfg.MODEL.RETINANET.SELECTION.NAME != "all":
        parts.append(cfg.MODEL.RETINANET.SELECTION.NAME)
    return ", ".join(parts)


def read_film(folder: str | Path, ap: float | None = None) -> Film:
    """Return the film in a run's folder, without the steps that were not finite.

    Args:
        folder: OUTPUT_DIR of a training with ``SOLVER.LOSS_FILM_PERIOD``
        ap: of the run's last evaluation

    Raises:
        InputError: there is none, it cannot be read, or it is the film of another run
    """
    folder = Path(folder)
    path = folder / LOSS_FILM
    if not path.is_file():
        raise InputError(
            f"{path} is not there; a training with SOLVER.LOSS_FILM_PERIOD above 0 writes it"
        )
    cfg = load_config(folder / "config.yaml")
    records = _read_lines(path)
    if not records:
        raise InputError(f"{path} holds no whole line yet")
    classes = list(records[0]["classes"])
    if len(classes) != cfg.MODEL.RETINANET.NUM_CLASSES:
        raise InputError(
            f"{path} is the film of another run: it has {len(classes)} classes "
            f"({', '.join(classes)}), and config.yaml {cfg.MODEL.RETINANET.NUM_CLASSES}"
        )
    run = {"seed": cfg.SEED, "cls_loss": describe_cls_loss(cfg)}
    _check_run(path, records, run, classes)
    records = [record for record in records if record["loss"] and record["gradient"]]
    if not records:
        raise InputError(f"{path} has only steps that were not finite")
    return Film(
        name=folder.name,
        cls_loss=run["cls_loss"],
        iterations=np.array([record["iteration"] for record in records]),
        num_iterations=cfg.SOLVER.MAX_ITER,
        shares=_stack_shares(records),
        levels=_stack_parts(records, "levels"),
        classes=_stack_parts(records, "classes"),
        ap=ap,
    )


def _stack_shares(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return quantity -> shares, (T, 3)."""
    return {q: np.array([record[q] for record in records], dtype=float) for q in QUANTITIES}


def _stack_parts(
    records: Sequence[Mapping[str, Any]], key: str
) -> dict[str, dict[str, np.ndarray]]:
    names = list(records[0][key])
    return {name: _stack_shares([record[key][name] for record in records]) for name in names}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a film, without a last line that a kill has cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            record["iteration"], record["seed"], record["cls_loss"]
            for part in (record, *record["levels"].values(), *record["classes"].values()):
                part["loss"], part["gradient"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}, line {number}: is not a record of a film") from None
        records.append(record)
    return records


def _check_run(
    path: Path,
    records: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    classes: Sequence[str],
) -> None:
    """Refuse a film whose records are not of this run.

    Raises:
        InputError: names the line and what differs
    """
    for number, record in enumerate(records, 1):
        found = {**{key: record[key] for key in run}, "classes": list(record["classes"])}
        for key, expected in {**run, "classes": list(classes)}.items():
            if found[key] != expected:
                raise InputError(
                    f"{path}, line {number}: is the film of another run: {key} is {found[key]}, "
                    f"and {expected} in this run; move the file away"
                )
