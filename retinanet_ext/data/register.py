"""From the config's data keys to entries of Detectron2's catalogs and the number of classes."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from difflib import get_close_matches
from functools import partial
from itertools import zip_longest
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from retinanet_ext.data import coco_json
from retinanet_ext.data.coco_json import join_some
from retinanet_ext.data.sample_set import SampleSet, make_sample_set
from retinanet_ext.errors import InputError

logger = logging.getLogger(__name__)

SAMPLE_SPLITS = {
    "retinanet_ext_sample_train": "train",
    "retinanet_ext_sample_val": "val",
}
"""Name in ``DATASETS.TRAIN`` or ``DATASETS.TEST`` to the part of the sample set."""


def prepare_datasets(cfg: CfgNode, *, num_classes_is_set: bool, eval_only: bool) -> None:
    """Check and register the data that a config names, and take the number of classes from it.

    ``DATASETS.CUSTOM`` becomes the data sets "custom_train" and "custom_test" and replaces
    ``DATASETS.TRAIN`` and ``DATASETS.TEST``. The sample set is made at its first use.
    ``MODEL.RETINANET.NUM_CLASSES`` is set to the number of class names.

    Args:
        cfg: changed in place. Calling again, in this or another process, changes nothing more.
        num_classes_is_set: whether the person set NUM_CLASSES, so that it is compared and not
            replaced.
        eval_only: whether only the data of ``DATASETS.TEST`` are used.

    Raises:
        InputError: a data set is unknown, missing, damaged or empty, class lists differ, or
            NUM_CLASSES disagrees with them.
    """
    splits = ["TEST"] if eval_only else ["TRAIN", "TEST"]
    for split in splits:
        _use_custom(cfg, split)
    used = {split: tuple(cfg.DATASETS[split]) for split in splits}
    needed = "TEST" if eval_only else "TRAIN"
    if not used[needed]:
        raise InputError(
            f"DATASETS.{needed} is empty; name a registered data set, or COCO-format data by "
            f"DATASETS.CUSTOM.{needed}_JSON and DATASETS.CUSTOM.{needed}_IMAGES"
        )
    for split, names in used.items():
        for name in names:
            if name in SAMPLE_SPLITS:
                _register_sample_set(cfg, name, split)
            elif name not in DatasetCatalog:
                close = get_close_matches(name, DatasetCatalog.list(), n=1)
                raise InputError(
                    f"DATASETS.{split} names {name!r}, which is not registered"
                    + (f" (did you mean {close[0]!r}?)" if close else "")
                    + f"; for COCO-format data set DATASETS.CUSTOM.{split}_JSON and "
                    f"DATASETS.CUSTOM.{split}_IMAGES"
                )

    all_names = list(dict.fromkeys(name for names in used.values() for name in names))
    _set_num_classes(cfg, all_names, num_classes_is_set=num_classes_is_set)
    for name in all_names:
        _check_files_exist(name)


def register_coco_json(
    cfg: CfgNode, name: str, json_file: str, image_root: str, *, split: str
) -> None:
    """Check COCO-format data and register them under ``name``, in place of what had that name.

    Args:
        cfg: the image format and what happens to images without objects are read from it.
        name: of the data set in Detectron2's catalogs.
        json_file: in COCO's instances format.
        image_root: the folder that the json's file names are relative to.
        split: "TRAIN" or "TEST"; training needs at least one box.
    """
    content = coco_json.read_coco_json(json_file)
    coco_json.check_images(
        json_file,
        content,
        image_root,
        image_format=cfg.INPUT.FORMAT,
        # Where there are several processes, the one that started them has done it.
        decode=comm.get_world_size() == 1,
    )
    _summarize(cfg, name, json_file, content, split=split)

    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name, None)
    DatasetCatalog.register(name, partial(coco_json.load_dataset_dicts, json_file, image_root))
    MetadataCatalog.get(name).set(
        evaluator_type="coco",
        json_file=_for_evaluation(json_file, content),
        image_root=image_root,
        thing_classes=coco_json.class_names(content),
        thing_dataset_id_to_contiguous_id=coco_json.contiguous_category_ids(content),
    )


def _use_custom(cfg: CfgNode, split: str) -> None:
    keys = {f"DATASETS.CUSTOM.{split}_{part}": part for part in ("JSON", "IMAGES")}
    values = {key: cfg.DATASETS.CUSTOM[f"{split}_{part}"] for key, part in keys.items()}
    missing = [key for key, value in values.items() if not value]
    if len(missing) == 1:
        given = next(key for key in keys if key not in missing)
        raise InputError(f"{given} is {values[given]!r}, but {missing[0]} is empty; set both")
    if not missing:
        name = f"custom_{split.lower()}"
        register_coco_json(cfg, name, *values.values(), split=split)
        cfg.DATASETS[split] = (name,)


def _register_sample_set(cfg: CfgNode, name: str, split: str) -> None:
    datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    parameters = SampleSet.from_config(cfg.DATASETS.SAMPLE)
    folder = make_sample_set(parameters, os.path.join(datasets, "retinanet_ext_sample"))
    part = SAMPLE_SPLITS[name]
    register_coco_json(cfg, name, str(folder / f"{part}.json"), str(folder / part), split=split)


def _summarize(
    cfg: CfgNode, name: str, json_file: str, content: dict[str, Any], *, split: str
) -> None:
    """Log what is in the data, warn of what is not used, and refuse data without any."""
    images = content["images"]
    without_area = coco_json.boxes_without_area(content)
    dropped = {annotation["id"] for annotation in without_area}
    crowd = [a for a in content["annotations"] if a.get("iscrowd", 0)]
    objects = [
        a for a in content["annotations"] if not a.get("iscrowd", 0) and a["id"] not in dropped
    ]
    if not objects:
        what = f"{json_file}: has no box that is no crowd and has an area inside its image"
        if split == "TRAIN":
            raise InputError(f"{what}, so there is nothing to learn")
        logger.warning("%s, so AP cannot be computed", what)

    names = coco_json.class_names(content)
    labels = coco_json.contiguous_category_ids(content)
    counts = Counter(labels[annotation["category_id"]] for annotation in objects)
    logger.info(
        "%s: %d images, %d boxes, %d crowd regions, %d classes (%s) from %s",
        name,
        len(images),
        len(objects),
        len(crowd),
        len(names),
        join_some(f"{class_name} {counts[label]}" for label, class_name in enumerate(names)),
        json_file,
    )
    if list(labels) != list(range(1, len(labels) + 1)):
        logger.info(
            "%s: category ids %s stand for classes 0..%d", name, join_some(labels), len(labels) - 1
        )
    num_empty = len(images) - len({annotation["image_id"] for annotation in objects})
    if num_empty and split == "TRAIN":
        logger.info(
            "%s: %d images without objects are %s (DATALOADER.FILTER_EMPTY_ANNOTATIONS %s)",
            name,
            num_empty,
            "left out" if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else "trained on as background",
            cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        )
    if without_area:
        logger.warning(
            "%s: %d boxes without area inside their image are left out of training: %s",
            json_file,
            len(without_area),
            join_some(f"annotation {a['id']} (image {a['image_id']})" for a in without_area),
        )
    outside = coco_json.boxes_reaching_outside(content)
    if outside:
        logger.warning(
            "%s: %d boxes reach outside their image and are clipped in training",
            json_file,
            len(outside),
        )


def _for_evaluation(json_file: str, content: dict[str, Any]) -> str:
    """Return the json that the evaluation reads: the person's own, or a completed copy.

    The copy is this process's own and is deleted at its end, so it can neither be stale nor be
    half written by another process.
    """
    completed = coco_json.complete_for_evaluation(content)
    if completed is None:
        return json_file
    folder = tempfile.mkdtemp(prefix="retinanet_ext_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = os.path.join(folder, os.path.basename(json_file))
    with open(copy, "w", encoding="utf-8") as file:
        json.dump(completed, file)
    return copy


def _set_num_classes(cfg: CfgNode, names: list[str], *, num_classes_is_set: bool) -> None:
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    known = [name for name in names if classes[name] is not None]
    if not known:
        return  # registered by code that reads its data only when training starts
    first = known[0]
    for other in known[1:]:
        pairs = zip_longest(classes[first], classes[other], fillvalue="missing")
        for label, (expected, found) in enumerate(pairs):
            if expected != found:
                raise InputError(
                    f"data sets {first} and {other} must have the same classes in the same order "
                    f"of category ids, but class {label} is {expected!r} in {first} "
                    f"({len(classes[first])} classes) and {found!r} in {other} "
                    f"({len(classes[other])} classes)"
                )
    num_classes = len(classes[first])
    configured = cfg.MODEL.RETINANET.NUM_CLASSES
    if num_classes_is_set and configured != num_classes:
        raise InputError(
            f"MODEL.RETINANET.NUM_CLASSES is {configured}, but {first} has "
            f"{num_classes} classes ({join_some(classes[first])}); leave the key out, it is taken "
            "from the data"
        )
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes


def _check_files_exist(name: str) -> None:
    metadata = MetadataCatalog.get(name)
    for path in (metadata.get("json_file"), metadata.get("image_root")):
        if path and "://" not in path and not os.path.exists(path):
            raise InputError(
                f"{path}, which data set {name} needs, does not exist; the environment variable "
                "DETECTRON2_DATASETS names the folder of Detectron2's data sets, and is "
                f"{os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')}"
            )
