"""Fine-tuning: from ImageNet weights in a timm backbone, and from published COCO weights."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from retinanet_ext.config_keys import read_key
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Predictor, Trainer, load_config
from retinanet_ext.engine.class_matching import CLASSIFIER
from retinanet_ext.errors import InputError
from training import run_train_net

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/fixtures/bccd_mini"
MOBILENET, R50 = (f"configs/{name}_FPN.yaml" for name in ("small_mobilenetv2", "finetune_R50"))
SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("SOLVER.WARMUP_ITERS", "0", "SOLVER.STEPS", "[2]", "TEST.DETECTION_GRID.NUM_IMAGES", "0"),
]
WEIGHTS = Path(os.environ.get("RETINANET_EXT_TEST_WEIGHTS") or ROOT.parent / "shared/weights")
IMAGENET = WEIGHTS / "mobilenetv2_100_imagenet.pth"

pytestmark = pytest.mark.usefixtures("restore_logging")


def opts(folder, *more, train=DATA / "instances_train_raw.json", test=DATA / "instances_val.json"):
    """The values of a command line that trains on five images on the CPU."""
    data = {"TRAIN_JSON": train, "TEST_JSON": test}
    data |= {"TRAIN_IMAGES": DATA / "images", "TEST_IMAGES": DATA / "images"}
    pairs = [str(x) for key, value in data.items() for x in (f"DATASETS.CUSTOM.{key}", value)]
    return ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder), *pairs, *SMALL, *map(str, more)]


def make_trainer(config, values):
    cfg = load_config(str(ROOT / config), values)
    prepare_datasets(cfg, eval_only=False)
    torch.manual_seed(1)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file of timm's weights, and the options that name it."""
    file = tmp_path_factory.mktemp("timm") / "mobilenetv2_035.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("mobilenetv2_035").state_dict(), file)
    return ["MODEL.TIMM.NAME", "mobilenetv2_035", "MODEL.TIMM.WEIGHTS", str(file)]


def weights_of(folder):
    return torch.load(folder / "model_final.pth")["model"]


def test_a_run_needs_its_timm_weights_once(backbone, tmp_path):
    """Resumed exactly, evaluated, predicted with and fine-tuned from without that file."""
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    command = ("--config-file", MOBILENET)
    assert run_train_net(*command, *opts(whole, *backbone)) == 0
    shutil.copytree(whole, parts, ignore=shutil.ignore_patterns("model_final.pth"))
    info = json.loads((whole / "run_info.json").read_text())
    assert info[0]["weights"]["file"].endswith("mobilenetv2_035.pth")
    assert len(info[0]["weights"]["sha256"]) == 64
    gone = [*backbone[:-1], str(tmp_path / "gone.pth")]
    (parts / "last_checkpoint").write_text("model_0000001.pth")
    assert run_train_net(*command, "--resume", *opts(parts, *gone)) == 0
    expected = weights_of(whole)
    assert all(torch.equal(expected[key], tensor) for key, tensor in weights_of(parts).items())

    saved = ("--config-file", str(whole / "config.yaml"))
    assert run_train_net(*saved, "--eval-only", "--resume", "MODEL.TIMM.WEIGHTS", gone[-1]) == 0
    cfg = load_config(whole / "config.yaml", ["MODEL.TIMM.WEIGHTS", gone[-1]])
    predictor = Predictor(cfg)
    assert predictor.class_names == ["RBC", "WBC", "Platelets"]
    assert all(torch.equal(expected[k], t) for k, t in predictor.model.state_dict().items())

    final = ("MODEL.WEIGHTS", whole / "model_final.pth", "SOLVER.BASE_LR", 0.0)
    final += ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
    assert run_train_net(*command, *opts(other, *gone, *final)) == 0
    assert "is not read, because MODEL.WEIGHTS" in (other / "log.txt").read_text()
    for key, tensor in weights_of(other).items():
        assert torch.equal(tensor, expected[key]) or key.startswith("criterion."), key


def test_a_missing_file_is_refused_before_anything_is_written(backbone, tmp_path, capsys):
    missing = [*backbone[:-1], str(tmp_path / "gone.pth")]
    assert run_train_net("--config-file", MOBILENET, *opts(tmp_path / "run", *missing)) == 2
    assert "gone.pth, which is not a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def total_losses(values):
    trainer = make_trainer(MOBILENET, values)
    trainer.train()
    return [value for value, _ in trainer.storage.history("total_loss").values()]


