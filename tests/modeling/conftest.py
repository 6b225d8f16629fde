"""The compiler's backend."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from retinanet_ext.modeling.compiled_step import compiled_graph


@pytest.fixture
def compile_by(monkeypatch):
    """Return a function that sets the backend of MODEL.COMPILE and returns its counter."""
    real = torch.compile
    compiled_graph.cache_clear()

    def set_backend(name):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(name)
        monkeypatch.setattr(torch, "compile", partial(real, backend=counter))
        return counter

    yield set_backend
    compiled_graph.cache_clear()
