"""A run that was cut off and resumed ends as one that was not, bit for bit."""

import json
import logging
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import stress_kills
from retinanet_ext.engine.metrics import archive_superseded_metrics
from retinanet_ext.errors import InputError
from training import cut_off, make_trainer, start_train_net

ITERATIONS = 8
SAVED = "model_0000004.pth"

pytestmark = pytest.mark.usefixtures("restore_logging")


def read_metrics(folder, name="metrics.json"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "opts",
    [
        (),
        (
            *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
            *("SOLVER.GRAD_ACCUM_STEPS", 2, "MODEL.RETINANET.CLS_LOSS.NAME", "equalized_focal"),
        ),
        ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"),
        ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2, "TEST.EVAL_PERIOD", 3),
    ],
    ids=["plain", "accumulated", "bfloat16", "precise BatchNorm"],
)
def test_resumed_equals_uninterrupted(opts, tmp_path):
    """Its first part is loaded by workers, the second by none; and the other way round."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_trainer(whole, *opts).train()
    cut_off(make_trainer(parts, *opts, "DATALOADER.NUM_WORKERS", 2), 6)
    assert (parts / "last_checkpoint").read_text() == SAVED
    trainer = make_trainer(parts, *opts, resume=True)
    assert trainer.start_iter == 5
    trainer.train()
    assert stress_kills.differences(whole / "model_final.pth", parts / "model_final.pth") == []


def test_a_random_seed_travels_in_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, "SEED", -1)
    batches = []
    load = trainer._trainer.model.forward
    trainer._trainer.model.forward = lambda batch: batches.append(batch) or load(batch)
    trainer.train()
    assert torch.load(tmp_path / SAVED)["trainer"]["data"]["seed"] == trainer.data_loader.seed
    (tmp_path / "last_checkpoint").write_text(SAVED)
    resumed = make_trainer(tmp_path, "SEED", -1, resume=True)
    assert resumed.cfg.SEED == resumed.data_loader.seed == trainer.data_loader.seed
    for expected, batch in zip(batches[5:], resumed.data_loader, strict=False):
        assert [i["file_name"] for i in batch] == [i["file_name"] for i in expected]
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(batch, expected, strict=True)
        )


def test_random_numbers_of_an_iteration_do_not_depend_on_those_before(tmp_path):
    """Nor on the workers, which draw from the same generators where there are none."""

    def drawn(folder, *opts, resume=False):
        trainer = make_trainer(folder, *opts, resume=resume)
        numbers = {}
        load = trainer._trainer.model.forward

        def forward(batch):
            numbers[trainer.iter] = random.random(), np.random.rand(), torch.rand(()).item()
            return load(batch)

        trainer._trainer.model.forward = forward
        trainer.train()
        return numbers

    first = drawn(tmp_path / "first")
    assert len({number for numbers in first.values() for number in numbers}) == 3 * ITERATIONS
    (tmp_path / "first/last_checkpoint").write_text(SAVED)
    second = drawn(tmp_path / "first", "DATALOADER.NUM_WORKERS", 1, resume=True)
    assert second == {iteration: first[iteration] for iteration in (5, 6, 7)}


def test_settings_are_the_configs_from_the_first_iteration_on(tmp_path, caplog):
    """Detectron2 takes a learning rate of the old schedule, and all of the old optimizer."""
    make_trainer(tmp_path).train()
    (tmp_path / "last_checkpoint").write_text(SAVED)
    changed = ("SOLVER.MAX_ITER", 20, "SOLVER.BASE_LR", 0.001, "SOLVER.WEIGHT_DECAY", 0.001)
    fresh = make_trainer(tmp_path / "fresh", *changed)
    for _ in range(5):
        fresh.optimizer.step()
        fresh.scheduler.step()
    logger = logging.getLogger("retinanet_ext.engine.trainer")
    logger.addHandler(caplog.handler)
    resumed = make_trainer(tmp_path, *changed, resume=True)
    logger.removeHandler(caplog.handler)
    for a, b in zip(resumed.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
        assert a["params"] is not b["params"]
        a, b = ({k: v for k, v in group.items() if k != "params"} for group in (a, b))
        assert a == b
    assert resumed.scheduler.base_lrs == fresh.scheduler.base_lrs
    (message,) = {r.getMessage() for r in caplog.records if r.name == logger.name}
    assert re.search(r"lr \S+ -> \S+", message) and "weight_decay 0.0001 -> 0.001" in message
    assert "momentum" not in message


def test_a_schedule_that_has_ended_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(InputError, match="MAX_ITER 6 is less than the 8 iterations"):
        make_trainer(tmp_path, "SOLVER.MAX_ITER", 6, resume=True)


def test_another_optimizer_is_refused(tmp_path):
    cut_off(make_trainer(tmp_path), 6)
    with pytest.raises(InputError, match=r"SOLVER.OPTIMIZER AdamW: .* another optimizer"):
        make_trainer(tmp_path, "SOLVER.OPTIMIZER", "AdamW", resume=True)


def test_no_iteration_is_in_the_metrics_twice(tmp_path):
    """Detectron2's writer comes every 20 iterations."""
    opts = ("SOLVER.MAX_ITER", 60, "SOLVER.CHECKPOINT_PERIOD", 25)
    cut_off(make_trainer(tmp_path, *opts), 44)
    lines = read_metrics(tmp_path)
    assert {line["iteration"] for line in lines} == {19, 39, 43, 44}
    make_trainer(tmp_path, *opts, resume=True).train()
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [19, 39, 59]
    assert read_metrics(tmp_path, "metrics_superseded.json") == lines[1:]


