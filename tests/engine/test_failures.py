"""The line that ends a run."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from retinanet_ext.engine.failures import DIVERGED, explain


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_divergence_names_iteration_and_losses(value):
    losses = {"loss_cls": torch.tensor(float(value)), "loss_box_reg": torch.tensor(0.123456)}
    with EventStorage(), pytest.raises(FloatingPointError) as raised:
        SimpleTrainer.write_metrics(losses, 0.0, 41)
    code, line = explain(raised.value)
    assert code == DIVERGED
    assert line.startswith(f"diverged at iteration 41: loss_cls {value}, loss_box_reg 0.1235;")


def test_other_errors_are_not_explained():
    assert explain(ValueError("a defect of the program")) is None
