"""A training step: accumulated gradients, and what happens to one that is not finite."""

import copy
import json
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from detectors import make_batch, make_cfg
from retinanet_ext.engine.replay import replay_step
from retinanet_ext.engine.train_step import AccumulatingTrainer, unwrap
from retinanet_ext.errors import NonFiniteError
from retinanet_ext.modeling.criterion import NORMALIZERS

ROOT = Path(__file__).parents[2]
SIZE = (64, 64)  # of all images: padding is a batch's own


def make_images(box_counts, seed):
    return [make_batch([n], size=SIZE, seed=10 * seed + i)[0] for i, n in enumerate(box_counts)]


BATCHES = [make_images((3, 0, 2, 1), seed=0), make_images((0, 0, 4, 0), seed=1)]


def make_trainer(*opts, batches=BATCHES, norm="FrozenBN"):
    """A trainer in double precision, its batches cut up by SOLVER.GRAD_ACCUM_STEPS."""
    cfg = make_cfg("SOLVER.BASE_LR", 0.001, "MODEL.RESNETS.NORM", norm, *opts)
    torch.manual_seed(0)
    model = build_model(cfg).double()
    size = len(batches[0]) // cfg.SOLVER.GRAD_ACCUM_STEPS
    parts = [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]
    return AccumulatingTrainer(model, parts, build_optimizer(cfg, model), cfg)


def run(trainer, steps=2):
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            storage.iter = trainer.iter
            trainer.run_step()
    return {name: value for name, (value, _) in storage.latest().items()}


def weights(trainer):
    """Return the weights, and the statistic of a loss that has one."""
    named = trainer.model.named_parameters()
    found = {name.removeprefix("module."): p.detach().clone() for name, p in named}
    loss = unwrap(trainer.model).criterion.cls_loss
    return found | (loss.state_dict() if isinstance(loss, nn.Module) else {})


def assert_same_weights(found, expected):
    for name, weight in expected.items():
        assert_close(found[name], weight, rtol=1e-9, atol=1e-12, msg=name)


def normalized_by(name):
    return ("MODEL.RETINANET.LOSS_NORMALIZER", name)


SETTINGS = [
    *[normalized_by(name) for name in NORMALIZERS],
    ("MODEL.RETINANET.SELECTION.NAME", "ohem", *normalized_by("selected")),
    ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01),
]


@pytest.mark.parametrize("opts", SETTINGS, ids=lambda opts: str(opts[-1]))
def test_micro_batches_are_one_batch(opts):
    """In double precision to rounding: after two steps, images without boxes among them."""
    whole = make_trainer(*opts)
    expected_losses = run(whole)
    parts = make_trainer(*opts, "SOLVER.GRAD_ACCUM_STEPS", 4)
    losses = run(parts)
    assert_same_weights(weights(parts), weights(whole))
    for name in ("total_loss", "loss_cls", "loss_box_reg"):
        assert losses[name] == pytest.approx(expected_losses[name], rel=1e-9)
    assert_close(parts.model.criterion.loss_normalizer, whole.model.criterion.loss_normalizer)


CASES = [
    ("foreground_ema", 2, "focal"),
    ("foreground", 1, "focal"),
    ("foreground_batch", 1, "ghm_c"),
    ("selected", 2, "equalized_focal"),
]
"""Normalisers, numbers of micro-batches and losses that two processes train with."""

EMPTY_SHARE = [make_images((3, 2, 0, 0), seed=2)] * 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_process_without_boxes_changes_nothing(device, tmp_path):
    """Two processes, of which the second has only images without boxes, train as one does."""
    command = [sys.executable, "tests/engine/two_processes.py", str(tmp_path), device]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {normalizer for normalizer, _, _ in CASES} == set(NORMALIZERS)
    for normalizer, _, loss in CASES:
        opts = (*normalized_by(normalizer), "MODEL.RETINANET.CLS_LOSS.NAME", loss)
        one = make_trainer(*opts, "MODEL.DEVICE", device, batches=EMPTY_SHARE)
        run(one)
        for rank in range(2):
            found = torch.load(tmp_path / f"{normalizer}-{rank}.pth")
            assert_same_weights(found, weights(one))


