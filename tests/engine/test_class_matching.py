"""Weights and data name their classes: they are matched by name, or refused."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from detectors import make_cfg, make_model
from retinanet_ext.data import prepare_datasets
from retinanet_ext.data.register import registered_classes
from retinanet_ext.engine import Checkpointer, Predictor, Trainer, export_weights, load_config
from retinanet_ext.engine.class_matching import CLASSIFIER, match_classes
from retinanet_ext.errors import InputError
from training import make_trainer

SAVED = ["RBC", "WBC", "Platelets", "other"]
REORDERED = ["other", "Platelets", "RBC", "WBC"]
FIXTURES = Path("tests/fixtures/bccd_mini")
NEW_IDS = {1: 3, 2: 1, 3: 2}

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(params=["RetinaNetExt", "RetinaNet"])
def architecture(request):
    return "MODEL.META_ARCHITECTURE", request.param


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of four classes whose outputs are all different."""
    model = make_model()
    nn.init.normal_(model.head.cls_score.bias)
    Checkpointer(model, str(tmp_path), class_names=SAVED).save("weights")
    return str(tmp_path / "weights.pth")


def logits(model):
    """The outputs of the head for fixed features, (R, K)."""
    features = [torch.randn(1, 32, 6, 5, generator=torch.Generator().manual_seed(1))] * 5
    with torch.no_grad():
        return permute_to_N_HWA_K(model.head(features)[0][0], model.num_classes)[0]


def load(path, names, *opts, num_classes=4, **kwargs):
    model = make_model(*opts, num_classes=num_classes)
    content = Checkpointer(model, class_names=names, **kwargs).load(path, [])
    return model, content


def test_another_order_is_matched_by_name(architecture, weights, caplog):
    expected = logits(load(weights, SAVED, *architecture)[0])
    assert not [record for record in caplog.records if "class" in record.getMessage()]
    with caplog.at_level("INFO", "retinanet_ext.engine.class_matching"):
        found = logits(load(weights, REORDERED, *architecture, complete=True)[0])
    assert_close(found, expected[:, [SAVED.index(name) for name in REORDERED]])
    assert not torch.equal(found, expected)
    assert "are in another order than the data's" in caplog.text


@pytest.mark.parametrize(
    ("saved", "names"), [(SAVED, ()), (None, REORDERED), ({"RBC": 0}, REORDERED)]
)
def test_nothing_is_matched_where_either_has_no_names(saved, names, weights):
    content = torch.load(weights)
    torch.save({**content, "class_names": saved}, weights)
    model, _ = load(weights, names)
    assert all(torch.equal(content["model"][k], v) for k, v in model.state_dict().items())


OTHERS = {
    "one other": ["RBC", "WBC", "platelets", "other"],
    "fewer": SAVED[:3],
    "one twice": ["RBC", "RBC", "Platelets", "other"],
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    ("kwargs", "remedy"),
    [
        ({"complete": True}, "name the data's classes as those"),
        ({"complete": True, "reinit_mismatched": True}, "name the data's classes as those"),
        ({}, "REINIT_MISMATCHED True keeps"),
    ],
    ids=["evaluated", "evaluated with reinit", "trained"],
)
def test_other_names_are_refused(names, kwargs, remedy, weights):
    with pytest.raises(InputError, match=remedy) as raised:
        load(weights, names, num_classes=len(names), **kwargs)
    message = str(raised.value)
    assert "are of 4 classes (" in message and f"the data have {len(names)} classes (" in message


def test_the_classes_that_differ_are_named_of_many(tmp_path):
    names = [f"class{i}" for i in range(80)]
    model = make_model(num_classes=80)
    Checkpointer(model, str(tmp_path), class_names=names).save("weights")
    path = str(tmp_path / "weights.pth")
    with pytest.raises(InputError) as raised:
        Checkpointer(model, class_names=[*names[:79], "a\nnew one"]).load(path)
    assert "(class79, class0, class1, class2, class3, and 75 more)" in str(raised.value)
    assert r"(a\nnew one, class0," in str(raised.value)


