"""What a step that is not finite is put down to, and the step once more from its file."""

import json
import math
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from detectors import make_batch, make_cfg
from retinanet_ext.cli import main
from retinanet_ext.engine.non_finite import StepSnapshot, diagnose
from retinanet_ext.engine.replay import replay_step, save_step
from retinanet_ext.errors import InputError
from retinanet_ext.modeling.matching import label_anchors


def make_step(*opts, box_counts=(3, 2, 0), **values):
    cfg = make_cfg(*opts)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    defaults = {
        "iteration": 7,
        "rank": 1,
        "num_processes": 2,
        "precision": "float32",
        "learning_rate": 0.4,
        "has_updated": True,
        "losses": {"loss_cls": math.nan},
        "seed": 0,
    }
    step = StepSnapshot(cfg=cfg, batches=[make_batch(box_counts)], **{**defaults, **values})
    return model, step


@pytest.fixture
def no_check(monkeypatch):
    """Let boxes through that the model refuses."""
    monkeypatch.setattr("retinanet_ext.modeling.retinanet.check_targets", lambda *args: None)


def spoil_box(step, image, index, box):
    boxes = step.batches[0][image]["instances"].gt_boxes.tensor
    boxes[index] = torch.tensor(box)


DETECTRON2 = ("MODEL.META_ARCHITECTURE", "RetinaNet")


@pytest.mark.parametrize("box", [[20.0, 10, 20, 60], [60.0, 10, 20, 60], [math.nan, 10, 50, 60]])
def test_a_bad_box_is_named_where_the_model_does_not_refuse_it(box):
    model, step = make_step(*DETECTRON2)
    spoil_box(step, 1, 0, box)
    report = diagnose(model, step)
    assert report["reproduced"] and report["first"]["term"] == "loss_box_reg"
    assert "1.png" in report["first"]["image"] and report["first"]["box"] == 0
    assert f"box 0 of image 1.png (image id None), [{box[0]:g}, 10, " in report["cause"]
    assert "is degenerate (zero area, inverted or not finite)" in report["cause"]


@pytest.mark.usefixtures("no_check")
def test_level_image_and_box_of_a_term_that_is_not_finite(monkeypatch):
    """A box that becomes unusable after anchors are matched to it."""
    model, step = make_step()

    def match_then_spoil(*args):
        matched = label_anchors(*args)
        spoil_box(step, 1, 1, [math.nan, 10, 50, 60])
        return matched

    monkeypatch.setattr("retinanet_ext.modeling.retinanet.label_anchors", match_then_spoil)
    report = diagnose(model, step)
    first = report["first"]
    assert first["term"] == "loss_box_reg" and first["layer"] is None
    assert "1.png" in first["image"] and first["box"] == 1
    by_level = [image["losses"]["loss_box_reg"] for image in report["images"]]
    bad = [level for level, value in by_level[1].items() if value == "nan"]
    assert first["level"] == bad[0]
    assert all(isinstance(value, float) for value in {**by_level[0], **by_level[2]}.values())


@pytest.mark.parametrize(
    ("value", "expected"),
    [(math.nan, "that are not finite"), (-math.inf, "that are not finite"), (3e38, "3e+38")],
)
def test_bad_pixels_are_named(value, expected):
    model, step = make_step()
    image = step.batches[0][1]["image"].float()
    image[:, 5:20] = value
    step.batches[0][1]["image"] = image
    report = diagnose(model, step)
    assert "image 1.png" in report["cause"] and "pixel values" in report["cause"]
    assert expected in report["cause"]
    assert "1.png" in report["first"]["image"]
    assert report["first"]["layer"].startswith("backbone.")
    # The other images' share is told apart.
    finite = [isinstance(image["max_logit"]["P3"], float) for image in report["images"]]
    assert finite == [True, False, True]