def test_models_without_such_a_criterion_get_the_mean_of_their_micro_batches():
    model = Toy()
    cfg = make_cfg("SOLVER.GRAD_ACCUM_STEPS", 2)
    trainer = AccumulatingTrainer(
        model, [1.0, 3.0], torch.optim.SGD(model.parameters(), lr=1.0), cfg
    )
    losses = run(trainer, steps=1)
    assert model.weight.item() == 1 - 2 and losses["total_loss"] == 2


class Toy(nn.Module):
    """Whose loss is its one weight times the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return self.weight * batch


def spoil(batch):
    """Return the batch, with a pixel of its second image that is not a number."""
    batch = copy.deepcopy(batch)
    batch[1] |= {"file_name": "1.png", "image": batch[1]["image"].float()}
    batch[1]["image"][0, 5, 5] = math.nan
    return batch


SKIP = ("SOLVER.NON_FINITE.POLICY", "skip")


def test_a_skipped_step_changes_nothing(tmp_path, caplog):
    good = [BATCHES[0]] * 2
    spoilt = [good[0], spoil(good[0]), spoil(good[0]), good[0]]
    opts = ("OUTPUT_DIR", str(tmp_path), *SKIP, "MODEL.RETINANET.CLS_LOSS.NAME", "ghm_c")
    expected = make_trainer(*opts, batches=good, norm="BN")
    run(expected)
    trainer = make_trainer(*opts, batches=spoilt, norm="BN")
    with caplog.at_level(logging.WARNING, "retinanet_ext"):
        scalars = run(trainer, steps=4)
    for name, tensor in expected.model.state_dict().items():  # statistics and normaliser too
        assert torch.equal(trainer.model.state_dict()[name], tensor), name
    momenta, others = (t.state_dict()["optimizer"]["state"].values() for t in (expected, trainer))
    for own, other in zip(momenta, others, strict=True):
        assert torch.equal(own["momentum_buffer"], other["momentum_buffer"])

    assert scalars["skipped_steps"] == 2 and math.isfinite(scalars["total_loss"])
    assert trainer.state_dict()["skipped_steps"] == 2
    (first, second) = [record.getMessage() for record in caplog.records]
    assert first.startswith("Skipped the step at iteration 1: loss_cls nan")
    assert "image 1.png (image id None) has pixel values that are not finite" in first
    assert second.endswith("(2 so far)")
    # Each is reported, the first whole.
    names = sorted(path.name for path in (tmp_path / "non_finite").iterdir())
    assert names == [
        "iter_0000001_rank0.json",
        "iter_0000001_rank0.pth",
        "iter_0000002_rank0.json",
    ]


def test_no_more_steps_are_skipped_than_allowed(tmp_path):
    opts = ("OUTPUT_DIR", str(tmp_path), *SKIP, "SOLVER.NON_FINITE.MAX_SKIPPED", 1)
    batches = [spoil(BATCHES[0]), BATCHES[0], spoil(BATCHES[0])]
    trainer = make_trainer(*opts, batches=batches)
    with pytest.raises(NonFiniteError, match=r"diverged at iteration 2: .*; 1 steps were skipped"):
        run(trainer, steps=3)


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("non_finite.diagnose", torch.OutOfMemoryError("no room")),
        ("instrumented_pass.compute_losses", RuntimeError("of a hook")),
        ("non_finite.InstrumentedPass.describe_images", KeyError("P3")),
        ("train_step.save_step", TypeError("no such type")),
    ],
)
def test_a_failed_explanation_changes_no_verdict(fails, error, tmp_path, monkeypatch):
    """A step that is to be skipped is, one that is to end the run does, and why is said."""

    def fail(*args, **kwargs):
        raise error

    batches = [spoil(BATCHES[0]), BATCHES[0], spoil(BATCHES[0])]
    opts = ("OUTPUT_DIR", str(tmp_path), *SKIP, "SOLVER.NON_FINITE.MAX_SKIPPED", 1)
    trainer = make_trainer(*opts, batches=batches)
    monkeypatch.setattr(f"retinanet_ext.engine.{fails}", fail)
    what = "it cannot be saved" if fails == "train_step.save_step" else "the explanation failed"
    expected = f"diverged at iteration 2: .*; {what}: {type(error).__name__}: .*1 steps were"
    with pytest.raises(NonFiniteError, match=expected):
        run(trainer, steps=3)
    assert not any(module._forward_hooks for module in trainer.model.modules())
    for file in (tmp_path / "non_finite").glob("*.json"):
        assert str(error) in json.loads(file.read_text())["cause"]


def test_an_error_leaves_the_weights_as_they_were(tmp_path):
    trainer = make_trainer(
        *("OUTPUT_DIR", str(tmp_path), "SOLVER.GRAD_ACCUM_STEPS", 2), batches=[spoil(BATCHES[0])]
    )
    before = weights(trainer)
    with pytest.raises(NonFiniteError) as raised:
        run(trainer)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(trainer).items())
    _, _, file = str(raised.value).rpartition("see ")
    report = json.loads(Path(file).read_text())
    assert [image["batch"] for image in report["images"]] == [0, 0, 1, 1]
    assert "1.png" in report["first"]["image"]


class Steep(nn.Module):
    """A loss of 0 whose gradient is as steep as its batch says."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        slope, change = batch[0]["slope"], self.weight - self.weight.detach()
        return {"loss": change.sqrt() if slope == math.inf else change * slope}