@pytest.mark.parametrize("names", [["WBC", "new", "RBC"], ["new", "newer"], [*SAVED, "a", "b"]])
def test_fine_tuning_keeps_the_outputs_of_known_classes(names, weights, caplog):
    expected = logits(load(weights, SAVED)[0])
    fresh = make_model(num_classes=len(names))
    model, _ = load(weights, names, num_classes=len(names), reinit_mismatched=True)
    found = logits(model)
    fresh.head.cls_subnet.load_state_dict(model.head.cls_subnet.state_dict())
    for label, name in enumerate(names):
        source = expected[:, SAVED.index(name)] if name in SAVED else logits(fresh)[:, label]
        assert_close(found[:, label], source)
    assert "start anew for: " in caplog.text


EFL = ("MODEL.RETINANET.CLS_LOSS.NAME", "equalized_focal")


@pytest.fixture
def efl_weights(tmp_path):
    """A checkpoint of four classes with a loss that keeps two numbers per class."""
    model = make_model(*EFL)
    model.criterion.cls_loss.class_gradients += torch.arange(1, 9)
    Checkpointer(model, str(tmp_path), class_names=SAVED).save("efl")
    return str(tmp_path / "efl.pth")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(REORDERED, [4, 3, 1, 2, 8, 7, 5, 6]), (["WBC", "new", "RBC"], [2, 0, 1, 6, 0, 5])],
)
def test_statistics_of_the_loss_follow_the_names(names, expected, efl_weights):
    model, _ = load(efl_weights, names, *EFL, num_classes=len(names), reinit_mismatched=True)
    assert model.criterion.cls_loss.class_gradients.tolist() == expected


def test_statistics_of_another_number_of_classes_are_refused_or_start_anew(efl_weights):
    content = torch.load(efl_weights)
    for name in CLASSIFIER:
        del content["model"][name]
    del content["class_names"]
    torch.save(content, efl_weights)
    with pytest.raises(
        InputError, match=r"class_gradients is \(8,\), the model's \(6,\); .*REINIT"
    ):
        load(efl_weights, (), *EFL, num_classes=3)
    model, _ = load(efl_weights, (), *EFL, num_classes=3, reinit_mismatched=True)
    assert model.criterion.cls_loss.class_gradients.tolist() == [0] * 6
    load(efl_weights, (), "MODEL.RETINANET.CLS_LOSS.NAME", "ghm_c", num_classes=3)  # no use for it


def test_a_shape_that_fits_by_chance_starts_anew(weights):
    """4 classes with 9 anchors per cell are as many outputs as 12 with 3."""
    opts = ("MODEL.ANCHOR_GENERATOR.SCALES_PER_OCTAVE", 1)
    names = [*SAVED, *"abcdefgh"]
    reinit = ("MODEL.RETINANET.REINIT_MISMATCHED", True)
    model = make_model(*opts, *reinit, num_classes=12)
    before = {name: model.state_dict()[name].clone() for name in CLASSIFIER}
    Checkpointer(model, class_names=names, reinit_mismatched=True).load(weights)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_inputs_are_left_as_they_are():
    tensor, fresh = torch.arange(6.0), torch.zeros(4)
    matched = match_classes(tensor, ["a", "b", "c"], ["c", "d"], fresh)
    assert matched.tolist() == [2, 0, 5, 0]
    assert tensor.tolist() == list(range(6)) and not fresh.any()


def test_names_travel(weights, tmp_path):
    """To Detectron2, which ignores them, to exported weights and to the predictor."""
    stock = make_model("MODEL.META_ARCHITECTURE", "RetinaNet")
    rest = DetectionCheckpointer(stock).load(weights)
    assert torch.equal(stock.head.cls_score.bias, torch.load(weights)["model"][CLASSIFIER[1]])
    assert rest["class_names"] == SAVED
    export_weights(weights, tmp_path / "exported.pth")
    for path, expected in ((tmp_path / "exported.pth", SAVED), (stock_weights(tmp_path), [])):
        predictor = Predictor(make_cfg("MODEL.WEIGHTS", str(path)))
        assert predictor.class_names == expected


def stock_weights(folder):
    DetectionCheckpointer(make_model(), str(folder)).save("stock")
    return folder / "stock.pth"


