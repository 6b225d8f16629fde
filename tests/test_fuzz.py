"""Random annotations are refused in one line, or give boxes that can be trained on."""

import copy
import itertools
import json
import math
from functools import reduce
from operator import getitem

import pytest
from detectron2.data import DatasetCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet_ext.data import CheckedDatasetMapper, prepare_datasets
from retinanet_ext.data.findings import KINDS
from retinanet_ext.data.validation_report import check_data
from retinanet_ext.engine import load_config
from retinanet_ext.errors import InputError

DATA = {
    "info": {},
    "images": [{"id": i + 1, "file_name": f"{i}.png", "width": 48, "height": 32} for i in range(2)],
    "categories": [{"id": 1, "name": "cell"}, {"id": 5, "name": "dot"}],
    "annotations": [
        {
            "id": i + 1,
            "image_id": 1 + i % 2,
            "category_id": 1 + 4 * (i % 2),
            "bbox": [4.0 * i, 3.0, 16.0, 12.5],
            "area": 200.0,
            "iscrowd": int(i == 3),
        }
        for i in range(4)
    ],
}
NUMBERS = [-(2**63), -1, 0, 1, 2, 2**31, 10**400, -0.0, 1e-300, 0.5, 1e30, math.inf, math.nan]
TEXTS = ["", "a", "../..", "/dev/null", "a\0b", "é\n", "\ud800", "1e5"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
POLICIES = {
    name: st.sampled_from(kind.policies) for name, kind in KINDS.items() if len(kind.policies) > 1
}
counter = itertools.count()


def paths_of(tree, prefix=()):
    if prefix:
        yield prefix
    for key in (
        tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
    ):
        yield from paths_of(tree[key], (*prefix, key))


@st.composite
def changed(draw):
    """The data with up to four entries removed, replaced, repeated or given a number."""
    tree = copy.deepcopy(DATA)
    for _ in range(draw(st.integers(1, 4))):
        if not (paths := list(paths_of(tree))):
            break
        *way, last = draw(st.sampled_from(paths))
        node = reduce(getitem, way, tree)
        action = draw(st.sampled_from(["remove", "replace", "repeat", "number"]))
        if action == "remove":
            del node[last]
        elif action == "repeat" and isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
        elif action == "number" and isinstance(node[last], int | float):
            node[last] = draw(st.sampled_from(NUMBERS) | st.floats(-60, 60))
        else:
            node[last] = draw(VALUES)
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for index in range(2):
        Image.effect_noise((48, 32), 60).convert("RGB").save(folder / f"{index}.png")
    return folder


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=changed(), policies=st.fixed_dictionaries(POLICIES))
def test_used_or_refused_in_one_line(content, policies, folder):
    file = folder / f"{next(counter)}.json"
    file.write_text(json.dumps(content))
    opts = ["DATASETS.CUSTOM.TRAIN_IMAGES", folder, "DATASETS.CUSTOM.TEST_IMAGES", folder]
    opts += ["DATASETS.CUSTOM.TRAIN_JSON", file, "DATASETS.CUSTOM.TEST_JSON", file]
    cfg = load_config("configs/small_R18_FPN.yaml", list(map(str, opts)))
    cfg.DATASETS.CHECK.update({name.upper(): policy for name, policy in policies.items()})
    try:
        assert check_data(cfg).text
        prepare_datasets(cfg, eval_only=False)
    except InputError as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    for record in DatasetCatalog.get("custom_train"):
        instances = mapper(record)["instances"]
        boxes, labels = instances.gt_boxes.tensor, instances.gt_classes
        assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((labels >= 0) & (labels < cfg.MODEL.RETINANET.NUM_CLASSES)).all()
