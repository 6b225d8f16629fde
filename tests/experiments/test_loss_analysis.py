"""The loss analysis of a checkpoint, against the training loss of all anchors."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances

from detectors import make_batch, make_model
from retinanet_ext.analysis.loss_cdf import GAMMAS, WindowSample
from retinanet_ext.cli import main
from retinanet_ext.data import prepare_datasets
from retinanet_ext.engine import Trainer, load_config
from retinanet_ext.errors import InputError, explain
from retinanet_ext.experiments.loss_analysis import analyze_loss, sample_windows
from retinanet_ext.losses import LOSSES
from retinanet_ext.modeling.criterion import RetinaNetCriterion

CONFIG = "tests/engine/tiny.yaml"
CPU = ("MODEL.DEVICE", "cpu")
TEST_JSON = Path("tests/fixtures/bccd_mini/instances_val.json")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint with random weights and outputs that are spread out."""
    cfg = load_config(CONFIG, [*CPU, "MODEL.RETINANET.NUM_CLASSES", "3"])
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        model.head.cls_score.weight *= 50
    path = tmp_path_factory.mktemp("checkpoint") / "model_final.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class AnchorsSeen(RetinaNetCriterion):
    """The training loss without alpha, which keeps each anchor's."""

    def forward(self, anchors, logits, deltas, labels, matches, gt_boxes):
        rows = torch.cat([permute_to_N_HWA_K(level, self.num_classes) for level in logits], dim=1)
        self.losses.append(self.anchor_losses(rows, labels)[labels >= 0])
        self.foreground.append(((labels >= 0) & (labels < self.num_classes))[labels >= 0])


@torch.no_grad()
def training_losses(model, batch, gamma):
    """Return the loss of all anchors that are not ignored and whether they are foreground."""
    criterion = AnchorsSeen(
        num_classes=model.num_classes,
        cls_loss=LOSSES["focal"].bind(gamma=gamma),
        box2box_transform=model.box2box_transform,
    )
    criterion.losses, criterion.foreground = [], []
    trained, model.criterion = model.criterion, criterion
    for inputs in batch:
        images = model.preprocess_image([inputs])
        levels = model.backbone(images.tensor)
        features = [levels[name] for name in model.head_in_features]
        model.forward_training(images, features, model.head(features), [inputs["instances"]])
    model.criterion = trained
    return torch.cat(criterion.losses).double(), torch.cat(criterion.foreground)


def hardest(losses, fraction):
    losses = losses.sort(descending=True).values
    upto = np.cumsum([0, *losses.tolist()])
    return np.interp(fraction, np.linspace(0, 1, len(upto)), upto / upto[-1])


def test_anchors_as_a_whole_have_the_training_loss():
    model = make_model().eval()
    with torch.no_grad():
        model.head.cls_score.weight *= 50
    batch = make_batch([3, 0, 2])
    sample = WindowSample()
    sample_windows(model, [[inputs] for inputs in batch], len(batch), sample)
    curves = {(c.reading, c.side, c.gamma): c for c in sample.curves()}
    for gamma in GAMMAS:
        losses, foreground = training_losses(model, batch, gamma)
        for side, chosen in (("positive", foreground), ("negative", ~foreground)):
            curve = curves["anchor", side, gamma]
            assert curve.seen == chosen.sum()
            assert curve.mean_loss == pytest.approx(losses[chosen].mean().item(), rel=1e-5)
            for fraction, share in curve.hardest.items():
                assert share == pytest.approx(hardest(losses[chosen], fraction), rel=1e-4)
        # Every entry of every anchor is one pair.
        pairs = [curves["pair", side, gamma] for side in ("positive", "negative")]
        assert sum(c.seen for c in pairs) == len(losses) * model.num_classes
        assert sum(c.seen * c.mean_loss for c in pairs) == pytest.approx(
            losses.sum().item(), rel=1e-5
        )


