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
from difflib import get_close_matches
from functools import partial
from itertools import zip_longest
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from retinanet_ext.config_keys import resolve_class_alpha
from retinanet_ext.data import coco_json, images
from retinanet_ext.data.box_format import BOX_FORMATS
from retinanet_ext.data.coco_json import join_some, printable
from retinanet_ext.data.file_names import MisnamedFiles
from retinanet_ext.data.image_files import describe_shared_files
from retinanet_ext.data.sample_set import SampleSet, make_sample_set
from retinanet_ext.data.sources import CLASSES_KEY, Source, check_source, read_texts
from retinanet_ext.data.validation import DONE, KINDS, CheckedData, suggest_objects
from retinanet_ext.errors import InputError
from retinanet_ext.files import write_file

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
    ``DATASETS.CHECK`` says what happens to what is wrong with either.
    ``MODEL.RETINANET.NUM_CLASSES`` is set to the number of class names, and in
    ``CLS_LOSS.CLASS_ALPHA`` names become numbers.

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
    resolve_pixel_range(cfg, sources)
    paths = {source: _register(cfg, source) for source in sources if source.is_ours}
    for split in {source.split for source in sources}:
        cfg.DATASETS[split] = tuple(source.name for source in sources if source.split == split)

    names = dict.fromkeys(source.name for source in sources)
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    known = {name: labels for name, labels in classes.items() if labels is not None}
    if known:  # else registered by code that reads its data only when training starts
        set_num_classes(cfg, known, num_classes_is_set=num_classes_is_set)
    indices = [str(index) for index in range(cfg.MODEL.RETINANET.NUM_CLASSES)]
    resolve_class_alpha(cfg, next(iter(known.values()), indices))
    for source in sources:
        _check_files_exist(source)
    for line in describe_shared_images(paths):
        logger.warning("%s", line)


def resolve_pixel_range(cfg: CfgNode, sources: Sequence[Source]) -> None:
    """Set ``INPUT.PIXEL_RANGE percentiles`` to the two numbers that it is of the training data."""
    training = [source for source in sources if source.split == "TRAIN"]
    if not training or images.parse_pixel_range(cfg.INPUT.PIXEL_RANGE) != images.PERCENTILES:
        return
    for source in training:
        _check_files_exist(source)
    mends = cfg.DATASETS.CHECK.MISNAMED_FILE == "mend"
    files = [file for source in training for file in _image_files(source, mends=mends)]
    cfg.INPUT.PIXEL_RANGE = images.measure_pixel_range(files, cfg.INPUT.MAX_PIXELS)
    logger.info("INPUT.PIXEL_RANGE percentiles: %s", cfg.INPUT.PIXEL_RANGE)


def _image_files(source: Source, *, mends: bool) -> Iterator[str]:
    """Yield the paths of a data set's images, of a json that is still unchecked too."""
    if not source.is_ours:
        yield from (record["file_name"] for record in DatasetCatalog.get(source.name))
        return
    for json_file, image_root in zip(source.json_files, source.image_roots, strict=True):
        others = MisnamedFiles(image_root) if mends and os.path.isdir(image_root) else None
        for entry in coco_json.read_coco_json(json_file)["images"]:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                continue
            if others and not os.path.isfile(os.path.join(image_root, name)):
                match = others.find(name)
                name = (match and match.path) or name
            yield os.path.join(image_root, name)


def find_sources(cfg: CfgNode, splits: Sequence[str]) -> list[Source]:
    """Return the data that a config names for "TRAIN", "TEST" or both, unchecked.

    Raises:
        InputError: a name that is not registered, half of a pair of ``DATASETS.CUSTOM``, or a
            format of boxes that is not known
    """
    return [source for split in splits for source in _find_sources(cfg, split)]


def _find_sources(cfg: CfgNode, split: str) -> Iterator[Source]:
    keys = [f"DATASETS.CUSTOM.{split}_{part}" for part in ("JSON", "IMAGES")]
    values = {key: read_texts(cfg, key) for key in keys}
    missing = [key for key, value in values.items() if not value]
    if len(missing) == 1:
        given = next(key for key in keys if key not in missing)
        raise InputError(
            f"{given} is {join_some(values[given])!r}, but {missing[0]} is empty; set both"
        )
    if not missing:
        json_files, image_roots = values.values()
        if len(image_roots) == 1:
            image_roots *= len(json_files)
        if len(image_roots) != len(json_files):
            raise InputError(
                f"{keys[0]} has {len(json_files)} entries and {keys[1]} {len(image_roots)}; give "
                "a folder for each file, or one for all"
            )
        classes = read_texts(cfg, CLASSES_KEY)
        box_format = cfg.DATASETS.CUSTOM.BOX_FORMAT
        if box_format not in BOX_FORMATS:
            known = ", ".join(map(repr, BOX_FORMATS))
            raise InputError(
                f"DATASETS.CUSTOM.BOX_FORMAT {box_format!r} is unknown; known: {known}"
            )
        yield Source(
            f"custom_{split.lower()}",
            split,
            json_files,
            image_roots,
            is_ours=True,
            classes=classes,
            box_format=box_format,
        )
        return
    for name in cfg.DATASETS[split]:
        if name in SAMPLE_SPLITS:
            datasets = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
            parameters = SampleSet.from_config(cfg.DATASETS.SAMPLE)
            folder = make_sample_set(parameters, os.path.join(datasets, "retinanet_ext_sample"))
            part = SAMPLE_SPLITS[name]
            yield Source(
                name, split, (str(folder / f"{part}.json"),), (str(folder / part),), is_ours=True
            )
        elif name in DatasetCatalog:
            metadata = MetadataCatalog.get(name)
            json_files, image_roots = (
                (value,) if (value := metadata.get(key)) else ()
                for key in ("json_file", "image_root")
            )
            yield Source(name, split, json_files, image_roots, is_ours=False)
        else:
            close = get_close_matches(name, DatasetCatalog.list(), n=1)
            raise InputError(
                f"DATASETS.{split} names {name!r}, which is not registered"
                + (f" (did you mean {close[0]!r}?)" if close else "")
                + f"; for COCO-format data set DATASETS.CUSTOM.{split}_JSON and "
                f"DATASETS.CUSTOM.{split}_IMAGES"
            )


