"""Which loss to train a config with, from its data, its budget and a first film."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_anchor_generator
from detectron2.structures import Boxes, Instances
from tabulate import tabulate

from retinanet_ext.analysis.film import GROUPS, Film, early_shares
from retinanet_ext.analysis.loss_cdf import CONCENTRATED
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.anchor_coverage import build_grid, training_boxes
from retinanet_ext.data.coco_json import join_some
from retinanet_ext.engine.config_check import check_config, use_cpu_without_cuda
from retinanet_ext.engine.loss_film import LOSS_FILM, read_film
from retinanet_ext.errors import InputError
from retinanet_ext.evaluation.bootstrap import welch_interval
from retinanet_ext.experiments.measured_losses import (
    DEFAULT,
    MARGIN,
    MIN_AP,
    Advice,
    Setting,
    Situation,
    advised_keys,
    comparable,
    leave_one_out,
    one_loss_everywhere,
    read_measurements,
    recommend,
)
from retinanet_ext.modeling.matching import AnchorMatcher, is_foreground, label_anchors
from retinanet_ext.modeling.timm_backbone import timm_weights
from retinanet_ext.page import interval, signed

CLASS_ALPHA = f"{DEFAULT}, class alpha auto"

MAX_IMAGES = 500
"""Images whose anchors are labelled; of more, a sample evenly spaced."""


def advise(cfg: CfgNode, run: str | Path | None = None) -> str:
    """Return which loss to train a config with, and the measured table that it rests on.

    Args:
        cfg: from :func:`~retinanet_ext.engine.load_config`; completed in place
        run: OUTPUT_DIR of a first training on these data, with a film

    Raises:
        InputError: a value or the data cannot be used, or the film is that of another run
    """
    facts, situation = examine(cfg)
    film = None if run is None else _film_of(run, facts)
    settings = read_measurements()[0]
    advice = recommend(situation, settings)
    keys = advised_keys(advice.row, cfg.MODEL.RETINANET.LOSS_NORMALIZER)
    pairs = [f"{key} {shlex.quote(str(value))}" for key, value in keys.items()]
    parts = [
        _describe_data(facts),
        f"This training: {situation}.",
        *advice.remarks,
        _describe_setting(advice.setting),
        f"Advice: {advice.row}",
        _reason(advice.row, advice.setting),
        "    " + " \\\n    ".join(pairs),
        _describe_safest(advice, situation, settings),
        _describe_class_alpha(situation, facts, settings),
        *([] if film is None else [_describe_film(film)]),
    ]
    return "\n\n".join(filter(None, parts))


def describe_regret() -> str:
    """Return the AP that the advice loses on each measured setting when the others advise it."""
    settings = read_measurements()[0]
    count = len(one_loss_everywhere(settings)[DEFAULT])
    return "\n\n".join(
        (
            "Each measured setting, advised from the others among its own rows. Settings where no "
            f"loss reaches {MIN_AP:g} AP are left out.",
            tabulate(regret_table(settings), "firstrow", disable_numparse=True),
            f"One loss everywhere, on the {count} settings that have all of these:",
            tabulate(everywhere_table(settings), "firstrow", disable_numparse=True),
        )
    )


def regret_table(settings: Sequence[Setting]) -> list[list[str]]:
    """Return a head, a row of cells for each setting left out, and the means."""
    regrets = leave_one_out(settings)
    means = [fmean(regret.ap for regret in regrets), fmean(regret.default for regret in regrets)]
    return [
        ["left out", "advised from", "advice", "best row", "AP lost", "by the default"],
        *(
            [
                regret.setting.name,
                regret.advice.setting.name,
                regret.advice.row,
                regret.best,
                f"{regret.ap:.1f}",
                f"{regret.default:.1f}",
            ]
            for regret in regrets
        ),
        ["mean", "", "", "", *(f"{mean:.1f}" for mean in means)],
    ]


def everywhere_table(settings: Sequence[Setting]) -> list[list[str]]:
    """Return a head, and a row of cells for each loss that could be taken everywhere."""
    lost = {row: aps.values() for row, aps in one_loss_everywhere(settings).items()}
    rows = [[row, f"{fmean(aps):.1f}", f"{max(aps):.1f}"] for row, aps in lost.items()]
    return [["loss", "AP lost, mean", "most"], *rows]


@dataclass(frozen=True)
class DataFacts:
    """The training data of a config.

    Attributes:
        images: that are trained on
        objects: class name -> number of its objects
        foreground, background: mean number of anchors per image
    """

    images: int
    objects: Mapping[str, int]
    foreground: float
    background: float


def examine(cfg: CfgNode) -> tuple[DataFacts, Situation]:
    """Check a config and its training data as training does, and measure them.

    Args:
        cfg: from :func:`~retinanet_ext.engine.load_config`; completed in place

    Raises:
        InputError: a value or the data cannot be used, or no anchor is foreground
    """
    use_cpu_without_cuda(cfg, num_threads=torch.get_num_threads())
    check_config(cfg, num_processes=1, eval_only=False)
    cfg.DATASETS.TEST = ()
    cfg.DATASETS.CUSTOM.TEST_JSON = cfg.DATASETS.CUSTOM.TEST_IMAGES = ""
    prepare_datasets(cfg, eval_only=False)
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    objects = dict.fromkeys(names, 0)
    for record in records:
        for annotation in record["annotations"]:
            if not annotation.get("iscrowd", 0):
                objects[names[annotation["category_id"]]] += 1
    foreground, background = count_anchors(cfg, records)
    if not foreground:
        raise InputError(
            f"no anchor of {len(records)} images of {', '.join(cfg.DATASETS.TRAIN)} is foreground, "
            "so there is no imbalance to advise on; retinanet-ext check-data says why"
        )
    facts = DataFacts(len(records), objects, foreground, background)
    pretrained = cfg.MODEL.WEIGHTS or timm_weights(cfg)
    return facts, Situation(
        imbalance=background / foreground,
        images_seen=cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH,
        train_images=len(records),
        optimizer=cfg.SOLVER.OPTIMIZER,
        weights="pretrained" if pretrained else "random",
    )


def count_anchors(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean number of foreground and of background anchors per image.

    Args:
        cfg: the whole config, with the number of classes
        records: Detectron2's dataset dicts
    """
    backbone, grid = build_grid(cfg)
    shapes = [backbone.output_shape()[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
    generator = build_anchor_generator(cfg, shapes)
    node = cfg.MODEL.RETINANET
    matcher = AnchorMatcher(node.IOU_THRESHOLDS, node.IOU_LABELS, node.LOW_QUALITY_MATCHES)

    @cache
    def anchors_of(width: int, height: int) -> Boxes:
        sizes = [(-(-height // stride), -(-width // stride)) for stride in grid.strides]
        return Boxes.cat(generator([torch.empty(1, 1, *size) for size in sizes]))

    data = training_boxes(cfg, records[:: math.ceil(len(records) / MAX_IMAGES)], backbone)
    foreground = background = 0
    for index, size in enumerate(data.padded.tolist()):
        own = data.images == index
        boxes = Boxes(data.boxes[own].float())
        instances = Instances(tuple(size[::-1]), gt_boxes=boxes, gt_classes=data.labels[own])
        labels, _ = label_anchors(matcher, anchors_of(*size), [instances], node.NUM_CLASSES)
        foreground += int(is_foreground(labels, node.NUM_CLASSES).sum())
        background += int((labels == node.NUM_CLASSES).sum())
    return foreground / len(data.padded), background / len(data.padded)


def _film_of(run: str | Path, facts: DataFacts) -> Film:
    film = read_film(run)
    if list(film.classes) != list(facts.objects):
        raise InputError(
            f"{Path(run, LOSS_FILM)} is the film of another run: its classes are "
            f"{join_some(film.classes)}, and those of the data {join_some(facts.objects)}"
        )
    return film


def _describe_data(facts: DataFacts) -> str:
    classes = join_some(f"{name} {number}" for name, number in facts.objects.items())
    return (
        f"Data: {facts.images} training images, {sum(facts.objects.values())} objects ({classes}). "
        f"Per image {facts.foreground:.1f} anchors are foreground and {facts.background:.0f} "
        "background."
    )


def _describe_setting(setting: Setting) -> str:
    rows = [
        [row, ", ".join(f"{ap:.1f}" for ap in setting.rows[row]), f"{setting.mean(row):.1f}"]
        for row in sorted(setting.rows, key=setting.mean, reverse=True)
    ]
    table = tabulate(rows, ["loss", "AP by seed", "AP"], disable_numparse=True)
    return (
        f"The nearest measurement: {setting.name}\n({setting.situation}; {setting.source})"
        f"\n\n{table}"
    )


def _reason(row: str, setting: Setting) -> str:
    best = setting.best()
    if best == DEFAULT:
        return f"It is the default, and no other is ahead of it, {_measured_at(setting)}."
    other = best if row == DEFAULT else row
    lead = setting.mean(other) - setting.mean(DEFAULT)
    where = f"{_measured_at(setting)} ({_decision(setting, other)})"
    if row != DEFAULT:
        return f"It is {lead:.1f} AP ahead of the default, {DEFAULT}, {where}."
    return (
        f"It is the default. {best} is ahead of it by {lead:.1f} AP, {where}: less than "
        f"{MARGIN:g} AP, by which seeds differ."
    )


def _decision(setting: Setting, row: str) -> str:
    """Return what the seeds say of a row's lead over the default."""
    bounds = welch_interval(setting.rows[row], setting.rows[DEFAULT])
    if not bounds:
        return "one seed, which decides nothing"
    decides = "decides" if bounds[0] > 0 or bounds[1] < 0 else "does not decide"
    return f"95 % interval {interval(bounds)}, which {decides} it"


def _measured_at(setting: Setting) -> str:
    return f"measured at imbalance 1 : {setting.situation.imbalance} on {setting.name}"


def _describe_safest(advice: Advice, situation: Situation, settings: Sequence[Setting]) -> str:
    """Return the loss that loses least on comparable settings; empty if it is not far ahead."""
    pool = [setting for setting in comparable(situation, settings)[0] if setting.has_learnt]
    lost = {row: [*aps.values()] for row, aps in one_loss_everywhere(pool).items()}
    mean = {row: fmean(aps) for row, aps in lost.items()}
    row = min(mean, key=lambda row: mean[row], default=advice.row)
    if row == advice.row or mean[DEFAULT] - mean[row] < MARGIN:
        return ""
    behind = ""
    nearest = advice.setting
    if row in nearest.rows and nearest.mean(row) < nearest.mean(advice.row):
        ap = nearest.mean(advice.row) - nearest.mean(row)
        behind = f" In the nearest measurement it is {ap:.1f} AP behind the advice."
    return (
        f"The safest: {row}. On {len(lost[row])} of the {len(pool)} comparable settings, those "
        f"that have it, the default and cross entropy, it is {mean[row]:.1f} AP behind the best "
        f"loss in the mean and {max(lost[row]):.1f} at most; the default {mean[DEFAULT]:.1f} and "
        f"{max(lost[DEFAULT]):.1f}.{behind}"
    )


def _describe_class_alpha(
    situation: Situation, facts: DataFacts, settings: Sequence[Setting]
) -> str:
    """Return what is known of alpha per class; empty for a single class."""
    counts = facts.objects.values()
    pool = [s for s in comparable(situation, settings)[0] if CLASS_ALPHA in s.rows]
    if len(counts) < 2 or not pool:
        return ""
    nearest = min(pool, key=lambda setting: situation.distance(setting.situation))
    lead = nearest.mean(CLASS_ALPHA) - nearest.mean(DEFAULT)
    found = _decision(nearest, CLASS_ALPHA)
    return (
        f"Class alpha: the most frequent class has {max(counts) / max(min(counts), 1):.1f} times "
        "the objects of the rarest. MODEL.RETINANET.CLS_LOSS.CLASS_ALPHA auto brought "
        f"{signed(lead)} AP, {_measured_at(nearest)} ({found})."
    )


def _describe_film(film: Film) -> str:
    early, last = early_shares(film)["gradient"], film.shares["gradient"][-1]
    easy = last[2]
    what = "a larger gamma would take from them"
    if easy <= CONCENTRATED:
        what = "a larger gamma has little to take from them"

    def shares(values: Sequence[float]) -> str:
        if np.isnan(values).any():
            return "nothing was recorded"
        return ", ".join(
            f"{group} {100 * v:.1f} %" for group, v in zip(GROUPS, values, strict=True)
        )

    return (
        f"Film of {film.name} ({film.cls_loss}), shares of the gradient: in the first tenth "
        f"{shares(early)}; at iteration {film.iterations[-1]} {shares(last)}. Easy negatives carry "
        f"{'more' if easy > CONCENTRATED else 'no more'} than {100 * CONCENTRATED:.0f} %: {what}. "
        "The advice does not rest on the film: on BCCD the losses with more gradient on easy "
        "negatives ended higher from random weights and lower from pretrained ones "
        "(docs/results/replication.md)."
    )
