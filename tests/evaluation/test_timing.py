"""The time of an image, as an evaluation measures it."""

import time

import pytest
import torch
from torch import nn

from retinanet_ext.evaluation import InferenceTime


class Slow(nn.Module):
    """Takes 20 ms an image, and 200 ms for the first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, batch):
        time.sleep(0.02 * len(batch) if self.calls else 0.2)
        self.calls += 1
        return batch


@pytest.mark.parametrize("batch_size", [1, 3])
def test_median_of_an_image_without_the_first_calls(batch_size):
    model = Slow()
    timer = InferenceTime(model)
    timer.reset()
    for _ in range(6):
        model([None] * batch_size)
        time.sleep(0.05)  # reading and evaluating are left out
    result = timer.evaluate()["inference"]["ms_per_image"]
    assert 20 <= result < 45
    model([None])
    assert timer.evaluate()["inference"]["ms_per_image"] == result  # it listens no more


def test_nothing_was_evaluated():
    timer = InferenceTime(Slow())
    timer.reset()
    assert timer.evaluate() == {}
