"""The line that ends a run."""

import pickle

import pytest

from retinanet_ext.engine.failures import DIVERGED, INPUT_ERROR, STOPPED, NonFiniteError, explain
from retinanet_ext.errors import InputError, StoppedError


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError, INPUT_ERROR), (NonFiniteError, DIVERGED), (StoppedError, STOPPED)],
)
def test_expected_ends_are_their_message_from_another_process_too(error, code):
    received = pickle.loads(pickle.dumps(error("at iteration 41: loss_cls nan")))
    assert explain(received) == (code, "at iteration 41: loss_cls nan")


def test_other_errors_are_not_explained():
    assert explain(ValueError("a defect of the program")) is None