def make_float16(slopes, tmp_path, *opts):
    cfg = make_cfg("OUTPUT_DIR", str(tmp_path), "SOLVER.AMP.ENABLED", True, *opts)
    model = Steep()
    batches = [[make_batch([1])[0] | {"slope": slope}] for slope in slopes]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-36 * cfg.SOLVER.BASE_LR)
    return AccumulatingTrainer(model, batches, maybe_add_gradient_clipping(cfg, optimizer), cfg)


def test_float16_finds_its_scale_without_an_error(tmp_path):
    trainer = make_float16([1e35] * 8, tmp_path)
    run(trainer, steps=8)
    scale = trainer.state_dict()["grad_scaler"]["scale"]
    assert 1 < scale < 2**16  # 1e35 times the first is beyond float32
    assert trainer.model.weight < 1
    assert trainer.skipped_steps == 0


def test_gradients_are_clipped_at_their_own_size_in_float16(tmp_path):
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.25)
    trainer = make_float16([0.125, 3.0], tmp_path, *clip, "SOLVER.BASE_LR", 1e36)
    run(trainer)
    assert trainer.model.weight.item() == 1 - 0.125 - 0.25


def test_the_scaler_is_saved_and_loaded(tmp_path):
    trainer = make_float16([1e35] * 8, tmp_path)
    run(trainer, steps=8)
    other = make_float16([], tmp_path)
    other.load_state_dict(trainer.state_dict())
    assert other.grad_scaler.state_dict() == trainer.grad_scaler.state_dict()


def test_float16_stops_where_no_scale_helps(tmp_path):
    trainer = make_float16([math.inf] * 40, tmp_path)
    with pytest.raises(NonFiniteError):
        run(trainer, steps=40)
    assert trainer.iter < 20 and trainer.model.weight == 1


def test_a_request_to_stop_is_agreed_on_with_the_step():
    trainer = make_trainer()
    run(trainer, steps=1)
    assert trainer.stop_agreed is False
    trainer.stop_requested = True
    run(trainer, steps=1)
    assert trainer.stop_agreed is True


FAULTS = {1: "pixels", 2: "box", 3: "weight"}