@pytest.mark.parametrize(
    ("name", "has_updated", "expected"),
    [
        ("head.cls_score.weight", False, "since it was loaded"),
        ("backbone.fpn_lateral3.weight", True, "it was damaged, not trained to this"),
    ],
)
def test_a_damaged_weight_is_named(name, has_updated, expected):
    model, step = make_step(has_updated=has_updated)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3:5] = math.nan
    report = diagnose(model, step)
    assert report["weights"]["not_finite"] == {"name": name, "values": 2}
    assert (
        f"weight {name} is not finite (in 2 of its values)" in report["cause"]
        and expected in report["cause"]
    )
    # Where every image has it, none is to blame.
    assert report["first"]["image"] is None


def test_weights_that_have_grown_are_put_down_to_the_learning_rate():
    model, step = make_step()
    with torch.no_grad():
        model.head.cls_score.weight.mul_(1e38)
    report = diagnose(model, step)
    usual = 0.01 * step.cfg.SOLVER.IMS_PER_BATCH / 16
    assert report["cause"].startswith("the model has diverged: weights reach")
    assert f"learning rate 0.4 is {0.4 / usual:.3g} times the usual {usual:g}" in report["cause"]
    assert "lower SOLVER.BASE_LR" in report["cause"]
    assert report["learning_rate"]["usual"] == pytest.approx(usual)


def test_a_gradient_that_is_not_finite_alone():
    """Detectron2's focal loss at gamma below 1 has a finite value, and no finite gradient."""
    model, step = make_step(*DETECTRON2, "MODEL.RETINANET.FOCAL_LOSS_GAMMA", 0.5)
    with torch.no_grad():
        model.head.cls_score.bias.fill_(-40.0)
    report = diagnose(model, step)
    assert report["first"]["term"] == "gradient"
    assert report["gradient"]["not_finite"]["name"] == "head.cls_score.bias"
    assert "all losses are finite and the gradient is not" in report["cause"]
    assert "gamma below 1" in report["cause"]


def test_a_head_of_three_outputs():
    """FCOS predicts a centre-ness too."""
    retinanet, step = make_step(*DETECTRON2)
    backbone, features = retinanet.backbone, retinanet.head_in_features
    shapes = [backbone.output_shape()[name] for name in features]
    head = FCOSHead(input_shape=shapes, num_classes=4, conv_dims=[32], prior_prob=0.01)
    pixels = {"pixel_mean": step.cfg.MODEL.PIXEL_MEAN, "pixel_std": step.cfg.MODEL.PIXEL_STD}
    model = FCOS(backbone=backbone, head=head, head_in_features=features, num_classes=4, **pixels)
    with torch.no_grad():
        head.cls_score.bias.fill_(math.inf)
    report = diagnose(model.train(), step)
    assert report["first"]["term"] == "loss_cls" and report["first"]["level"] == "P3"
    assert "weight head.cls_score.bias is not finite" in report["cause"]


def test_float16_is_told_from_the_model():
    model, step = make_step(box_counts=(1,), precision="float16")
    step.batches[0][0]["image"] = step.batches[0][0]["image"][:, :64, :64]  # slow on the CPU
    with torch.no_grad():
        model.head.cls_score.weight.mul_(1e7)
    report = diagnose(model, step)
    assert "float16 overflows" in report["cause"] and "bfloat16" in report["cause"]


def test_a_sound_step_is_not_reproduced_and_the_model_left_alone():
    model, step = make_step()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    report = diagnose(model, step)
    assert report["reproduced"] is False and report["first"] is None
    assert isinstance(report["gradient"]["norm"], float)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for image, batch in zip(report["images"], step.batches[0], strict=True):
        assert len(image["boxes"]) == len(batch["instances"])
        assert list(image["max_logit"]) == ["P3", "P4", "P5", "P6", "P7"]
        assert image["max_logit"]["P3"] < 10


