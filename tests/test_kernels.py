"""The Triton kernels compute what plain torch does, and compile for the cards people train on."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from retinanet_ext import kernels  # noqa: E402

ROOT = Path(__file__).parents[1]
LOSS = {
    "logits": "*bf16",
    **dict.fromkeys(("image_weights", "alphas", "sums"), "*fp32"),
    "labels": "*i64",
    "gradient": "*bf16",
    **dict.fromkeys(("gamma", "shift"), "fp32"),
    **dict.fromkeys(("label_stride", "num_cells", "num_anchors"), "i32"),
    **dict.fromkeys(("image_stride", "channel_stride", "cell_stride"), "i32"),
}
MATCHING = {
    **dict.fromkeys(("anchors", "boxes", "best_ious"), "*fp32"),
    **dict.fromkeys(("classes", "counts", "labels", "matched_idxs"), "*i64"),
    **dict.fromkeys(("num_anchors", "num_boxes", "num_classes"), "i32"),
}
CASES = {
    **{
        f"loss {name}": (
            kernels._dense_loss_kernel,
            LOSS,
            {"num_classes": 80, "ALPHA_PER_CLASS": False, "FORMULA": number, "GAMMA": 2}
            | {"CELLS": 256, "CLASSES": 4},
        )
        for name, number in kernels.FORMULAS.items()
    },
    "best IoUs": (kernels._best_ious_kernel, MATCHING, {"ANCHORS": 512}),
    "labels": (
        kernels._label_kernel,
        MATCHING,
        {"THRESHOLDS": (0.4, 0.5), "LABELS": (0, -1, 1), "LOW_QUALITY": 1, "ANCHORS": 512},
    ),
}


def test_against_plain_torch():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "tests/kernel_cases.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_a_card(case, capability):
    """For A100 and H100; what does not fit into registers would spill and be slow."""
    kernel, types, constants = CASES[case]
    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, types, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    print(f"{case}, sm_{capability}: {registers} registers, {stack} bytes of stack")
    assert registers <= 128 and stack == 0


@pytest.mark.parametrize("name", sorted(kernels.FORMULAS))
def test_other_types_and_losses_have_no_code(name):
    loss = kernels.LOSSES[name]
    assert kernels.can_compute(loss.bind(), torch.zeros(1, dtype=torch.bfloat16))
    assert not kernels.can_compute(loss.bind(), torch.zeros(1, dtype=torch.float64))
    other = type(loss)(name, loss.formula, "", loss.parameters, loss.alpha)
    assert not kernels.can_compute(other.bind(), torch.zeros(1))
