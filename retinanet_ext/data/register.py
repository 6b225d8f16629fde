"""Registration of a config's data in Detectron2's catalogs, and the number of classes."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict

from retinanet_ext.config_keys import resolve_class_alpha
from retinanet_ext.data import coco_json, images
from retinanet_ext.data.class_balance import balance_class_alpha
from retinanet_ext.data.coco_json import count, join_some, printable
from retinanet_ext.data.duplicate_images import describe_shared_files
from retinanet_ext.data.file_names import MisnamedFiles
from retinanet_ext.data.findings import DONE, KINDS, ValidationResult
from retinanet_ext.data.sources import Source, check_source, find_sources
from retinanet_ext.errors import InputError
from retinanet_ext.files import write_file

logger = logging.getLogger(__name__)


def prepare_datasets(cfg: CfgNode, *, eval_only: bool) -> None:
    """Check and register the data that a config names, and complete the config from them.

    ``DATASETS.CUSTOM`` becomes the data sets "custom_train" and "custom_test", which replace
    ``DATASETS.TRAIN`` and ``DATASETS.TEST``. The sample set is drawn at its first use.
    ``DATASETS.CHECK`` is the policy for findings in these data. ``MODEL.RETINANET.NUM_CLASSES``
    becomes the number of class names, names in ``CLS_LOSS.CLASS_ALPHA`` become numbers, and
    ``INPUT.PIXEL_RANGE percentiles`` becomes two numbers.

    Every process calls this function. Let one process per machine call it first, because
    :class:`~retinanet_ext.data.file_cache.FileCache` keeps what is found about image files.

    Args:
        cfg: the whole config; modified in place. A second call changes nothing more.
        eval_only: only use the data of ``DATASETS.TEST``.

    Raises:
        InputError: a data set is unknown, missing or empty, a finding is refused, class names
            differ between data sets, or NUM_CLASSES differs from their number.
    """
    needed = "TEST" if eval_only else "TRAIN"
    sources = find_sources(cfg, ["TEST"] if eval_only else ["TRAIN", "TEST"])
    if not any(source.split == needed for source in sources):
        raise InputError(
            f"DATASETS.{needed} is empty; name a registered data set, or COCO-format data by "
            f"DATASETS.CUSTOM.{needed}_JSON and DATASETS.CUSTOM.{needed}_IMAGES"
        )
    resolve_pixel_range(cfg, sources)
    was_enabled = gc.isenabled()
    gc.disable()  # which takes a third of the time on millions of objects
    try:
        paths = {source: _register(cfg, source) for source in sources if source.is_ours}
    finally:
        if was_enabled:
            gc.enable()
    for split in {source.split for source in sources}:
        cfg.DATASETS[split] = tuple(source.name for source in sources if source.split == split)

    names = dict.fromkeys(source.name for source in sources)
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    known = {name: labels for name, labels in classes.items() if labels is not None}
    if known:  # data of other code may name their classes only when they are loaded
        set_num_classes(cfg, known)
    indices = [str(index) for index in range(cfg.MODEL.RETINANET.NUM_CLASSES)]
    class_names = next(iter(known.values()), indices)
    balance_class_alpha(cfg, class_names, eval_only=eval_only)
    resolve_class_alpha(cfg, class_names)
    for source in sources:
        _check_files_exist(source)
    train = [p for source, group in paths.items() if source.split == "TRAIN" for p in group]
    tests = {source.name: group for source, group in paths.items() if source.split == "TEST"}
    for line in describe_shared_files(train, tests):
        logger.warning("%s", line)


def resolve_pixel_range(cfg: CfgNode, sources: Sequence[Source]) -> None:
    """Replace ``INPUT.PIXEL_RANGE percentiles`` by two numbers measured on the training data."""
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
    """Yield the paths of a data set's images, before its annotation file is checked."""
    if not source.is_ours:
        yield from (record["file_name"] for record in DatasetCatalog.get(source.name))
        return
    for file in source.read():
        root = file.image_root
        others = MisnamedFiles(root) if mends and os.path.isdir(root) else None
        for entry in file.content["images"]:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                continue
            if others and not os.path.isfile(os.path.join(root, name)):
                match = others.find(name)
                name = (match and match.path) or name
            yield os.path.join(root, name)


def _register(cfg: CfgNode, source: Source) -> list[str]:
    """Check data and register them in place of an earlier data set; return the images' paths."""
    checked = check_source(cfg, source)
    checked.raise_refused()
    if lack := checked.find_lack_of_objects():
        if source.split == "TRAIN":
            raise InputError(lack)
        if checked.is_labelled:
            logger.warning("%s", lack)
    _log_content(source, checked)
    _log_findings(cfg, source, checked)

    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(source.name, None)
    content, objects = checked.content, checked.objects
    num_objects = Counter(a["image_id"] for a in objects)
    records = coco_json.to_dataset_dicts(content, checked.image_root)
    # Pickled, because that is small and every reader gets its own copy.
    DatasetCatalog.register(source.name, partial(pickle.loads, pickle.dumps(records)))
    MetadataCatalog.get(source.name).set(
        evaluator_type="coco",
        json_file=_json_for_evaluation(checked) if source.split == "TEST" else source.json_file,
        image_root=checked.image_root,
        is_labelled=checked.is_labelled,
        num_images=len(content["images"]),
        num_crowd_regions=len(content["annotations"]) - len(objects),
        images_by_num_objects=dict(Counter(num_objects.values())),
        thing_classes=coco_json.class_names(content),
        thing_dataset_id_to_contiguous_id=coco_json.contiguous_category_ids(content),
    )
    return [record["file_name"] for record in records]