@pytest.mark.weights
@pytest.mark.skipif(not IMAGENET.is_file(), reason=f"{IMAGENET} is missing")
def test_imagenet_weights_learn_faster_than_random_ones(tmp_path):
    """Real images and weights: the loss of iterations 8 to 15, the seeds equal."""
    more = ["INPUT.MIN_SIZE_TRAIN", "[128]", "SOLVER.MAX_ITER", 15, "SOLVER.WARMUP_ITERS", 5]
    more += ["SOLVER.STEPS", "[]", "SOLVER.CHECKPOINT_PERIOD", 100, "DATASETS.CUSTOM.TEST_JSON"]
    more += ["", "DATASETS.CUSTOM.TEST_IMAGES", "", "MODEL.TIMM.WEIGHTS"]
    pretrained = total_losses(opts(tmp_path / "imagenet", *more, IMAGENET))
    random = total_losses(opts(tmp_path / "random", *more, "", "MODEL.TIMM.NORM", "BN"))
    assert np.mean(pretrained[8:]) < 0.8 * np.mean(random[8:])


@pytest.fixture(scope="module")
def zoo():
    """Detectron2's own model of random weights, in the format of its model zoo."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_3x.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    nn.init.normal_(model.head.cls_score.bias)
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    return cfg, {"model": weights, "__author__": "Detectron2 Model Zoo"}


def write_renamed(folder, names):
    """The fixtures' annotations, with other names of their classes."""
    files = []
    for name in ("instances_train_raw.json", "instances_val.json"):
        content = json.loads((DATA / name).read_text())
        for category in content["categories"]:
            category["name"] = names.get(category["name"], category["name"])
        (folder / name).write_text(json.dumps(content))
        files.append(folder / name)
    return dict(zip(("train", "test"), files, strict=True))


def test_published_coco_weights_keep_the_outputs_of_known_classes(zoo, tmp_path, caplog):
    cfg, content = zoo
    ours = load_config(ROOT / R50)
    url = model_zoo.get_checkpoint_url("COCO-Detection/retinanet_R_50_FPN_3x.yaml")
    assert url.endswith(ours.MODEL.WEIGHTS.removeprefix("detectron2://"))
    same = ("PIXEL_MEAN", "PIXEL_STD", "RESNETS", "BACKBONE", "FPN")
    assert all(read_key(ours.MODEL, key) == read_key(cfg.MODEL, key) for key in same)

    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
    renamed = write_renamed(tmp_path, {"RBC": "person", "WBC": "dog"})
    values = opts(tmp_path / "run", "MODEL.WEIGHTS", tmp_path / "zoo.pkl", **renamed)
    trainer = make_trainer(R50, values)
    assert "outputs are kept for: person, dog; they start anew for: Platelets" in caplog.text
    found, published = trainer.model.state_dict(), content["model"]
    for name in CLASSIFIER:
        rows = found[name].numpy().reshape(9, 3, -1)
        expected = published[name].reshape(9, 80, -1)
        assert np.array_equal(rows[:, :2], expected[:, [0, 16]])  # person and dog
        assert not any(np.array_equal(rows[:, 2], expected[:, label]) for label in range(80))
    for name, array in published.items():
        assert name in CLASSIFIER or np.array_equal(found[name].numpy(), array), name
    bottom_up = trainer.model.backbone.bottom_up
    frozen = [*bottom_up.stem.parameters(), *bottom_up.res2.parameters()]
    assert not any(weight.requires_grad for weight in frozen)
    assert all(weight.requires_grad for weight in bottom_up.res3.parameters())
    trainer.train()


def test_published_coco_weights_name_their_classes(zoo, tmp_path):
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(zoo[1]))
    cfg = load_config(ROOT / R50, ["MODEL.WEIGHTS", str(tmp_path / "zoo.pkl")])
    names = Predictor(cfg).class_names
    assert (len(names), names[0], names[-1]) == (80, "person", "toothbrush")
    values = opts(tmp_path / "run", "MODEL.WEIGHTS", tmp_path / "zoo.pkl")
    with pytest.raises(InputError, match=r"of 80 classes \(person, .*REINIT_MISMATCHED True"):
        make_trainer(R50, [*values, "MODEL.RETINANET.REINIT_MISMATCHED", "False"])
