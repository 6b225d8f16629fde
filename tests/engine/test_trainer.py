"""Training and evaluation in one process, through the trainer alone."""

import copy
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.evaluation import DatasetEvaluators
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.testing import assert_close

import train_net
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Trainer, load_config
from retinanet_ext.engine.config_check import check_config
from retinanet_ext.engine.metrics import StrictJSONWriter
from retinanet_ext.engine.summary import summarize
from retinanet_ext.errors import InputError, explain
from retinanet_ext.evaluation.outputs import DETECTIONS, inference_dir

IMAGES = Path("tests/fixtures/bccd_mini/images")


def make_cfg(output_dir, *opts):
    values = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output_dir), *opts]
    cfg = load_config("tests/engine/tiny.yaml", values)
    prepare_datasets(cfg, eval_only=False)
    return cfg


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_ends_training_with_its_name(num_workers, tmp_path):
    """The file is damaged after the check that precedes training."""
    images = shutil.copytree(IMAGES, tmp_path / "images")
    cfg = make_cfg(
        tmp_path / "run",
        *("DATASETS.CUSTOM.TRAIN_IMAGES", str(images), "SOLVER.IMS_PER_BATCH", "3"),
        *("DATALOADER.NUM_WORKERS", str(num_workers), "SOLVER.MAX_ITER", "1"),
    )
    image = images / "BloodImage_00343.jpg"
    image.write_bytes(image.read_bytes()[:5000])
    with pytest.raises(InputError) as raised:
        Trainer(cfg).train()
    _, line = explain(raised.value)
    assert line.startswith(f"image {image} (image id 171) cannot be used")
    # Detectron2 evaluates what fails in the last iteration.
    assert not (tmp_path / "run/inference").exists()


class WithDetectron2sLoader(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg)


def test_detectron2s_loader_may_take_the_place_of_the_projects(tmp_path, caplog):
    opts = ("SOLVER.MAX_ITER", "2", "SEED", "3", "TEST.DETECTION_GRID.NUM_IMAGES", "0")
    trainer = WithDetectron2sLoader(make_cfg(tmp_path, *opts))
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    logger = logging.getLogger("retinanet_ext.engine.trainer")
    logger.addHandler(caplog.handler)
    resumed = WithDetectron2sLoader(make_cfg(tmp_path, *opts, "SOLVER.MAX_ITER", "3"))
    resumed.resume_or_load()
    logger.removeHandler(caplog.handler)
    assert resumed.start_iter == 2
    assert "AspectRatioGroupedDataset does not save its place" in caplog.text


