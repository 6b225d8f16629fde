"""The line that ends a run."""

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch.utils.data import DataLoader

from retinanet_ext.engine.failures import DIVERGED, INPUT_ERROR, explain
from retinanet_ext.errors import InputError


class BrokenDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("truncated")
        except OSError as error:
            raise InputError("image 7 cannot be used") from error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_input_error_from_a_loader_is_one_line(num_workers):
    with pytest.raises(InputError) as raised:
        next(iter(DataLoader(BrokenDataset(), num_workers=num_workers)))
    assert explain(raised.value) == (INPUT_ERROR, "image 7 cannot be used")


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
