"""Optimizers, gradient clipping and schedules beyond Detectron2's."""

import math

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn
from torch.testing import assert_close

from retinanet_ext.engine import Trainer, load_config
from retinanet_ext.engine.config_check import check_config
from retinanet_ext.errors import InputError

CONFIG = "configs/small_R18_FPN.yaml"


def make_cfg(*opts: object) -> CfgNode:
    opts = ("MODEL.DEVICE", "cpu", "OUTPUT_DIR", "output", *opts)
    cfg = load_config(CONFIG, [str(opt) for opt in opts])
    check_config(cfg, num_processes=1, eval_only=False)
    return cfg


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))


def compute_gradients(model: nn.Module, scale: float = 1.0) -> None:
    torch.manual_seed(1)
    (scale * model(torch.randn(2, 3, 8, 8)).square().sum()).backward()


@pytest.mark.parametrize("fused", [False, True])
def test_adamw_decays_convolutions_only(fused: bool) -> None:
    model, reference = make_model(), make_model()
    cfg = make_cfg(
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.01, "SOLVER.WEIGHT_DECAY", 0.1),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.FUSED_OPTIMIZER", fused),
    )
    optimizer = Trainer.build_optimizer(cfg, model)
    decayed = [reference[0].weight, reference[2].weight]
    others = [reference[0].bias, reference[2].bias, *reference[1].parameters()]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(3):
        for m, o in ((model, optimizer), (reference, expected)):
            o.zero_grad()
            compute_gradients(m)
            o.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_full_model_clipping_bounds_the_norm_of_all_gradients(name: str) -> None:
    model, reference = make_model(), make_model()
    clip = ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model")
    opts = (*clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "SOLVER.OPTIMIZER", name)
    optimizer = Trainer.build_optimizer(make_cfg(*opts), model)
    off = make_cfg(*opts, "SOLVER.CLIP_GRADIENTS.ENABLED", False)
    unclipped = Trainer.build_optimizer(off, reference)
    for m in (model, reference):
        compute_gradients(m, scale=100.0)
    norm = nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    assert norm > 5
    for parameter in reference.parameters():
        parameter.grad.mul_(0.5 / norm)
    for o in (optimizer, unclipped):
        o.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert_close(ours, theirs)


def test_flat_cosine_schedule() -> None:
    cfg = make_cfg(
        *("SOLVER.LR_SCHEDULER_NAME", "WarmupFlatCosineLR", "SOLVER.FLAT_RATIO", 0.6),
        *("SOLVER.MAX_ITER", 100, "SOLVER.WARMUP_ITERS", 10, "SOLVER.WARMUP_FACTOR", 0.1),
        *("SOLVER.BASE_LR", 0.02, "SOLVER.BASE_LR_END", 0.002, "SOLVER.OPTIMIZER", "SGD"),
    )
    optimizer = Trainer.build_optimizer(cfg, make_model())
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    warmup = [0.02 * (0.1 + 0.9 * i / 10) for i in range(10)]
    cosine = [0.002 + 0.018 * (1 + math.cos(math.pi * (i - 60) / 40)) / 2 for i in range(60, 100)]
    assert_close(torch.tensor(rates), torch.tensor([*warmup, *[0.02] * 50, *cosine]))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.OPTIMIZER", "Adam", "known: 'SGD', 'AdamW'"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global", "known: 'value', 'norm', 'full_model'"),
        ("SOLVER.EMA.DECAY", "1.0", r"SOLVER.EMA.DECAY must be a number in \[0, 1\)"),
        ("SOLVER.FLAT_RATIO", "1.0", r"SOLVER.FLAT_RATIO must be a number in \[0, 1\)"),
        ("INPUT.SCALE_JITTER", "[2.0, 0.5]", r"takes \[least, most\]"),
        ("INPUT.COLOR_JITTER", "1.5", r"must be a number in \[0, 1\]"),
        ("SOLVER.BASE_LR", "0.0", "got 0 and 0"),
        ("SOLVER.BASE_LR_END", "1.0", "from 0 to BASE_LR; got 0.001 and 1"),
        ("SOLVER.BASE_LR_END", "-0.1", "from 0 to BASE_LR; got 0.001 and -0.1"),
    ],
)
def test_values_that_are_refused(key: str, value: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"{key}.*{expected}|{expected}"):
        make_cfg("SOLVER.LR_SCHEDULER_NAME", "WarmupFlatCosineLR", key, value)