def test_several_test_sets_are_kept_apart(tmp_path):
    cfg = make_cfg(tmp_path, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.001")
    cfg.DATASETS.TEST = ("custom_test", "custom_train")
    results = Trainer.test(cfg, Trainer.build_model(cfg))
    assert set(results) == {"custom_test", "custom_train"}
    for name in results:
        records = json.loads(
            (tmp_path / "inference" / name / "coco_instances_results.json").read_text()
        )
        # Ids of the json, 1 to 3, as Detectron2 writes them; images of this set alone.
        assert {record["category_id"] for record in records} <= {1, 2, 3}
        with Image.open(tmp_path / f"detections_{name}.png") as picture:
            assert picture.width > 960
    text = summarize(cfg, results)
    assert "Box AP on custom_test" in text and "Box AP on custom_train" in text
    assert "detections_custom_train.png" in text


def test_no_picture_where_none_is_wanted(tmp_path):
    cfg = make_cfg(tmp_path, "TEST.DETECTION_GRID.NUM_IMAGES", "0")
    Trainer.test(cfg, Trainer.build_model(cfg))
    assert not list(tmp_path.glob("*.png"))


def test_summary(tmp_path):
    cfg = make_cfg(tmp_path)
    names = MetadataCatalog.get("custom_test").thing_classes
    metrics = {"AP": 48.54, "AP50": 84.6, "APs": math.nan}
    metrics |= {f"AP-{name}": 10.0 * i for i, name in enumerate(names)}
    (tmp_path / "metrics.json").write_text("{}")
    lines = [line.split() for line in summarize(cfg, {"bbox": metrics}).splitlines()]
    assert ["AP", "AP50", "APs"] in lines
    assert ["48.5", "84.6", "-"] in lines
    assert ["RBC", "0.0", "WBC", "10.0", "Platelets", "20.0"] in lines
    assert lines[-1][-1] == str(tmp_path / "metrics.json")
    assert "model_final.pth" not in summarize(cfg, {})
    assert "-: no such objects in the test data" in summarize(cfg, {"bbox": metrics})


def test_summary_without_objects_or_detections_says_which(tmp_path):
    cfg = make_cfg(tmp_path, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.999")
    text = summarize(cfg, Trainer.test(cfg, Trainer.build_model(cfg)))
    said = "custom_test: no detections above MODEL.RETINANET.SCORE_THRESH_TEST 0.999: AP is 0"
    assert said in text.splitlines()
    nothing = {"bbox": {"AP": math.nan, "AP50": math.nan, "AP-RBC": math.nan}}
    said = "custom_test: no detections, or no objects in the test data: AP cannot be computed"
    assert said in summarize(cfg, nothing).splitlines()
    inference_dir(cfg, "custom_test").joinpath(DETECTIONS).write_text('[{"image_id": 1}]')
    said = "custom_test: no objects in the test data: AP cannot be computed"
    assert said in summarize(cfg, nothing).splitlines()


class WithAnEvaluatorOfItsOwn(Trainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return DatasetEvaluators([])


def test_a_test_set_that_no_evaluator_fits_is_refused_before_training(tmp_path):
    """Also by the Trainer of train_net.py, which overrides the method; unless one does fit."""
    cfg = make_cfg(tmp_path)
    del MetadataCatalog.get("custom_test").evaluator_type
    MetadataCatalog.get("custom_test").evaluator_type = "cityscapes"
    for trainer in (Trainer, train_net.Trainer):
        with pytest.raises(InputError, match="custom_test has the evaluator_type 'cityscapes'"):
            trainer(cfg)
    WithAnEvaluatorOfItsOwn(cfg)


def test_summary_says_that_ap_is_not_cocos(tmp_path):
    cfg = make_cfg(tmp_path, "TEST.DETECTIONS_PER_IMAGE", "300")
    metrics = {"bbox": {"AP": 48.54}}
    assert "AP of up to 300 detections per image" in summarize(cfg, metrics)
    assert Trainer.build_evaluator(cfg, "custom_test")._max_detections == 300
    cfg.TEST.DETECTIONS_PER_IMAGE = 100
    assert "detections per image" not in summarize(cfg, metrics)


def test_numbers_that_json_lacks_are_null(tmp_path):
    writer = StrictJSONWriter(str(tmp_path / "metrics.json"))
    with EventStorage() as storage:
        storage.put_scalars(
            loss=math.nan, rate=math.inf, iteration_seconds=0.25, smoothing_hint=False
        )
        writer.write()
        assert math.isnan(storage.latest()["loss"][0])  # for the log and TensorBoard
        storage.step()
        storage.put_scalar("loss", 2.0, smoothing_hint=False)
        writer.write()
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 0, "loss": None, "rate": None, "iteration_seconds": 0.25},
        {"iteration": 1, "loss": 2.0},
    ]


def test_summary_of_many_classes_has_each(tmp_path):
    cfg = make_cfg(tmp_path)
    metrics = {"AP": 1.0} | {f"AP-class{i}": float(i) for i in range(10)}
    words = summarize(cfg, {"bbox": metrics}).split()
    for i in range(10):
        assert words[words.index(f"class{i}") + 1] == f"{i}.0"


def test_bfloat16_on_the_cpu_is_autocast_of_the_forward_pass(tmp_path):
    """A step through the trainer ends in the same weights as one written out."""
    amp = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16")
    cfg = make_cfg(tmp_path, *amp, "SEED", "3")
    check_config(cfg, num_processes=1, eval_only=False)
    trainer = Trainer(cfg)
    model = copy.deepcopy(trainer.model)
    optimizer = Trainer.build_optimizer(cfg, model)
    loader, batches = iter(trainer.data_loader), []
    trainer._trainer._data_loader_iter_obj = (batches.append(b) or b for b in loader)
    with EventStorage():
        trainer.iter = 0
        trainer.run_step()
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(batches[0])
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    plain = dict(model.named_parameters())
    assert all(torch.equal(p, plain[name]) for name, p in trainer.model.named_parameters())


def test_an_unknown_precision_is_refused(tmp_path):
    cfg = make_cfg(tmp_path, "SOLVER.AMP.PRECISION", "int8")
    with pytest.raises(
        InputError,
        match=r"SOLVER\.AMP\.PRECISION 'int8' is unknown; known: 'float16', 'bfloat16', 'auto'",
    ):
        check_config(cfg, num_processes=1, eval_only=False)


def test_fused_optimizer_takes_the_same_steps(tmp_path):
    weights = []
    for name in ("False", "True"):
        cfg = make_cfg(
            tmp_path / name, "SOLVER.FUSED_OPTIMIZER", name, "SEED", "1", "TEST.EVAL_PERIOD", "0",
            "SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.MAX_ITER", "3",
        )  # fmt: skip
        seed_all_rng(1)
        trainer = Trainer(cfg)
        assert all(
            bool(g["fused"]) == cfg.SOLVER.FUSED_OPTIMIZER for g in trainer.optimizer.param_groups
        )
        with EventStorage():
            for trainer.iter in range(3):
                trainer.run_step()
        weights.append(trainer.model.state_dict())
    assert_close(weights[1], weights[0])