def write_json(name, folder, names=None):
    """A json of the fixtures under other category ids, and under other names if any are given."""
    content = json.loads((FIXTURES / name).read_text())
    for category in content["categories"]:
        category["id"] = NEW_IDS[category["id"]]
        category["name"] = (names or {}).get(category["name"], category["name"])
    for annotation in content["annotations"]:
        annotation["category_id"] = NEW_IDS[annotation["category_id"]]
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def config(folder, *opts, eval_only=True):
    """The config of a tiny detector, its data registered."""
    values = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder)]
    values += ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.02", "TEST.DETECTION_GRID.NUM_IMAGES", "0"]
    cfg = load_config("tests/engine/tiny.yaml", [*values, *opts])
    prepare_datasets(cfg, eval_only=eval_only)
    return cfg


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a detector that finds the objects it was trained on, and its metrics."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = config(
        folder, "DATASETS.CUSTOM.TRAIN_JSON", str(FIXTURES / "instances_val.json"), "SEED", "1",
        "SOLVER.MAX_ITER", "20", "SOLVER.BASE_LR", "0.01", "SOLVER.CHECKPOINT_PERIOD", "1000",
        eval_only=False,
    )  # fmt: skip
    torch.manual_seed(1)
    metrics = Trainer(cfg).train()["bbox"]
    assert metrics["AP"] > 5
    return folder, metrics


def rounded(metrics):
    return {name: round(value, 6) for name, value in metrics.items() if not math.isnan(value)}


def test_other_category_ids_give_the_same_ap(architecture, trained, tmp_path):
    folder, expected = trained
    weights = str(folder / "model_final.pth")
    other_ids = write_json("instances_val.json", tmp_path)
    cfg = config(tmp_path, *architecture, "DATASETS.CUSTOM.TEST_JSON", other_ids)
    names = registered_classes(cfg, "TEST")
    assert names == ["WBC", "Platelets", "RBC"]
    model = Trainer.build_model(cfg)
    Checkpointer(model, complete=True, class_names=names).load(weights)
    assert rounded(Trainer.test(cfg, model)["bbox"]) == rounded(expected)

    renamed = write_json("instances_val.json", tmp_path, {"WBC": "leukocyte"})
    cfg = config(tmp_path, *architecture, "DATASETS.CUSTOM.TEST_JSON", renamed)
    with pytest.raises(InputError, match=r"\(WBC, RBC, Platelets\).*\(leukocyte, Platelets, RBC\)"):
        Checkpointer(model, complete=True, class_names=registered_classes(cfg, "TEST")).load(
            weights
        )


def test_metrics_of_a_run_are_strict_json(trained):
    """COCO's AP of small objects is NaN where there are none."""
    folder, metrics = trained
    assert math.isnan(metrics["APs"])

    def refuse(constant):
        raise ValueError(constant)

    lines = (folder / "metrics.json").read_text().splitlines()
    last = [json.loads(line, parse_constant=refuse) for line in lines][-1]
    assert last["bbox/APs"] is None and last["bbox/AP"] == metrics["AP"]


@pytest.fixture
def float64():
    """Rounding in float32 would be as large as the momentum's share."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["plain", "DistributedDataParallel"])
def parallel(request, monkeypatch, tmp_path_factory):
    """A process of its own, or one of a group, whose model is wrapped."""
    if request.param == "plain":
        yield
        return
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    wrapped = "retinanet_ext.engine.trainer.create_ddp_model"
    monkeypatch.setattr(wrapped, lambda model, **kwargs: DistributedDataParallel(model, **kwargs))
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    comm.create_local_process_group(1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("float64", "parallel")
def test_a_run_is_resumed_with_other_category_ids(tmp_path):
    """Its momentum too: the weights end as those of the run that was not cut off."""
    opts = ("SOLVER.CHECKPOINT_PERIOD", 4)
    make_trainer(tmp_path, *opts).train()
    expected = torch.load(tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    train = ("DATASETS.CUSTOM.TRAIN_JSON", write_json("instances_train_raw.json", tmp_path))
    make_trainer(tmp_path, *opts, *train, resume=True).train()
    resumed = torch.load(tmp_path / "model_final.pth")
    assert expected["class_names"] == ["RBC", "WBC", "Platelets"]
    assert resumed["class_names"] == ["WBC", "Platelets", "RBC"]
    for name, tensor in expected["model"].items():
        if name in CLASSIFIER:
            tensor = match_classes(tensor, *(c["class_names"] for c in (expected, resumed)), tensor)
        assert_close(resumed["model"][name], tensor, rtol=1e-7, atol=1e-10)
    renamed = write_json("instances_train_raw.json", tmp_path, {"WBC": "leukocyte"})
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(InputError, match="resume with the data the run was started with"):
        make_trainer(tmp_path, *opts, "DATASETS.CUSTOM.TRAIN_JSON", renamed, resume=True)
