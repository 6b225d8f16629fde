"""The best model, early stopping, and both across a resume."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stress_kills
from retinanet_ext.engine.config_check import check_config
from retinanet_ext.errors import InputError
from training import ROOT, CutOffError, cut_off, make_trainer, start_train_net

FIXTURE = "tests/fixtures/bccd_mini"
TEST_DATA = (
    *("DATASETS.CUSTOM.TEST_JSON", f"{FIXTURE}/instances_val.json"),
    *("DATASETS.CUSTOM.TEST_IMAGES", f"{FIXTURE}/images", "TEST.DETECTION_GRID.NUM_IMAGES", 0),
)
BEST = ("SOLVER.BEST.METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 12)
OPTS = (*TEST_DATA, *BEST)
# AP after so many iterations.
APS = {2: 10.0, 4: 30.0, 6: 20.0, 8: 30.0, 10: 25.0, 12: 28.0}

pytestmark = pytest.mark.usefixtures("restore_logging")


def script(trainer, aps=APS):
    """Give evaluations that AP, so that the moments of better and worse ones are known."""
    trainer.evaluations = []

    def evaluate():
        num_steps = trainer.scheduler.last_epoch
        trainer.evaluations.append(num_steps)
        trainer._last_eval_results = {"bbox": {"AP": aps[num_steps], "AP50": math.nan}}
        return trainer._last_eval_results

    trainer._evaluate = evaluate
    return trainer


def scripted(folder, *opts, aps=APS, resume=False):
    return script(make_trainer(folder, *OPTS, *opts, resume=resume), aps)


def best(folder):
    content = torch.load(folder / "model_best.pth", weights_only=True)
    return content["metric"], content["value"], content["iteration"]


def test_the_best_model_is_kept_and_is_not_the_last_checkpoint(tmp_path):
    trainer = scripted(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 4)
    weights = {}
    save = trainer.checkpointer.save
    trainer.checkpointer.save = lambda name, **kwargs: (
        weights.update({name: {k: v.clone() for k, v in trainer.model.state_dict().items()}}),
        save(name, **kwargs),
    )
    trainer.train()
    assert best(tmp_path) == ("bbox/AP", 30.0, 3)
    content = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert content["class_names"] == ["RBC", "WBC", "Platelets"] and "trainer" not in content
    expected = weights["model_0000003"]
    assert all(torch.equal(content["model"][name], expected[name]) for name in expected)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_final.pth").unlink()
    assert "model_best" not in trainer.checkpointer.get_checkpoint_file()


PATIENCE = ("SOLVER.EARLY_STOP.PATIENCE", 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run, which stops after 10 iterations."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    scripted(folder, *PATIENCE).train()
    return folder


def assert_same_end(folder, expected):
    for name in ("model_best.pth", "model_final.pth"):
        assert stress_kills.differences(folder / name, expected / name) == []


@pytest.mark.parametrize(
    ("checkpoint_period", "evaluation", "first_again"),
    [(2, 4, 4), (2, 10, 10), (5, 4, 2), (5, 8, 6)],
)
def test_a_run_cut_off_in_an_evaluation_ends_as_the_uninterrupted_one(
    checkpoint_period, evaluation, first_again, whole, tmp_path
):
    """A checkpoint of the same iteration precedes the evaluation, which a resumed run makes up."""
    opts = (*PATIENCE, "SOLVER.CHECKPOINT_PERIOD", checkpoint_period)
    trainer = scripted(tmp_path, *opts)
    evaluate = trainer._evaluate

    def evaluate_or_end():
        if trainer.scheduler.last_epoch == evaluation:
            raise CutOffError
        return evaluate()

    trainer._evaluate = evaluate_or_end
    with pytest.raises(CutOffError):
        trainer.train()
    resumed = scripted(tmp_path, *opts, resume=True)
    resumed.train()
    assert resumed.evaluations[0] == first_again
    assert_same_end(tmp_path, whole)


def test_a_run_cut_off_after_its_best_evaluation_ends_as_the_uninterrupted_one(whole, tmp_path):
    """The checkpoint does not know of the evaluation of its own iteration."""
    opts = (*PATIENCE, "SOLVER.CHECKPOINT_PERIOD", 4)
    cut_off(scripted(tmp_path, *opts), 4)
    assert best(tmp_path) == ("bbox/AP", 30.0, 3)
    resumed = scripted(tmp_path, *opts, resume=True)
    assert resumed.start_iter == 4
    resumed.train()
    assert resumed.evaluations == [4, 6, 8, 10]
    assert_same_end(tmp_path, whole)


def test_early_stop_is_a_normal_end(tmp_path, caplog):
    logger = logging.getLogger("retinanet_ext.engine.trainer")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    opts = ("SOLVER.EARLY_STOP.PATIENCE", 2)
    trainer = scripted(tmp_path, *opts)
    results = trainer.train()
    logger.removeHandler(caplog.handler)
    assert trainer.evaluations == [2, 4, 6, 8] and results["bbox"]["AP"] == 30.0
    assert "Early stop after iteration 7: bbox/AP was 30.0000 after iteration 3" in caplog.text
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == final["trainer"]["iteration"] == 7
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1]["iteration"] == 7 and lines[-1]["bbox/AP"] == 30.0
    # The same command again trains nothing.
    again = scripted(tmp_path, *opts, resume=True)
    assert again.start_iter == 8
    assert again.train()["bbox"]["AP"] == 30.0 and again.evaluations == [8]
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 7
    # More patience goes on from there.
    longer, whole = ("SOLVER.EARLY_STOP.PATIENCE", 4), tmp_path / "whole"
    assert scripted(tmp_path, *longer, resume=True).train()["bbox"]["AP"] == 28.0
    scripted(whole, *longer).train()
    assert_same_end(tmp_path, whole)


def test_a_run_that_ended_and_is_extended_counts_its_last_evaluation(tmp_path):
    aps = {**APS, 11: 40.0}
    scripted(tmp_path, "SOLVER.MAX_ITER", 11, aps=aps).train()
    assert best(tmp_path) == ("bbox/AP", 40.0, 10)
    scripted(tmp_path, aps=aps, resume=True).train()
    assert best(tmp_path) == ("bbox/AP", 40.0, 10)


def test_another_metric_is_searched_anew(tmp_path):
    opts = ("SOLVER.MAX_ITER", 4)
    scripted(tmp_path, *opts).train()
    loss = ("SOLVER.BEST.METRIC", "validation/total_loss", "TEST.LOSS", True)
    trainer = make_trainer(tmp_path, *OPTS, *loss, resume=True)
    trainer.train()
    metric, value, iteration = best(tmp_path)
    assert metric == "validation/total_loss" and iteration in (5, 7, 9, 11)
    # The lowest loss is the best.
    final = trainer._last_eval_results["validation"]["total_loss"]
    assert value <= final


def test_a_metric_of_absent_objects_ends_the_run(tmp_path):
    with pytest.raises(InputError, match="bbox/AP50 is undefined, because the test data have no"):
        scripted(tmp_path, "SOLVER.BEST.METRIC", "bbox/AP50").train()


KILLED = """
import os, pathlib, signal, sys
from test_model_selection import scripted
trainer = scripted(pathlib.Path(sys.argv[1]), *sys.argv[2:])
evaluate = trainer._evaluate
def evaluate_and_die():
    if trainer.scheduler.last_epoch == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate()
