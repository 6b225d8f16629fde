"""Averaged weights: what they are, that they are evaluated and saved, and exact resume."""

import pytest
import torch
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.testing import assert_close

import stress_kills
from retinanet_ext.engine import Predictor
from retinanet_ext.engine.weight_average import WeightAverage
from retinanet_ext.errors import InputError
from retinanet_ext.modeling import TimmBackbone
from training import cut_off, make_trainer

from .test_resume import SAVED

EMA = ("SOLVER.EMA.DECAY", 0.9)

pytestmark = pytest.mark.usefixtures("restore_logging")


def test_average_of_weights_and_statistics():
    """The first step's weights, then d x average + (1 - d) x weights; d rises to the decay."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = WeightAverage(model, 0.5)
    expected = None
    for step in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3, dtype=torch.float64))
        average.after_step()
        decay = min(0.5, (1 + step) / (10 + step))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = expected or state
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = decay * expected[name] + (1 - decay) * tensor
        expected = state
    own = average.model.state_dict()
    for state in (own, expected):
        del state["1.num_batches_tracked"]
    assert_close(own, expected)


def test_batchnorm_of_the_average_trains_after_an_evaluation():
    """As TEST.PRECISE_BN needs. timm's backbone tells frozen norms by ``requires_grad``."""
    backbone = TimmBackbone("mobilenetv2_035", ["res3", "res4", "res5"], norm="BN")
    average = WeightAverage(backbone, 0.9)
    num_norms = len(get_bn_modules(average.model))
    average.model.eval().train()
    assert len(get_bn_modules(average.model)) == num_norms > 0


def test_resumed_equals_uninterrupted_and_checkpoints_hold_the_average(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = make_trainer(whole, *EMA)
    trainer.train()
    cut_off(make_trainer(parts, *EMA), 6)
    make_trainer(parts, *EMA, resume=True).train()
    assert stress_kills.differences(whole / "model_final.pth", parts / "model_final.pth") == []

    saved = torch.load(whole / "model_final.pth", weights_only=True)
    assert_close(saved["model"], dict(trainer.evaluated_model.state_dict()), rtol=0, atol=0)
    trained = saved["trainer"]["hooks"]["WeightAverage"]["weights"]
    assert_close(trained, dict(trainer.model.state_dict()), rtol=0, atol=0)
    assert (trained["head.cls_score.weight"] != saved["model"]["head.cls_score.weight"]).any()


def test_the_average_is_evaluated_predicted_with_and_fine_tuned(tmp_path):
    run = tmp_path / "run"
    trainer = make_trainer(run, *EMA)
    tested = []
    trainer.test = lambda cfg, model, evaluators=None: tested.append(model) or {}
    trainer.train()
    assert tested[-1] is trainer.evaluated_model
    weights = trainer.evaluated_model.state_dict()

    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(run / "model_final.pth")
    assert_close(dict(Predictor(cfg).model.state_dict()), dict(weights), rtol=0, atol=0)

    tuned = make_trainer(tmp_path / "tuned", *EMA, "MODEL.WEIGHTS", run / "model_final.pth")
    for model in (tuned.model, tuned.evaluated_model):
        own = model.state_dict()
        assert_close(dict(own), dict(weights), rtol=0, atol=0)


def test_a_run_that_averages_is_not_resumed_without(tmp_path):
    make_trainer(tmp_path, *EMA).train()
    (tmp_path / "last_checkpoint").write_text(SAVED)
    with pytest.raises(InputError, match=r"SOLVER.EMA.DECAY 0.0: the run averages"):
        make_trainer(tmp_path, resume=True)
    resumed = make_trainer(tmp_path, *EMA, resume=True)
    assert resumed.weight_average.num_steps == 5


def test_averaging_may_begin_in_the_middle(tmp_path):
    make_trainer(tmp_path).train()
    (tmp_path / "last_checkpoint").write_text(SAVED)
    resumed = make_trainer(tmp_path, *EMA, resume=True)
    saved = torch.load(tmp_path / SAVED, weights_only=True)["model"]
    assert_close(dict(resumed.model.state_dict()), saved, rtol=0, atol=0)
