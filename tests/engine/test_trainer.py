"""Training and evaluation in one process, through the trainer alone."""

import json
import math
import shutil
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Trainer, load_config
from retinanet_ext.engine.failures import explain
from retinanet_ext.engine.summary import summarize
from retinanet_ext.errors import InputError

IMAGES = Path("tests/fixtures/bccd_mini/images")


def make_cfg(output_dir, *opts):
    values = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output_dir), *opts]
    cfg, num_classes_is_set = load_config("tests/engine/tiny.yaml", values)
    prepare_datasets(cfg, num_classes_is_set=num_classes_is_set, eval_only=False)
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
    assert "no AP" in summarize(cfg, {"bbox": {"AP": math.nan, "AP50": math.nan}})


def test_summary_of_many_classes_has_each(tmp_path):
    cfg = make_cfg(tmp_path)
    metrics = {"AP": 1.0} | {f"AP-class{i}": float(i) for i in range(10)}
    words = summarize(cfg, {"bbox": metrics}).split()
    for i in range(10):
        assert words[words.index(f"class{i}") + 1] == f"{i}.0"
