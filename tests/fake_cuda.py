"""A CUDA device without a card: tensors with shapes, strides and dtypes, but no values."""

import sys
from collections import Counter
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retinanet_ext.losses import dense
from retinanet_ext.modeling import matching

ROOTS = ("retinanet_ext.", "detectron2.", "torch.amp.")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}
KERNELS = ("_dense_loss_kernel", "_best_ious_kernel", "_label_kernel")
READS = {"detectron2.structures.boxes.clip": True}  # what a place is to read, if not 0
NUM_FOUND = 3  # entries that a search for values is assumed to find


class FakeCuda(TorchDispatchMode):
    """Compute on the CPU as usual and on ``cuda`` without values, with or without Triton.

    What makes the host wait for the device is a failure, unless the function that does it is
    listed: reading a value, a shape that depends on values, or a copy between host and device. A
    listed function reads a zero and finds at most three entries.

    Attributes:
        met: the listed functions that waited
    """

    def __init__(self, waits=(), *, has_triton=False):
        super().__init__()
        self.met = set()
        self._waits = waits
        self._contexts = [
            FakeTensorMode(allow_non_fake_inputs=True),
            mock.patch.object(torch.Tensor, "backward", run_backward),
            mock.patch.object(dense, "HAS_TRITON", has_triton),
            mock.patch.object(matching, "HAS_TRITON", has_triton),
            # Without a card torch would turn autocast and the loss scale off.
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        ]
        if has_triton:
            patches = [
                mock.patch(f"retinanet_ext.kernels.{name}", FakeKernel()) for name in KERNELS
            ]
            self._contexts += patches

    def __enter__(self):
        for context in self._contexts:
            context.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for context in reversed(self._contexts):
            context.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and "cuda" not in devices:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            value = READS.get(self._wait(func), 0)
            return float(value) if tensors[0].is_floating_point() else value
        if func in COPIES:
            if len(devices) > 1:
                self._wait(func)
            return func(*args, **kwargs)
        sizes = {t.device.type for t in tensors if t.dim()}
        assert len(sizes) < 2, f"{func} has tensors on several devices"
        if func in INDEXING and any(_is_mask(index) for index in args[1]):
            self._wait(func)
            found = [_found(index) if _is_mask(index) else index for index in args[1]]
            return func(args[0], found, *args[2:], **kwargs)
        if func is torch.ops.aten.nonzero.default:
            self._wait(func)
            return _found(tensors[0]).unsqueeze(1).expand(-1, tensors[0].dim())
        if func is torch.ops.torchvision.nms.default:
            self._wait(func)
            return _found(tensors[1])
        if func is torch.ops.aten._fused_sgd_.default:  # it has no shapes registered
            return None
        return func(*args, **kwargs)

    def _wait(self, func):
        frame = sys._getframe(2)
        while not _is_named(frame):
            frame = frame.f_back
            assert frame, f"{func} waits for the device"
        place = f"{frame.f_globals['__name__']}.{frame.f_code.co_name}"
        assert place in self._waits, f"{func} in {place} waits for the device"
        self.met.add(place)
        return place


def _is_named(frame):
    is_function = not frame.f_code.co_name.startswith("<")  # no comprehension
    return is_function and frame.f_globals.get("__name__", "").startswith(ROOTS)


def _is_mask(index):
    return index is not None and index.dtype == torch.bool


def _found(tensor):
    """Indices into a tensor of one dimension."""
    return torch.zeros(min(NUM_FOUND, tensor.numel()), dtype=torch.int64, device=tensor.device)


class FakeKernel:
    """A Triton kernel that writes nothing; it is launched with tensors on one device."""

    def __getitem__(self, grid):
        def launch(*args, **_):
            assert all(size > 0 for size in grid)
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            assert tensors and all(tensor.is_cuda for tensor in tensors)

        return launch


def to_fake_cuda(model):
    """Replace the weights and buffers of a model, because ``Module.to`` cannot."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty_strided(
                        tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda"
                    )
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = (
                        torch.nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                    )
    return model


def run_backward(loss, **_):
    """Run the backward functions in order, because torch's engine needs a card's streams."""
    users, found, unseen = Counter(), {loss.grad_fn}, [loss.grad_fn]
    while unseen:
        for node, _ in unseen.pop().next_functions:
            if node is not None:
                users[node] += 1
                if node not in found:
                    found.add(node)
                    unseen.append(node)
    gradients = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for (follower, number), gradient in _call(node, gradients.pop(node, {})):
                if gradient is not None:
                    given = gradients.setdefault(follower, {})
                    given[number] = given[number] + gradient if number in given else gradient
                users[follower] -= 1
                if not users[follower]:
                    ready.append(follower)


def _call(node, given):
    """Return the pairs of a node's edges and their gradients, of the shapes and dtypes needed."""
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    if not given:
        return [(edge, None) for edge in edges]
    inputs = [
        given[i].sum_to_size(tuple(needed.shape)).to(needed.dtype) if i in given else None
        for i, needed in enumerate(node._input_metadata)
    ]
    if isinstance(node, BackwardCFunction):
        outputs = zip(node.apply(*inputs), node.needs_input_grad, strict=True)
        return zip(edges, [gradient for gradient, needed in outputs if needed], strict=True)
    outputs = node(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = zip(node.next_functions, outputs, strict=True)
    return [(edge, gradient) for edge, gradient in pairs if edge[0] is not None]