@pytest.fixture(scope="module")
def result(weights):
    text = analyze_loss(CONFIG, str(weights), CPU)
    return text, weights.parent / "loss_cdf-test"


def curve_of(content, reading, side, gamma):
    key = (reading, side, gamma)
    (curve,) = (c for c in content["curves"] if (c["reading"], c["side"], c["gamma"]) == key)
    return curve


def read_json(folder):
    return json.loads((folder / "loss_cdf.json").read_text())


def test_files_and_text(result):
    text, folder = result
    suffixes = {path.suffix for path in folder.glob("loss_cdf.*")}
    assert suffixes == {".json", ".svg", ".png"} and len(list(folder.iterdir())) == 3
    content = read_json(folder)
    assert content["format"] == 1 and content["num_images"] == 2 and content["seed"] == 0
    assert content["dataset"] == ["custom_test"]
    assert len(content["fractions"]) <= 201 and len(content["curves"]) == 16
    for curve in content["curves"]:
        assert len(curve["cdf"]) == len(content["fractions"])
        assert curve["cdf"] == sorted(curve["cdf"]) and curve["cdf"][-1] == pytest.approx(1)
        assert curve["sampled"] == curve["seen"] > 0
    negative = curve_of(content, "anchor", "negative", 2)
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["2"])
    assert row[-4:] == [f"{100 * negative['hardest']['0.2']:.1f}", "%", "99.0", "%"]
    assert content["text"] in text and text.splitlines()[-1] == content["conclusion"]


def test_result_is_that_of_all_anchors(result, weights):
    """Against the training loss on the images and boxes of the json, scaled to the test size."""
    cfg = load_config(CONFIG, CPU)
    prepare_datasets(cfg, eval_only=True)
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    batch = [inputs for (inputs,) in Trainer.build_test_loader(cfg, "custom_test")]
    annotations = json.loads(TEST_JSON.read_text())["annotations"]
    for inputs in batch:
        assert inputs["image"].shape == (3, 96, 128)
        assert (inputs["height"], inputs["width"]) == (480, 640)
        own = [a for a in annotations if a["image_id"] == inputs["image_id"]]
        boxes = torch.tensor([a["bbox"] for a in own]) / 5
        boxes[:, 2:] += boxes[:, :2]
        inputs["instances"] = Instances((96, 128))
        inputs["instances"].gt_boxes = Boxes(boxes)
        inputs["instances"].gt_classes = torch.tensor([a["category_id"] - 1 for a in own])
    content = read_json(result[1])
    for gamma in GAMMAS:
        losses, foreground = training_losses(model, batch, gamma)
        for side, chosen in (("positive", foreground), ("negative", ~foreground)):
            curve = curve_of(content, "anchor", side, gamma)
            assert curve["seen"] == chosen.sum()
            for fraction, share in curve["hardest"].items():
                expected = hardest(losses[chosen], float(fraction))
                assert share == pytest.approx(expected, rel=1e-4)


def test_images_and_windows_are_sampled_by_the_seed(weights, tmp_path, monkeypatch):
    small = partial(WindowSample, num_positives=20, num_negatives=500)
    monkeypatch.setattr("retinanet_ext.experiments.loss_analysis.WindowSample", small)
    options = {"dataset": "train", "num_images": 2}

    def run(name, seed):
        analyze_loss(CONFIG, str(weights), CPU, seed=seed, output=tmp_path / name, **options)
        return read_json(tmp_path / name)

    first = run("first", 0)
    assert first["dataset"] == ["custom_train"] and first["num_images"] == 2
    for curve in first["curves"]:
        assert curve["sampled"] == {"positive": 20, "negative": 500}[curve["side"]] < curve["seen"]
    assert run("again", 0) == first
    assert (tmp_path / "first/loss_cdf.svg").read_bytes() == (
        tmp_path / "again/loss_cdf.svg"
    ).read_bytes()
    assert run("other", 1)["curves"] != first["curves"]


# What is refused.


