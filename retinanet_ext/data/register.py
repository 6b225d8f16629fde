"""From the config's data keys to entries of Detectron2's catalogs and the number of classes."""

from __future__ import annotations

import atexit
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import zip_longest
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from retinanet_ext.data import coco_json
from retinanet_ext.data.box_format import BOX_FORMATS
from retinanet_ext.data.check import (
    KINDS,
    CheckedData,
    check_coco,
    find_image_faults,
    read_policy,
    suggest_objects,
)
from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.data.sample_set import SampleSet, make_sample_set
from retinanet_ext.errors import InputError
from retinanet_ext.files import write_file

logger = logging.getLogger(__name__)

SAMPLE_SPLITS = {
    "retinanet_ext_sample_train": "train",
    "retinanet_ext_sample_val": "val",
}
"""Name in ``DATASETS.TRAIN`` or ``DATASETS.TEST`` to the part of the sample set."""


@dataclass(frozen=True)
class Source:
    """Where the data of one name are.

    Attributes:
        name: in Detectron2's catalogs.
        split: "TRAIN" or "TEST".
        json_file, image_root: empty where other code has registered data of another format.
        is_ours: whether it is registered here, and not by other code.
        box_format: of the json, a name in :data:`BOX_FORMATS`.
    """

    name: str
    split: str
    json_file: str
    image_root: str
    is_ours: bool
    box_format: str = "xywh"


def prepare_datasets(cfg: CfgNode, *, num_classes_is_set: bool, eval_only: bool) -> None:
    """Check and register the data that a config names, and take the number of classes from it.

    ``DATASETS.CUSTOM`` becomes the data sets "custom_train" and "custom_test" and replaces
    ``DATASETS.TRAIN`` and ``DATASETS.TEST``. The sample set is made at its first use.
    ``DATASETS.CHECK`` says what happens to what is wrong with either.
    ``MODEL.RETINANET.NUM_CLASSES`` is set to the number of class names.

    Args:
        cfg: changed in place. Calling again, in this or another process, changes nothing more.
            Where there are several processes, one on each machine calls this.
        num_classes_is_set: whether the person set NUM_CLASSES, so that it is compared and not
            replaced.
        eval_only: whether only the data of ``DATASETS.TEST`` are used.

    Raises:
        InputError: a data set is unknown, missing, empty, or has a fault that is refused, class
            lists differ, or NUM_CLASSES disagrees with them.
    """
    needed = "TEST" if eval_only else "TRAIN"
    sources = find_sources(cfg, ["TEST"] if eval_only else ["TRAIN", "TEST"])
    if not any(source.split == needed for source in sources):
        raise InputError(
            f"DATASETS.{needed} is empty; name a registered data set, or COCO-format data by "
            f"DATASETS.CUSTOM.{needed}_JSON and DATASETS.CUSTOM.{needed}_IMAGES"
        )
    for source in sources:
        if source.is_ours:
            _register(cfg, source)
    for split in {source.split for source in sources}:
        cfg.DATASETS[split] = tuple(source.name for source in sources if source.split == split)

    names = dict.fromkeys(source.name for source in sources)
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    known = {name: labels for name, labels in classes.items() if labels is not None}
    if known:  # else registered by code that reads its data only when training starts
        _set_num_classes(cfg, known, num_classes_is_set=num_classes_is_set)
    for source in sources:
        _check_files_exist(source)


def find_sources(cfg: CfgNode, splits: Sequence[str]) -> list[Source]:
    """Return the data that a config names for "TRAIN", "TEST" or both, unchecked.

    Raises:
        InputError: a name that is not registered, half of a pair of ``DATASETS.CUSTOM``, or a
            format of boxes that is not known
    """
    return [source for split in splits for source in _find_sources(cfg, split)]


