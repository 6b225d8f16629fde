"""The classification loss, forward and backward, beside Detectron2's and torchvision's.

    python benchmarks/bench_loss.py [--height 608 --width 800] [--save]

The input is the head's output for two images: logits of 80 classes, P3 to P7, nine anchors per
cell. Each implementation starts from it and ends with its gradient, so permuting, concatenating and
one-hot targets are included. Medians and quartiles of interleaved repetitions. Memory excludes the
logits and is in multiples of them. The limit reads the logits and writes the gradient once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import argument_parser, measure, peak_memory, save
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from fvcore.nn import sigmoid_focal_loss_jit
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from retinanet_ext.losses import LOSSES
from retinanet_ext.losses.dense import dense_loss
from retinanet_ext.losses.functional import class_weights

K, A, STRIDES = 80, 9, (8, 16, 32, 64, 128)
BASELINE = "Detectron2 (fvcore)"


def detectron2(levels: list[Tensor], labels: Tensor, weight: float) -> Tensor:
    """Detectron2's RetinaNet.losses: valid anchors, one-hot, fvcore's scripted loss."""
    logits = torch.cat([permute_to_N_HWA_K(level, K) for level in levels], dim=1)
    valid = labels >= 0
    targets = one_hot(labels[valid], K + 1)[:, :-1]
    loss = sigmoid_focal_loss_jit(
        logits[valid], targets.to(logits.dtype), alpha=0.25, gamma=2.0, reduction="sum"
    )
    return loss * weight


def torchvision(levels: list[Tensor], labels: Tensor, weight: float) -> Tensor:
    """What torchvision's RetinaNet does, image by image: targets of zeros, ones at the labels."""
    logits = torch.cat([permute_to_N_HWA_K(level, K) for level in levels], dim=1)
    losses = []
    for image_logits, image_labels in zip(logits, labels, strict=True):
        foreground = (image_labels >= 0) & (image_labels < K)
        targets = torch.zeros_like(image_logits)
        targets[foreground, image_labels[foreground]] = 1.0
        valid = image_labels >= 0
        losses.append(torchvision_focal_loss(image_logits[valid], targets[valid], reduction="sum"))
    return sum(losses) * weight


def ours() -> Callable[[list[Tensor], Tensor, float], Tensor]:
    """Return this package's fused loss: in blocks on a CPU, by the kernel on a GPU."""
    loss, alpha = LOSSES["focal"].bind(gamma=2.0), class_weights(0.25, K)

    def call(levels: list[Tensor], labels: Tensor, weight: float) -> Tensor:
        weights = torch.full((len(labels),), weight, device=labels.device)
        weights_alpha = alpha.to(labels.device)
        return dense_loss(loss, levels, labels, weights, weights_alpha, num_classes=K)

    return call


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=7)
    parser.add_argument("--height", type=int, default=608)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cells = [(-(-args.height // s), -(-args.width // s)) for s in STRIDES]
    dtype = getattr(torch, args.dtype)
    levels = [
        # As in training: most entries are confident negatives.
        (torch.randn(args.images, A * K, *size, device=args.device) - 4).to(dtype).requires_grad_()
        for size in cells
    ]
    count = sum(h * w for h, w in cells) * A
    chance = torch.rand(args.images, count, device=args.device)
    labels = torch.full_like(chance, K, dtype=torch.int64)
    labels[chance < 0.001] = 3
    labels[chance > 0.999] = -1

    ways = {BASELINE: detectron2, "torchvision": torchvision, "ours": ours()}
    results: dict[str, list[Tensor]] = {}

    def run(name: str) -> None:
        total = ways[name](levels, labels, 0.01)
        results[name] = [total.detach(), *torch.autograd.grad(total, levels)]

    def limit() -> None:
        for level in levels:
            torch.mul(level.detach(), 2.0)

    calls = {name: (lambda name=name: run(name)) for name in ways}
    # torchvision computes in the type of the logits.
    rtol, atol = (1e-3, 1e-6) if dtype == torch.float32 else (2e-2, 1e-4)
    for name, call in calls.items():
        call()
        for found, wanted in zip(results[name], results[BASELINE], strict=True):
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, check_dtype=False)
    results.clear()
    timings = measure({**calls, "limit": limit}, args.repeat)
    size = sum(level.numel() * level.element_size() for level in levels)
    baseline = timings[BASELINE].median
    rows = []
    for name, timing in timings.items():
        memory = None
        if name != "limit":
            results.clear()
            memory = peak_memory(calls[name], args.device) / size
        row = {"way": name, "time": timing, "ratio": timing.median / baseline, "memory": memory}
        rows.append(row)
    print(f"{args.images} x {count} anchors, {K} classes, {args.threads} threads, {args.dtype}")
    print(
        tabulate(
            [
                (
                    r["way"],
                    str(r["time"]),
                    f"{r['ratio']:.3f}",
                    r["memory"] and f"{r['memory']:.2f}",
                )
                for r in rows
            ],
            ["", "ms, median (quartiles)", "ratio", "memory / logits"],
            disable_numparse=True,
        )
    )
    if args.save:
        print(f"Wrote {save('loss', rows, args)}")


if __name__ == "__main__":
    main()