@pytest.fixture
def refuse(weights, tmp_path):
    """Run an analysis that must end in an error and leave no file, and return its one line."""

    def run(*opts, weights=weights, **kwargs):
        with pytest.raises(InputError) as raised:
            arguments = {"output": tmp_path / "result", **kwargs}
            analyze_loss(CONFIG, str(weights), [*CPU, *opts], **arguments)
        assert contents(tmp_path / "result") == {}
        code, line = explain(raised.value)
        assert code == 2
        return line

    return run


def test_numbers_and_names(refuse):
    assert "--num-images" in refuse(num_images=0)
    assert "--seed" in refuse(seed=-1)
    assert "none.json" in refuse("DATASETS.CUSTOM.TEST_JSON", "none.json")
    assert "unknown key MODEL.DEPTH" in refuse("MODEL.DEPTH", "18")
    assert "no model" in refuse("MODEL.RESNETS.DEPTH", "19")


def test_weights_that_do_not_fit(refuse, tmp_path):
    assert "--weights 'none.pth' is not a file" in refuse(weights="none.pth")
    assert "--weights '' is not a file" in refuse(weights="")
    assert "README.md" in refuse(weights="README.md")
    assert "name one with --output" in refuse(weights="https://host/model.pth", output=None)
    torch.save({"model": make_model().state_dict()}, tmp_path / "other.pth")
    assert "other.pth have other shapes" in refuse(weights=tmp_path / "other.pth")


def test_model_without_anchors_labelled_by_iou(refuse):
    assert "FCOS" in refuse("MODEL.META_ARCHITECTURE", "FCOS")


def test_weights_of_a_training_that_diverged(refuse, weights, tmp_path):
    checkpoint = torch.load(weights)
    checkpoint["model"]["head.cls_score.bias"][3] = float("nan")
    torch.save(checkpoint, tmp_path / "diverged.pth")
    line = refuse(weights=tmp_path / "diverged.pth")
    assert "BloodImage" in line and "is not finite" in line


def test_data_without_positives(refuse, tmp_path):
    content = json.loads(TEST_JSON.read_text())
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**content, "annotations": []}))
    line = refuse("DATASETS.CUSTOM.TEST_JSON", str(empty))
    assert "no object is annotated in 2 images of custom_test" in line
    # Objects there are, but no anchor reaches them.
    reach = ("MODEL.RETINANET.IOU_THRESHOLDS", "[0.99, 0.995]")
    line = refuse(*reach, "MODEL.RETINANET.LOW_QUALITY_MATCHES", "none")
    assert "no positive window" in line


@pytest.mark.parametrize("suffix", [".json", ".svg", ".png"])
def test_earlier_result_is_left_alone(suffix, weights, tmp_path):
    (tmp_path / f"loss_cdf{suffix}").write_text("earlier")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"loss_cdf{suffix} is an earlier result.*--output"):
        analyze_loss(CONFIG, str(weights), CPU, output=tmp_path)
    assert contents(tmp_path) == before


def test_output_that_cannot_be_written(weights, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"folder .*file/result cannot be made"):
        analyze_loss(CONFIG, str(weights), CPU, output=tmp_path / "file" / "result")


def test_command_line(weights, tmp_path, monkeypatch, capsys):
    # Its handlers would stay for the tests that follow.
    monkeypatch.setattr("detectron2.utils.logger.setup_logger", lambda name: None)

    def run(*argv):
        return main(["analyze-loss", *map(str, argv)])

    common = ["--config-file", CONFIG, "--weights", weights, "--output", tmp_path / "result"]
    assert run(*common, "--num-images", "1", *CPU) == 0
    *_, conclusion = capsys.readouterr().out.splitlines()
    assert conclusion.startswith("At gamma 0 the easiest 80 % of the negative anchors carry")
    content = read_json(tmp_path / "result")
    assert content["num_images"] == 1 and content["conclusion"] == conclusion

    assert run(*common, *CPU) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("retinanet-ext analyze-loss: error: ") and "earlier result" in error