def test_lines_set_aside_are_kept_and_never_lost(tmp_path):
    metrics = tmp_path / "metrics.json"
    lines = [f'{{"iteration": {number}, "total_loss": 1}}\n' for number in (19, 14, 39)]
    metrics.write_text("".join(lines) + '{"iteration": 5')  # a kill in the middle
    for _ in range(2):
        archive_superseded_metrics(metrics, 15)
        assert metrics.read_text() == lines[1]
        aside = tmp_path / "metrics_superseded.json"
        assert aside.read_text() == lines[0] + lines[2] + '{"iteration": 5'


@pytest.mark.parametrize("is_extended", [False, True])
def test_an_evaluation_after_the_last_iteration_is_kept_of_a_run_that_had_ended(
    is_extended, tmp_path
):
    metrics = tmp_path / "metrics.json"
    trained, evaluated = '{"iteration": 24, "total_loss": 1}\n', '{"iteration": 25, "AP": 1}\n'
    metrics.write_text(trained + evaluated)
    archive_superseded_metrics(metrics, 25, is_extended=is_extended)
    assert metrics.read_text() == trained + evaluated * is_extended


def test_a_finished_run_that_is_extended_keeps_its_evaluation(tmp_path):
    images = "tests/fixtures/bccd_mini/images"
    test = {"JSON": "tests/fixtures/bccd_mini/instances_val.json", "IMAGES": images}
    opts = [part for key, file in test.items() for part in (f"DATASETS.CUSTOM.TEST_{key}", file)]
    make_trainer(tmp_path, *opts).train()
    ended = read_metrics(tmp_path)
    assert ended[-1]["iteration"] == ITERATIONS and "bbox/AP" in ended[-1]
    make_trainer(tmp_path, *opts, "SOLVER.MAX_ITER", 12, resume=True).train()
    assert read_metrics(tmp_path)[: len(ended)] == ended
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [7, 8, 11, 12]
    assert not (tmp_path / "metrics_superseded.json").exists()
    make_trainer(tmp_path, *opts, "SOLVER.MAX_ITER", 12, resume=True).train()  # evaluates again
    assert [line["iteration"] for line in read_metrics(tmp_path)[:-1]] == [7, 8, 11]
    assert "bbox/AP" in read_metrics(tmp_path)[-1]


def test_processes_that_find_other_checkpoints_are_told_apart(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda name: [name, SAVED])
    with pytest.raises(InputError, match=f"process 0 finds no checkpoint there, another {SAVED}"):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize("num_processes", ["1", "2"])
def test_sigterm_to_all_processes_saves_and_says_how_to_go_on(num_processes, tmp_path):
    """As Slurm sends it, to the workers of the data loader too."""
    opts = ("SOLVER.MAX_ITER", 5000, "SOLVER.CHECKPOINT_PERIOD", 3, "DATALOADER.NUM_WORKERS", 1)
    run = start_train_net(
        *("--num-gpus", num_processes, "OUTPUT_DIR", tmp_path, *opts),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / SAVED.replace("4", "5")).exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 143, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    stopped = re.search(r"stopped by SIGTERM after iteration (\d+), saved as (\S+\.pth)", last)
    assert stopped and last.endswith("--resume goes on")
    saved = Path(stopped[2])
    assert saved.name == f"model_{int(stopped[1]):07d}.pth"
    assert (tmp_path / "last_checkpoint").read_text() == saved.name
    content = torch.load(saved)
    assert content["iteration"] == content["trainer"]["iteration"] == int(stopped[1])
    batch = 2
    assert content["trainer"]["data"]["num_images"] == batch * (int(stopped[1]) + 1)