trainer._evaluate = evaluate_and_die
trainer.train()
"""


def test_a_kill_in_an_evaluation_changes_nothing(whole, tmp_path):
    opts = (*PATIENCE, "SOLVER.CHECKPOINT_PERIOD", 4)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/engine")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, *map(str, (tmp_path, *opts))]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    scripted(tmp_path, *opts, resume=True).train()
    assert_same_end(tmp_path, whole)


def test_two_processes_agree(tmp_path):
    """With the real evaluation, in which AP stays 0: the first is the best."""
    opts = (*OPTS, "TEST.EVAL_PERIOD", 1, "SOLVER.EARLY_STOP.PATIENCE", 1, "TEST.LOSS", True)
    opts += ("MODEL.RESNETS.NORM", "FrozenBN", "INPUT.MIN_SIZE_TRAIN", "[64]")
    opts += ("SOLVER.EMA.DECAY", 0.9)
    two, one = tmp_path / "two", tmp_path / "one"
    run = start_train_net(
        *("--num-gpus", 2, "OUTPUT_DIR", two, *opts),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    expected = make_trainer(one, *opts).train()["validation"]["total_loss"]
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    assert output.count("Early stop after iteration 1: bbox/AP was 0.0000 after iteration 0") == 1
    assert "Validation loss on custom_test: loss_cls" in output
    assert best(one) == best(two) == ("bbox/AP", 0.0, 0)
    last = json.loads((two / "metrics.json").read_text().splitlines()[-1])
    assert last["iteration"] == 1
    assert last["validation/total_loss"] == pytest.approx(expected, rel=1e-4)


def test_images_of_the_test_loader_come_with_their_boxes(tmp_path):
    trainers = [make_trainer(tmp_path, *TEST_DATA, "TEST.LOSS", loss) for loss in (True, False)]
    loaders = [trainer.build_test_loader(trainer.cfg, "custom_test") for trainer in trainers]
    for (image,), (other,) in zip(*loaders, strict=True):
        assert torch.equal(image["image"], other["image"])
        assert len(image["instances"]) and "instances" not in other


REFUSED = {
    "patience without a metric": (
        ("SOLVER.BEST.METRIC", "", "SOLVER.EARLY_STOP.PATIENCE", 3),
        "SOLVER.EARLY_STOP.PATIENCE 3 needs the metric that it waits for",
    ),
    "no evaluations": (("TEST.EVAL_PERIOD", 0), "set TEST.EVAL_PERIOD"),
    "negative patience": (("SOLVER.EARLY_STOP.PATIENCE", -1), "PATIENCE must be a number in"),
}


@pytest.mark.parametrize(("opts", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_never_select_is_refused(opts, message, tmp_path):
    cfg = make_trainer(tmp_path, *TEST_DATA).cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([*BEST, *opts])
    with pytest.raises(InputError, match=message):
        check_config(cfg, num_processes=1, eval_only=False)
    check_config(cfg, num_processes=1, eval_only=True)


UNKNOWN = {
    "AP": r"did you mean 'bbox/AP'\?\); they are bbox/AP, bbox/AP50, bbox/AP75, bbox/APs, "
    r"bbox/APm, bbox/APl and bbox/AP-CLASS of RBC, WBC, Platelets",
    "bbox/AP-rbc": "did you mean 'bbox/AP-RBC'",
    "segm/AP": "'segm/AP' is none of the evaluation's metrics",
    "validation/total_loss": "is none of the evaluation's metrics without TEST.LOSS True",
}


@pytest.mark.parametrize("metric", UNKNOWN)
def test_an_unknown_metric_is_refused_with_the_known_ones(metric, tmp_path):
    with pytest.raises(InputError, match=UNKNOWN[metric]):
        make_trainer(tmp_path, *OPTS, "SOLVER.BEST.METRIC", metric)
    assert not list(tmp_path.iterdir())


def test_the_loss_is_no_metric_of_detectron2s_detector(tmp_path):
    loss = ("SOLVER.BEST.METRIC", "validation/total_loss", "TEST.LOSS", True)
    with pytest.raises(InputError, match="total_loss' is none of the evaluation's metrics"):
        make_trainer(tmp_path, *OPTS, *loss, "MODEL.META_ARCHITECTURE", "RetinaNet")


def test_without_test_data_or_their_boxes_it_is_refused(tmp_path):
    message = "SOLVER.BEST.METRIC bbox/AP needs test data with annotations"
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, *BEST)
    content = json.loads(Path(FIXTURE, "instances_val.json").read_text())
    del content["annotations"]
    (tmp_path / "images.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, *OPTS, "DATASETS.CUSTOM.TEST_JSON", tmp_path / "images.json")


def test_of_several_data_sets_one_is_named(tmp_path):
    trainer = make_trainer(tmp_path, *OPTS)  # registers custom_train and custom_test
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ("custom_train", "custom_test")
    message = "after the name of a data set: custom_train/, custom_test/"
    with pytest.raises(InputError, match=message):
        type(trainer)(cfg)
    cfg.SOLVER.BEST.METRIC = "custom_test/bbox/AP"
    type(trainer)(cfg)
