"""Memory format, padding and generated code: how the network is computed, not what."""

import copy
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from detectors import make_batch, make_model


def losses_and_gradients(model, batch):
    """Losses of a training step, and the gradients of all weights."""
    model.train()
    losses = model(batch)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def pair(key, value):
    """A model and one of the same weights with a config value changed."""
    plain, other = make_model(), make_model(key, value)
    other.load_state_dict(plain.state_dict())
    return plain, other


def assert_same_step(plain, other, batch, **tolerance):
    wanted, wanted_gradients = losses_and_gradients(plain, copy.deepcopy(batch))
    found, gradients = losses_and_gradients(other, copy.deepcopy(batch))
    assert_close(found, wanted, **tolerance)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, wanted_gradients[name], **tolerance, msg=name)


def test_channels_last_reaches_the_head_and_changes_rounding_alone():
    plain, other = pair("MODEL.CHANNELS_LAST", True)
    seen = []
    other.head.register_forward_hook(lambda _, inputs, outputs: seen.extend(outputs[0]))
    assert_same_step(plain, other, make_batch([3, 0]), rtol=1e-3, atol=1e-4)
    assert all(logits.is_contiguous(memory_format=torch.channels_last) for logits in seen)


def test_compiled_network_is_one_graph_for_all_sizes(monkeypatch):
    """Traced alone: generating code takes minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    plain, other = pair("MODEL.COMPILE", True)
    assert set(plain.state_dict()) == set(other.state_dict())
    for size in ((96, 128), (128, 96)):
        assert_same_step(plain, other, make_batch([3, 0], size=size), rtol=1e-3, atol=1e-4)
    batch = make_batch([3, 0])
    with torch.no_grad():
        for wanted, found in zip(plain.eval()(batch), other.eval()(batch), strict=True):
            assert_close(
                found["instances"].scores, wanted["instances"].scores, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("size", [(96, 130), (128, 128)])
def test_padding_to_a_multiple_pads_training_images_with_zeros(size):
    _, model = pair("INPUT.PAD_MULTIPLE", 128)
    batch = make_batch([3, 0], size=size)
    images = model.train().preprocess_image(batch)
    assert images.tensor.shape[-2:] == (128, 256 if size[1] > 128 else 128)
    assert images.image_sizes == [tuple(inputs["image"].shape[1:]) for inputs in batch]
    plain = model.eval().preprocess_image(batch).tensor
    height, width = plain.shape[-2:]
    assert_close(images.tensor[..., :height, :width], plain)
    assert images.tensor.count_nonzero() == plain.count_nonzero()