def write_converted(source: Source, folder: str) -> str:
    """Write registered data that are no COCO json as one, ``<name>.json``, and return its path.

    The file holds what is used: absolute image paths and boxes in pixels, to three decimals.
    """
    path = Path(folder, f"{source.name}.json")
    content = convert_to_coco_dict(source.name)
    content["info"] = {}  # Detectron2's has the date, by which equal data would differ
    write_file(path, json.dumps(content))
    return str(path)


def _log_content(source: Source, checked: ValidationResult) -> None:
    """Log what is used of the data."""
    content, objects = checked.content, checked.objects
    counts = Counter(annotation["category_id"] for annotation in objects)
    labels = coco_json.contiguous_category_ids(content)
    per_class = zip(coco_json.class_names(content), labels, strict=True)
    logger.info(
        "%s: %s, %s, %s to ignore, %s (%s) from %s",
        source.name,
        count(len(content["images"]), "image"),
        count(len(objects), "box", "boxes"),
        count(len(content["annotations"]) - len(objects), "region"),
        count(len(labels), "class", "classes"),
        join_some(f"{printable(name)} {counts[category_id]}" for name, category_id in per_class),
        source.json_file,
    )
    if list(labels) != list(range(1, len(labels) + 1)):
        ids, last = join_some(labels), len(labels) - 1
        logger.info("%s: category ids %s stand for classes 0..%d", source.name, ids, last)


def _log_findings(cfg: CfgNode, source: Source, checked: ValidationResult) -> None:
    """Log the notes, and one line for each kind of finding."""
    for note in checked.notes:
        logger.info("%s: %s", source.json_file, note)
    for kind, findings in checked.by_kind().items():
        done = checked.policy[kind]
        use = "" if done == "keep" else f", {DONE[done]}"
        if kind == "empty_image" and done == "keep" and source.split == "TRAIN":
            filtered = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            use = f", {'left out' if filtered else 'trained on as background'} "
            use += f"(DATALOADER.FILTER_EMPTY_ANNOTATIONS {filtered})"
        logger.log(
            logging.WARNING if done == "drop" or KINDS[kind].is_fault else logging.INFO,
            "%s: %s%s: %d: %s",
            source.json_file,
            KINDS[kind].what,
            use,
            len(findings),
            join_some((finding.message for finding in findings), 3, separator="; "),
        )


def _json_for_evaluation(checked: ValidationResult) -> str:
    """Return the annotation file that the evaluation reads: the user's own, or a completed copy.

    The copy holds only what is used. It belongs to this process, which deletes it when it exits,
    because a shared copy could be outdated or half written by another process.
    """
    completed = coco_json.complete_for_evaluation(checked.content)
    if not checked.is_labelled:  # the evaluation looks whether the list exists
        completed.pop("annotations", None)
    if completed == checked.original:
        with open(checked.json_file, "rb") as file:
            if json.detect_encoding(file.read(4)) == "utf-8":  # without a byte order mark
                return checked.json_file
    folder = tempfile.mkdtemp(prefix="retinanet_ext_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder, "instances.json")
    write_file(copy, json.dumps(completed))
    return str(copy)


def set_num_classes(cfg: CfgNode, classes: Mapping[str, Sequence[str]]) -> None:
    """Set ``MODEL.RETINANET.NUM_CLASSES``, if it has Detectron2's default, to the data's number.

    Raises:
        InputError: the class names of data sets differ, or NUM_CLASSES differs from their number.
    """
    if difference := compare_classes(classes):
        raise InputError(difference)
    first, names = next(iter(classes.items()))
    configured = cfg.MODEL.RETINANET.NUM_CLASSES
    default = get_cfg().MODEL.RETINANET.NUM_CLASSES
    if configured not in (default, len(names)):
        raise InputError(
            f"MODEL.RETINANET.NUM_CLASSES is {configured}, but {first} has {len(names)} classes "
            f"({join_some(map(printable, names))}); leave the key out, it is taken from the data"
        )
    cfg.MODEL.RETINANET.NUM_CLASSES = len(names)


def registered_classes(cfg: CfgNode, split: str, *, read: bool = False) -> list[str]:
    """Return the class names of a split's data; an empty list if they are unknown.

    If ``read``, data that other code has registered are loaded if the class names are only known
    then, as with Detectron2's ``register_coco_instances``.
    """
    names = [name for name in cfg.DATASETS[split] if name in DatasetCatalog]
    if not names:
        return []
    if read and "thing_classes" not in MetadataCatalog.get(names[0]).as_dict():
        DatasetCatalog.get(names[0])
    return list(MetadataCatalog.get(names[0]).get("thing_classes") or [])


def compare_classes(classes: Mapping[str, Sequence[str]]) -> str | None:
    """Return a sentence about the first difference between class names of data sets, or None.

    Args:
        classes: name of each data set -> names of its classes 0..K-1; not empty.
    """
    (first, names), *others = classes.items()
    for other, other_names in others:
        pairs = zip_longest(names, other_names, fillvalue="missing")
        for label, (name, other_name) in enumerate(pairs):
            if name != other_name:
                return (
                    f"data sets {first} and {other} must have the same classes in the same order "
                    f"of category ids, but class {label} is {name!r} in {first} ({len(names)} "
                    f"classes) and {other_name!r} in {other} ({len(other_names)} classes)"
                )
    return None


def _check_files_exist(source: Source) -> None:
    for path in (*source.json_files, *source.image_roots):
        if path and "://" not in path and not os.path.exists(path):
            raise InputError(
                f"{path}, which data set {source.name} needs, does not exist; the environment "
                "variable DETECTRON2_DATASETS names the folder of Detectron2's data sets, and is "
                f"{os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')}"
            )