def _find_sources(cfg: CfgNode, split: str) -> Iterator[Source]:
    keys = {f"DATASETS.CUSTOM.{split}_{part}": part for part in ("JSON", "IMAGES")}
    values = {key: cfg.DATASETS.CUSTOM[f"{split}_{part}"] for key, part in keys.items()}
    missing = [key for key, value in values.items() if not value]
    if len(missing) == 1:
        given = next(key for key in keys if key not in missing)
        raise InputError(f"{given} is {values[given]!r}, but {missing[0]} is empty; set both")
    if not missing:
        json_file, image_root = values.values()
        box_format = cfg.DATASETS.CUSTOM.BOX_FORMAT
        if box_format not in BOX_FORMATS:
            known = ", ".join(map(repr, BOX_FORMATS))
            raise InputError(
                f"DATASETS.CUSTOM.BOX_FORMAT {box_format!r} is unknown; known: {known}"
            )
        name = f"custom_{split.lower()}"
        yield Source(name, split, json_file, image_root, is_ours=True, box_format=box_format)
        return
    for name in cfg.DATASETS[split]:
        if name in SAMPLE_SPLITS:
            datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
            parameters = SampleSet.from_config(cfg.DATASETS.SAMPLE)
            folder = make_sample_set(parameters, os.path.join(datasets, "retinanet_ext_sample"))
            part = SAMPLE_SPLITS[name]
            yield Source(
                name, split, str(folder / f"{part}.json"), str(folder / part), is_ours=True
            )
        elif name in DatasetCatalog:
            metadata = MetadataCatalog.get(name)
            json_file = metadata.get("json_file") or ""
            image_root = metadata.get("image_root") or ""
            yield Source(name, split, json_file, image_root, is_ours=False)
        else:
            close = get_close_matches(name, DatasetCatalog.list(), n=1)
            raise InputError(
                f"DATASETS.{split} names {name!r}, which is not registered"
                + (f" (did you mean {close[0]!r}?)" if close else "")
                + f"; for COCO-format data set DATASETS.CUSTOM.{split}_JSON and "
                f"DATASETS.CUSTOM.{split}_IMAGES"
            )


def _register(cfg: CfgNode, source: Source) -> None:
    """Check COCO-format data and register what is used of them, in place of what had the name."""
    content = coco_json.read_coco_json(source.json_file)
    policy = read_policy(cfg.DATASETS.CHECK)
    image_faults = find_image_faults(content, source.image_root, cfg.INPUT.FORMAT)
    checked = check_coco(source.json_file, content, policy, image_faults, source.box_format)
    checked.raise_refused()
    _log(cfg, source, checked)

    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(source.name, None)
    # Kept as bytes: small, and each reader gets a copy of its own.
    records = pickle.dumps(coco_json.to_dataset_dicts(checked.content, source.image_root))
    DatasetCatalog.register(source.name, partial(pickle.loads, records))
    MetadataCatalog.get(source.name).set(
        evaluator_type="coco",
        json_file=_for_evaluation(checked) if source.split == "TEST" else source.json_file,
        image_root=source.image_root,
        num_images=len(checked.content["images"]),
        num_crowd_regions=sum(map(coco_json.is_region_to_ignore, checked.content["annotations"])),
        thing_classes=coco_json.class_names(checked.content),
        thing_dataset_id_to_contiguous_id=coco_json.contiguous_category_ids(checked.content),
    )


