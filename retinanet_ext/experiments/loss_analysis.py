"""Measure how the loss of a checkpoint concentrates on hard anchors of a data set (figure 4)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes
from detectron2.utils.logger import log_every_n_seconds
from tabulate import tabulate
from torch import Tensor

import retinanet_ext
from retinanet_ext.analysis.loss_cdf import (
    FRACTIONS,
    GAMMAS,
    READINGS,
    SIDES,
    LossCurve,
    WindowSample,
    conclude,
    paper_share,
)
from retinanet_ext.analysis.plots import figure_4, save_figure
from retinanet_ext.data import CheckedDatasetMapper, prepare_datasets
from retinanet_ext.data.images import ImageReader
from retinanet_ext.data.register import registered_classes
from retinanet_ext.engine import Checkpointer, load_config
from retinanet_ext.engine.config_check import check_config, config_errors, use_cpu_without_cuda
from retinanet_ext.errors import InputError
from retinanet_ext.files import make_folder, to_json, write_file
from retinanet_ext.losses import Interval
from retinanet_ext.modeling import RetinaNetExt
from retinanet_ext.modeling.matching import label_anchors

FORMAT = 1
RESULT = "loss_cdf"
COLUMNS = (("positive", 0.2), ("negative", 0.01), ("negative", 0.2))


def analyze_loss(
    config_file: str,
    weights: str,
    opts: Sequence[str] = (),
    *,
    dataset: str = "test",
    num_images: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
) -> str:
    """Measure figure 4 on a data set and write ``loss_cdf.json``, ``.svg`` and ``.png``.

    Images come in random order, as in evaluation. The model's own matcher labels the anchors.

    Args:
        config_file, opts: the config the weights were trained with, as for training
        weights: the checkpoint
        dataset: ``train`` or ``test``, for the images of ``DATASETS.TRAIN`` or ``DATASETS.TEST``
        num_images: maximum number of images; all by default
        seed: of the order of images and of the sample
        output: folder; ``loss_cdf-<dataset>`` beside the weights by default

    Returns:
        the result as text: tables, the files, and as its last line what it means for gamma

    Raises:
        InputError: a value, file, checkpoint or output that cannot be used, data without objects
    """
    Interval("[1, inf)").check("--num-images", 1 if num_images is None else num_images)
    Interval("[0, inf)").check("--seed", seed)
    if "://" not in weights and not Path(weights.partition("?")[0]).is_file():
        raise InputError(f"--weights {weights!r} is not a file")
    folder = _choose_folder(output, weights, dataset)
    cfg = _prepare_config(config_file, opts, dataset)
    images = _choose_images(cfg, dataset, num_images, seed)
    model = _load_model(cfg, weights, dataset)
    make_folder(folder)  # now, because the measuring may take hours

    sample = WindowSample(seed=seed)
    workers = cfg.DATALOADER.NUM_WORKERS
    loader = build_detection_test_loader(images, mapper=_make_mapper(cfg), num_workers=workers)
    sample_windows(model, loader, len(images), sample)
    curves = sample.curves()
    names = list(cfg.DATASETS[dataset.upper()])
    where = f"on {len(images)} images of {', '.join(names)}, weights {weights}"
    text = f"Loss without alpha {where}\n\n{format_tables(curves)}"
    facts = {
        "config_file": config_file,
        "opts": list(opts),
        "weights": weights,
        "dataset": names,
        "num_images": len(images),
        "seed": seed,
        "text": text,
        "conclusion": conclude(curves),
    }
    files = [f"Wrote {path}" for path in _write(folder, facts, curves)]
    return "\n".join([text, "", *files, "", facts["conclusion"]])


def _prepare_config(config_file: str, opts: Sequence[str], dataset: str) -> CfgNode:
    cfg = load_config(config_file, opts)
    use_cpu_without_cuda(cfg, num_threads=torch.get_num_threads())
    check_config(cfg, num_processes=1, eval_only=True)
    prepare_datasets(cfg, eval_only=dataset == "test")
    return cfg


def _write(folder: Path, facts: dict[str, Any], curves: Sequence[LossCurve]) -> list[Path]:
    """Write the pictures, then the JSON file, and return all paths."""
    json_file, *pictures = _files(folder)
    for path in pictures:
        save_figure(figure_4(curves), path)
    content = {
        "format": FORMAT,
        "version": retinanet_ext.__version__,
        **facts,
        "fractions": FRACTIONS.tolist(),
        "curves": [
            {**asdict(curve), "cdf": [float(f"{share:.6g}") for share in curve.cdf]}
            for curve in curves
        ],
    }
    write_file(json_file, to_json(content, indent=1, ensure_ascii=False))
    return [json_file, *pictures]


@torch.no_grad()
def sample_windows(
    model: DenseDetector,
    batches: Iterable[list[dict[str, Any]]],
    num_images: int,
    sample: WindowSample,
) -> None:
    """Run the model over images and add their anchors to a sample.

    Args:
        model: a RetinaNet, this plugin's or Detectron2's; put in evaluation mode
        batches: one image each, with ``instances``
        num_images: for the progress log
        sample: modified in place

    Raises:
        InputError: the model's output is not finite
    """
    model.eval()
    for done, (inputs,) in enumerate(batches, start=1):
        logits, anchors = predict_logits(model, inputs)
        if not logits.isfinite().all():
            raise InputError(
                f"the model's output on image {inputs['file_name']} is not finite: "
                "the training of these weights has diverged"
            )
        instances = inputs["instances"].to(model.device)
        (labels,), _ = label_anchors(model.anchor_matcher, anchors, [instances], model.num_classes)
        sample.add(logits, labels)
        log_every_n_seconds(logging.INFO, f"{done} of {num_images} images", 10, name=__name__)


def predict_logits(model: DenseDetector, inputs: dict[str, Any]) -> tuple[Tensor, Boxes]:
    """Return the logits of an image's anchors, (R, K), and the anchors."""
    images = model.preprocess_image([inputs])
    levels = model.backbone(images.tensor)
    features = [levels[name] for name in model.head_in_features]
    logits, _ = model._transpose_dense_predictions(model.head(features), [model.num_classes, 4])
    return torch.cat(logits, dim=1)[0], Boxes.cat(model.anchor_generator(features))