def _register(cfg: CfgNode, source: Source) -> list[str]:
    """Check COCO-format data and register what is used of them, in place of what had the name.

    Returns:
        the paths of the images.
    """
    checked = check_source(cfg, source)
    checked.raise_refused()
    _log(cfg, source, checked)

    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(source.name, None)
    # Kept as bytes: small, and each reader gets a copy of its own.
    records = coco_json.to_dataset_dicts(checked.content, checked.image_root)
    annotations = checked.content["annotations"]
    objects = Counter(a["image_id"] for a in annotations if not coco_json.is_region_to_ignore(a))
    DatasetCatalog.register(source.name, partial(pickle.loads, pickle.dumps(records)))
    MetadataCatalog.get(source.name).set(
        evaluator_type="coco",
        json_file=_for_evaluation(checked) if source.split == "TEST" else source.json_file,
        image_root=checked.image_root,
        num_images=len(checked.content["images"]),
        num_crowd_regions=sum(map(coco_json.is_region_to_ignore, annotations)),
        images_by_num_objects=dict(Counter(objects.values())),
        thing_classes=coco_json.class_names(checked.content),
        thing_dataset_id_to_contiguous_id=coco_json.contiguous_category_ids(checked.content),
    )
    return [record["file_name"] for record in records]


def _log(cfg: CfgNode, source: Source, checked: CheckedData) -> None:
    """Log what is in the data and what was found, and refuse training data without boxes."""
    content, name = checked.content, source.name
    objects = [a for a in content["annotations"] if not coco_json.is_region_to_ignore(a)]
    if not objects:
        what = f"{source.json_file}: has no box that is no crowd and has an area inside its image"
        remedy = suggest_objects(checked.policy, len(checked.by_kind().get("crowd", [])))
        if source.split == "TRAIN":
            raise InputError(f"{what}, so there is nothing to learn{remedy}")
        if checked.is_labelled:
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
    for note in checked.notes:
        logger.info("%s: %s", source.json_file, note)
    for kind, findings in checked.by_kind().items():
        done = checked.policy[kind]
        logger.log(
            logging.WARNING if done == "drop" or KINDS[kind].is_fault else logging.INFO,
            "%s: %s%s: %d: %s",
            source.json_file,
            checked.describe(kind),
            _use_of(cfg, source, kind) if done in ("keep", "object") else f", {DONE[done]}",
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
    if not checked.is_labelled:  # told by the missing list
        completed = {key: value for key, value in completed.items() if key != "annotations"}
    if completed == checked.original and coco_json.is_plain_utf8(checked.json_file):
        return checked.json_file
    folder = tempfile.mkdtemp(prefix="retinanet_ext_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder, "instances.json")
    write_file(copy, json.dumps(completed))
    return str(copy)


def set_num_classes(
    cfg: CfgNode, classes: Mapping[str, Sequence[str]], *, num_classes_is_set: bool
) -> None:
    """Set ``MODEL.RETINANET.NUM_CLASSES`` to the number of classes of the data.

    Args:
        cfg: changed in place
        classes: name of a data set -> names of its classes 0..K-1; one at least
        num_classes_is_set: compare instead

    Raises:
        InputError: data sets have other classes than each other, or another number than is set
    """
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


def registered_classes(cfg: CfgNode, split: str, *, read: bool = False) -> list[str]:
    """Return the class names of the data of a split, empty where they are not known.

    Args:
        cfg: whose data sets are registered
        split: "TRAIN" or "TEST"
        read: read data of other code that names its classes only then, as Detectron2's
            ``register_coco_instances`` does
    """
    names = [name for name in cfg.DATASETS[split] if name in DatasetCatalog]
    if not names:
        return []
    if read and "thing_classes" not in MetadataCatalog.get(names[0]).as_dict():
        DatasetCatalog.get(names[0])
    return list(MetadataCatalog.get(names[0]).get("thing_classes") or [])


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


def describe_shared_images(paths: Mapping[Source, Sequence[str]]) -> list[str]:
    """Return a sentence for each set of test data that has images of the training data.

    Args:
        paths: of the images of each.
    """
    train = [path for source, group in paths.items() if source.split == "TRAIN" for path in group]
    lines = (
        describe_shared_files(train, group, source.name)
        for source, group in paths.items()
        if source.split == "TEST"
    )
    return [line for line in lines if line]


def _check_files_exist(source: Source) -> None:
    for path in (*source.json_files, *source.image_roots):
        if path and "://" not in path and not os.path.exists(path):
            raise InputError(
                f"{path}, which data set {source.name} needs, does not exist; the environment "
                "variable DETECTRON2_DATASETS names the folder of Detectron2's data sets, and is "
                f"{os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')}"
            )