def faulty_train(faults, folder, *opts):
    planted = ",".join(f"{iteration}:{fault}" for iteration, fault in faults.items())
    command = [sys.executable, "tests/engine/faulty_train.py", planted]
    command += ["--config-file", "tests/engine/resume.yaml", "--num-gpus", "2"]
    command += ["OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "5"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"
    done = subprocess.run(
        [*command, *opts], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    # Python's resource tracker may warn, in two lines, after the processes have ended, and the
    # process that was left alone may be the last to say so.
    others = re.compile("resource_tracker|the connection to another process is lost")
    lines = [line for line in done.stderr.splitlines() if not others.search(line)]
    return done.returncode, done.stdout, lines[-1]


def test_faults_on_one_of_two_processes_end_both_and_are_named(tmp_path):
    """Two steps are skipped, the third ends the run; Detectron2's model takes any box."""
    code, output, line = faulty_train(
        *(FAULTS, tmp_path / "run", "MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("SOLVER.NON_FINITE.POLICY", "skip", "SOLVER.NON_FINITE.MAX_SKIPPED", "2"),
    )
    assert code == 3
    skipped = [text for text in output.splitlines() if "Skipped the step" in text]
    assert len(skipped) == 2 and all("on rank 1; " in text for text in skipped)
    assert "has pixel values that are not finite" in skipped[0]
    assert "box 0 of image " in skipped[1] and "is degenerate (zero area" in skipped[1]
    assert (
        "diverged at iteration 3: loss_cls" in line and "on rank 1; weight head.bbox_pred" in line
    )
    assert line.endswith("; 2 steps were skipped")

    reports = tmp_path / "run/non_finite"
    names = sorted(path.name for path in reports.iterdir())
    assert names == [
        "iter_0000001_rank1.json",
        "iter_0000001_rank1.pth",
        "iter_0000002_rank1.json",
        "iter_0000003_rank1.json",
        "iter_0000003_rank1.pth",
    ]
    for number, fault in FAULTS.items():
        report = json.loads((reports / f"iter_000000{number}_rank1.json").read_text())
        assert (report["iteration"], report["rank"], report["num_processes"]) == (number, 1, 2)
        assert len(report["images"]) == 2  # this process's share
        image = report["images"][1]
        if fault == "weight":
            assert report["weights"]["not_finite"]["name"] == "head.bbox_pred.weight"
        else:
            assert image["file_name"] in report["first"]["image"]
            assert all(box["class"] in ("RBC", "WBC", "Platelets") for box in image["boxes"])
        if fault != "box":
            again = replay_step(reports / f"iter_000000{number}_rank1.pth")
            assert again["reproduced"] and again["cause"] == report["cause"]


def test_boxes_that_diverge_on_one_of_two_processes_get_the_verdict(tmp_path):
    """Of an IoU loss, whose usual forms assert that boxes are valid."""
    code, output, line = faulty_train(
        *({1: "weight"}, tmp_path / "run", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "giou"),
        *("SOLVER.NON_FINITE.POLICY", "skip", "SOLVER.NON_FINITE.MAX_SKIPPED", "1"),
    )
    assert code == 3 and output.count("Skipped the step") == 1
    assert "diverged at iteration 2: loss_cls" in line and "loss_box_reg nan on rank 1" in line


def test_what_one_of_two_processes_cannot_explain_holds_up_none(tmp_path):
    """A step that is skipped all the same; then a refused box, which ends both."""
    code, output, line = faulty_train(
        {1: "unexplained", 2: "box"}, tmp_path / "run", "SOLVER.NON_FINITE.POLICY", "skip"
    )
    assert code == 2
    assert (
        "tests/fixtures/bccd_mini/images/" in line
        and "is degenerate (zero area, inverted or not finite)" in line
    )
    assert "on rank 1; the explanation failed: MemoryError: no room; see " in output
    saved = tmp_path / "run/non_finite/iter_0000001_rank1.pth"
    assert "has pixel values that are not finite" in replay_step(saved)["cause"]