def test_losses_of_images_and_levels_sum_to_the_batchs():
    model, step = make_step("MODEL.RETINANET.LOSS_NORMALIZER", "foreground_batch")
    report = diagnose(model, step)
    batch = step.batches[0]
    losses = {name: loss.item() for name, loss in model(batch).items()}
    totals = {
        term: sum(sum(image["losses"][term].values()) for image in report["images"])
        for term in losses
    }
    # Both are divided by the same number of anchors.
    ratios = [totals[term] / losses[term] for term in losses]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    assert ratios[0] == pytest.approx(round(ratios[0]), rel=1e-4)


def test_micro_batches_are_one_step_and_told_apart():
    model, step = make_step("MODEL.RETINANET.LOSS_NORMALIZER", "foreground_batch")
    step.batches = [make_batch((2, 1)), make_batch((1, 3))]
    report = diagnose(model, step)
    sum(model([image for batch in step.batches for image in batch]).values()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad])
    assert report["gradient"]["norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert [image["batch"] for image in report["images"]] == [0, 0, 1, 1]

    step.batches[1][0] |= {"image": torch.full((3, 160, 192), math.nan), "image_id": 31}
    report = diagnose(model, step)
    assert "image id 31" in report["first"]["image"]
    bad = [image["max_logit"]["P3"] == "nan" for image in report["images"]]
    assert bad == [False, False, True, False]


def test_a_step_of_a_gpu_in_float16_is_repeated_on_a_cpu(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model, step = make_step("OUTPUT_DIR", str(tmp_path), box_counts=(1,), precision="float16")
    step.batches[0][0]["image"] = step.batches[0][0]["image"][:, :64, :64]
    with torch.no_grad():
        model.head.cls_score.weight.mul_(1e7)
    amp = ("SOLVER.AMP.ENABLED", True, "TEST.PRECISION", "float16", "MODEL.DEVICE", "cuda")
    step.cfg.merge_from_list(list(amp))
    report = diagnose(model, step)
    file = save_step(step, report, {"model": model.state_dict()})
    with caplog.at_level("INFO", "retinanet_ext"):
        assert replay_step(file.with_suffix(".pth")) == report
    assert "on cpu, which ran on cuda, its network in float16 by autocast" in caplog.text


@pytest.mark.usefixtures("no_check")
def test_a_saved_step_is_repeated_by_the_command(tmp_path):
    model, step = make_step("OUTPUT_DIR", str(tmp_path))
    step.cfg.DATASETS.CUSTOM.TRAIN_JSON = ["a.json", "b.json"]
    image = step.batches[0][1]["image"].float()
    image[0, 5, 5] = math.nan
    step.batches[0][1] |= {"image": image, "image_id": 12, "ignore_regions": torch.ones(1, 4)}
    report = diagnose(model, step)
    file = save_step(step, report, {"model": model.state_dict()})
    assert json.loads(file.read_text())["cause"] == report["cause"]
    assert replay_step(file.with_suffix(".pth")) == report

    replay = [sys.executable, "-m", "retinanet_ext", "replay", str(file.with_suffix(".pth"))]
    run = subprocess.run(replay, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == f"reproduced: {report['cause']}"


@pytest.mark.usefixtures("restore_logging")
def test_a_step_that_is_finite_this_time(tmp_path, capsys):
    model, step = make_step("OUTPUT_DIR", str(tmp_path))
    file = save_step(step, diagnose(model, step), {"model": model.state_dict()})
    assert main(["replay", str(file.with_suffix(".pth"))]) == 1
    assert capsys.readouterr().err.startswith("not reproduced: ")


def test_files_that_are_no_step_are_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pth")
    for name in ("other.pth", "none.pth"):
        with pytest.raises(InputError, match=f"{name} is missing, damaged or not a step"):
            replay_step(tmp_path / name)


def test_nothing_is_written_over_an_earlier_report(tmp_path):
    _, step = make_step("OUTPUT_DIR", str(tmp_path))
    names = [save_step(step, {"cause": "unknown"}, None).stem for _ in range(3)]
    assert names == [f"iter_0000007_rank1{suffix}" for suffix in ("", "-2", "-3")]
    assert not list(tmp_path.rglob("*.pth"))