def format_tables(curves: Sequence[LossCurve]) -> str:
    """Return one table per reading: the shares of the hardest windows beside the paper's."""
    by_key = {(curve.reading, curve.side, curve.gamma): curve for curve in curves}
    header = ["γ"]
    for side, fraction in COLUMNS:
        header += [f"hardest {100 * fraction:g} %\nof {side}s", "in the\npaper"]
    parts = []
    for reading, window in READINGS.items():
        rows = []
        for gamma in GAMMAS:
            row = [f"{gamma:g}"]
            for side, fraction in COLUMNS:
                measured = by_key[reading, side, gamma].hardest[fraction]
                paper = paper_share(side, gamma, fraction)
                row += [f"{100 * measured:.1f} %", f"{100 * paper:.1f} %"]
            rows.append(row)
        counts = ", ".join(_count(by_key[reading, side, GAMMAS[0]]) for side in SIDES)
        table = tabulate(rows, header, stralign="right", disable_numparse=True)
        parts.append(f"Window: {window} ({counts})\nShare of the loss carried by the\n{table}")
    return "\n\n".join(parts)


def _count(curve: LossCurve) -> str:
    sampled = "" if curve.sampled == curve.seen else f", {curve.sampled} of them sampled"
    return f"{curve.seen} {curve.side}s{sampled}"


def _files(folder: Path) -> list[Path]:
    return [folder / f"{RESULT}{suffix}" for suffix in (".json", ".svg", ".png")]


def _choose_folder(output: str | Path | None, weights: str, dataset: str) -> Path:
    if not output and "://" in weights:
        raise InputError(f"--weights {weights} have no folder here; name one with --output")
    folder = Path(output or Path(weights.partition("?")[0]).parent / f"{RESULT}-{dataset}")
    for path in _files(folder):
        if path.exists():
            raise InputError(f"{path} is an earlier result; name another folder with --output")
    return folder


def _choose_images(
    cfg: CfgNode, dataset: str, num_images: int | None, seed: int
) -> list[dict[str, Any]]:
    """Return images in random order; for ``train`` only those that training uses."""
    names = cfg.DATASETS[dataset.upper()]
    images = get_detection_dataset_dicts(
        names, filter_empty=dataset == "train" and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    order = np.random.default_rng(seed).permutation(len(images))[:num_images]
    chosen = [images[index] for index in order if "annotations" in images[index]]
    if not any(not box.get("iscrowd", 0) for image in chosen for box in image["annotations"]):
        raise InputError(
            f"no object is annotated in {len(order)} images of {', '.join(names)}, so there are no "
            "positives to analyze"
        )
    return chosen


def _make_mapper(cfg: CfgNode) -> CheckedDatasetMapper:
    """Return the mapper of evaluation, with annotations kept."""
    return CheckedDatasetMapper(
        is_train=True,
        augmentations=build_augmentation(cfg, is_train=False),
        image_format=cfg.INPUT.FORMAT,
        reader=ImageReader.from_config(cfg),
    )


def _load_model(cfg: CfgNode, weights: str, dataset: str) -> DenseDetector:
    with config_errors():
        model = build_model(cfg)
    if not isinstance(model, (RetinaNetExt, RetinaNet)):
        raise InputError(
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} does not label anchors by IoU; "
            "RetinaNetExt and RetinaNet can be analyzed"
        )
    class_names = registered_classes(cfg, dataset.upper())
    Checkpointer(model, complete=True, class_names=class_names).load(weights)
    return model
