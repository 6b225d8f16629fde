"""The same global batches give the same weights, whatever they are shared out to."""

import pytest
import torch

from retinanet_ext.engine import launch
from training import no_cuda, train_in_double

pytestmark = pytest.mark.usefixtures("restore_logging")


def test_shares_of_a_batch_train_as_the_batch(tmp_path, monkeypatch):
    """Images of one size, as each share is padded to its own largest image."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    opts = ("MODEL.RESNETS.NORM", "FrozenBN")
    opts += ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 10, "INPUT.MIN_SIZE_TRAIN", "[64]")
    opts += ("SOLVER.BASE_LR", 0.0005)
    whole, parts, shares = (tmp_path / name for name in ("whole", "parts", "shares"))
    before = train_in_double(whole, opts)
    train_in_double(parts, (*opts, "SOLVER.GRAD_ACCUM_STEPS", 2))
    with no_cuda():
        assert launch(train_in_double, 2, args=(shares, opts)) == 0
    weights = {
        folder: torch.load(folder / "model_final.pth")["model"] for folder in (whole, parts, shares)
    }
    for name, tensor in weights[whole].items():
        for folder in (parts, shares):
            torch.testing.assert_close(weights[folder][name], tensor, rtol=1e-9, atol=1e-12)
    assert max((weights[whole][n] - before[n]).abs().max() for n in before) > 0.001