def _log(cfg: CfgNode, source: Source, checked: CheckedData) -> None:
    """Log what is in the data and what was found, and refuse training data without boxes."""
    content, name = checked.content, source.name
    objects = [a for a in content["annotations"] if not coco_json.is_region_to_ignore(a)]
    if not objects:
        what = f"{source.json_file}: has no box that is no crowd and has an area inside its image"
        remedy = suggest_objects(checked.policy, len(checked.by_kind().get("crowd", [])))
        if source.split == "TRAIN":
            raise InputError(f"{what}, so there is nothing to learn{remedy}")
        logger.warning("%s, so AP cannot be computed%s", what, remedy)

    names = coco_json.class_names(content)
    labels = coco_json.contiguous_category_ids(content)
    counts = Counter(labels[annotation["category_id"]] for annotation in objects)
    logger.info(
        "%s: %d images, %d boxes, %d regions to ignore, %d classes (%s) from %s",
        name,
        len(content["images"]),
        len(objects),
        len(content["annotations"]) - len(objects),
        len(names),
        join_some(f"{printable(a_class)} {counts[label]}" for label, a_class in enumerate(names)),
        source.json_file,
    )
    if list(labels) != list(range(1, len(labels) + 1)):
        logger.info(
            "%s: category ids %s stand for classes 0..%d", name, join_some(labels), len(labels) - 1
        )
    for kind, findings in checked.by_kind().items():
        dropped = checked.policy[kind] == "drop"
        logger.log(
            logging.WARNING if dropped or KINDS[kind].is_fault else logging.INFO,
            "%s: %s%s: %d: %s",
            source.json_file,
            checked.describe(kind),
            ", left out" if dropped else _use_of(cfg, source, kind),
            len(findings),
            join_some((finding.message for finding in findings), 3, separator="; "),
        )


def _use_of(cfg: CfgNode, source: Source, kind: str) -> str:
    """Return what becomes of findings that are kept, where their kind does not say it."""
    if kind != "empty_image" or source.split != "TRAIN":
        return ""
    filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    what = "left out" if filtered else "trained on as background"
    return f", {what} (DATALOADER.FILTER_EMPTY_ANNOTATIONS {filtered})"


def _for_evaluation(checked: CheckedData) -> str:
    """Return the json that the evaluation reads: the person's own, or a completed copy.

    The copy has what is used alone. It is this process's own and is deleted at its end, so it can
    neither be stale nor be half written by another process.
    """
    completed = coco_json.complete_for_evaluation(checked.content)
    lists = (completed[key] == checked.original[key] for key in coco_json.LISTS)
    if completed is checked.content and all(lists):
        return checked.json_file
    folder = tempfile.mkdtemp(prefix="retinanet_ext_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder, os.path.basename(checked.json_file))
    write_file(copy, json.dumps(completed))
    return str(copy)


def _set_num_classes(
    cfg: CfgNode, classes: Mapping[str, Sequence[str]], *, num_classes_is_set: bool
) -> None:
    if difference := compare_classes(classes):
        raise InputError(difference)
    first, names = next(iter(classes.items()))
    configured = cfg.MODEL.RETINANET.NUM_CLASSES
    if num_classes_is_set and configured != len(names):
        raise InputError(
            f"MODEL.RETINANET.NUM_CLASSES is {configured}, but {first} has {len(names)} classes "
            f"({join_some(map(printable, names))}); leave the key out, it is taken from the data"
        )
    cfg.MODEL.RETINANET.NUM_CLASSES = len(names)


def compare_classes(classes: Mapping[str, Sequence[str]]) -> str | None:
    """Return in one sentence where the class names of data sets differ first, if they do.

    Args:
        classes: name of a data set -> names of its classes 0..K-1; one at least
    """
    (first, expected_names), *others = classes.items()
    for other, found_names in others:
        pairs = zip_longest(expected_names, found_names, fillvalue="missing")
        for label, (expected, found) in enumerate(pairs):
            if expected != found:
                return (
                    f"data sets {first} and {other} must have the same classes in the same order "
                    f"of category ids, but class {label} is {expected!r} in {first} "
                    f"({len(expected_names)} classes) and {found!r} in {other} "
                    f"({len(found_names)} classes)"
                )
    return None


def _check_files_exist(source: Source) -> None:
    for path in (source.json_file, source.image_root):
        if path and "://" not in path and not os.path.exists(path):
            raise InputError(
                f"{path}, which data set {source.name} needs, does not exist; the environment "
                "variable DETECTRON2_DATASETS names the folder of Detectron2's data sets, and is "
                f"{os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')}"
            )
