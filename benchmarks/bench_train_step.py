"""One training step, forward to optimizer, beside Detectron2's and torchvision's RetinaNet.

    python benchmarks/bench_train_step.py [--precision bfloat16] [--ways "ours, all" ...] [--save]

R-50-FPN, 80 classes, SGD with momentum, the same images and boxes for all; medians and quartiles of
interleaved repetitions, and the time of the first step, which compiles. "network alone" is forward
and backward of this detector's backbone and head: the time that no loss, matching or optimizer can
save. torchvision's FPN takes P6 from P5, and its head differs only in its initial values. Autocast
sets the precision of all of them; float16 on CUDA runs without a gradient scaler, whose cost would
be equal for all. Memory is measured in a separate step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import argument_parser, autocast, hardware, measure, peak_memory, save
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from retinanet_ext.engine import Trainer, load_config

CONFIG = "configs/retinanet_R50_FPN.yaml"
BASELINE = "Detectron2"
LIMIT = "network alone"
K = 80
OURS = {
    "ours": (),
    "ours, channels last": ("MODEL.CHANNELS_LAST", "True"),
    "ours, fused SGD": ("SOLVER.FUSED_OPTIMIZER", "True"),
    "ours, compiled": ("MODEL.COMPILE", "True"),
    "ours, all": (
        *("MODEL.CHANNELS_LAST", "True", "SOLVER.FUSED_OPTIMIZER", "True", "MODEL.COMPILE", "True"),
    ),
}
"""The config values of each way to run this detector."""


class Network(nn.Module):
    """Backbone and head of a detector, reduced to scalars that depend on every output."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        detector = self.detector
        images = detector.preprocess_image(batch)
        features = detector.backbone(images.tensor)
        logits, deltas = detector.head([features[name] for name in detector.head_in_features])
        return {"sum": 1e-9 * sum(level.float().sum() for level in (*logits, *deltas))}


def make_detectron2(
    architecture: str, device: str, opts: tuple[str, ...] = ()
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build Detectron2's RetinaNet or this one, with Detectron2's normaliser and labels."""
    # BatchNorm, because with frozen statistics the activations of random weights explode.
    cfg = load_config(
        CONFIG,
        [
            *("MODEL.META_ARCHITECTURE", architecture, "MODEL.DEVICE", device, "MODEL.WEIGHTS", ""),
            *("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"),
            *("MODEL.RETINANET.LOSS_NORMALIZER", "foreground_ema"),
            *("MODEL.RETINANET.LOW_QUALITY_MATCHES", "all", "SOLVER.BASE_LR", "1e-4"),
            *opts,
        ],
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    return model, Trainer.build_optimizer(cfg, model)


def make_torchvision(args: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build torchvision's RetinaNet at the same image size, so that it does not resize."""
    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=K,
        trainable_backbone_layers=5,
        min_size=args.height,
        max_size=max(args.height, args.width),
    )
    model = model.to(args.device).train()
    return model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)


def make_batch(count: int, args: object) -> tuple[list[dict], list[torch.Tensor], list[dict]]:
    """Return the same images and boxes in Detectron2's form and in torchvision's."""
    height, width = args.height, args.width
    rng = torch.Generator().manual_seed(0)
    ours, images, targets = [], [], []
    for _ in range(args.images):
        image = torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8)
        centre = torch.rand(count, 2, generator=rng) * torch.tensor([width, height])
        side = torch.exp(2.5 + 3 * torch.rand(count, 2, generator=rng))
        boxes = Boxes(torch.cat([centre - side / 2, centre + side / 2], 1))
        boxes.clip((height, width))
        boxes.tensor[:, 2:] = torch.maximum(boxes.tensor[:, 2:], boxes.tensor[:, :2] + 1)
        classes = torch.randint(0, K, (count,), generator=rng)
        instances = Instances((height, width), gt_boxes=boxes, gt_classes=classes)
        ours.append({"image": image, "height": height, "width": width, "instances": instances})
        images.append((image.float() / 255).to(args.device))
        targets.append({"boxes": boxes.tensor.to(args.device), "labels": classes.to(args.device)})
    return ours, images, targets


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=5)
    parser.add_argument("--height", type=int, default=608)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--boxes", type=int, nargs="+", default=[100])
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="float32"
    )
    parser.add_argument("--ways", nargs="+", choices=OURS, default=["ours"], metavar="WAY")
    parser.add_argument("--no-memory", action="store_true", help="slow on the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    ways = {
        BASELINE: make_detectron2("RetinaNet", args.device),
        "torchvision": make_torchvision(args),
        **{name: make_detectron2("RetinaNetExt", args.device, OURS[name]) for name in args.ways},
    }
    detector, optimizer = make_detectron2("RetinaNetExt", args.device)
    ways[LIMIT] = Network(detector), optimizer

    def step(name: str, *inputs: object) -> None:
        model, optimizer = ways[name]
        with autocast(args.precision, args.device), EventStorage():
            losses = model(*inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if name != LIMIT:
            optimizer.step()

    rows, table = [], []
    for count in args.boxes:
        batch, images, targets = make_batch(count, args)
        inputs = {name: (batch,) for name in ways} | {"torchvision": (images, targets)}
        calls: dict[str, Callable[[], None]] = {
            name: (lambda name=name, given=inputs[name]: step(name, *given)) for name in ways
        }
        first = {
            name: measure({name: call}, 1, warmup=0)[name].median for name, call in calls.items()
        }
        times = measure(calls, args.repeat, warmup=1)
        memory = dict.fromkeys(calls)
        if not args.no_memory:
            memory = {name: peak_memory(call, args.device) for name, call in calls.items()}
        for name, time in times.items():
            ratio = time.median / times[BASELINE].median
            row = {"boxes": count, "name": name, "time": time, "ratio": ratio}
            row["first_step"] = first[name]
            cells = [count, name, f"{first[name]:.1f}", time, f"{ratio:.3f}"]
            if memory[name] is not None:
                row["peak_bytes"] = memory[name]
                row["memory_ratio"] = memory[name] / memory[BASELINE]
                cells += [f"{memory[name] / 2**20:.0f}", f"{row['memory_ratio']:.3f}"]
            rows.append(row)
            table.append(cells)
    print(
        f"{args.images} images of {args.height} x {args.width}, {hardware(args.device)}, "
        f"{args.threads} threads, {args.precision}; medians (quartiles) of {args.repeat}"
    )
    headers = ["boxes", "", "first step, s", "ms", "ratio", "peak MiB", "ratio"]
    print(tabulate(table, headers, disable_numparse=True))
    if args.save:
        print(f"Wrote {save('train_step', rows, args)}")


if __name__ == "__main__":
    main()
