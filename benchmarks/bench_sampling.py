"""The cost of OHEM beside that of a training step.

    python benchmarks/bench_sampling.py [--height 608 --width 800] [--device cuda]

Two images per step, R-50-FPN with 80 classes, medians of interleaved repetitions. The anchors'
losses are the model's own: as initialised (all negatives alike), with scores spread as in training,
and spread with all positives easier than the negatives (the worst case for 1:3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import argument_parser, measure
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from retinanet_ext.engine import load_config
from retinanet_ext.modeling.matching import label_anchors
from retinanet_ext.sampling import OHEM

SELECTIONS = {
    "OHEM 128, NMS .5": OHEM(),
    "OHEM 512, NMS .7": OHEM(batch_size=512, nms_thresh=0.7),
    "OHEM 1:3, 128, NMS .5": OHEM(neg_pos_ratio=3.0),
    "OHEM 1:3, 512, NMS .5": OHEM(batch_size=512, neg_pos_ratio=3.0),
}


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=5)
    parser.add_argument("--height", type=int, default=608)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--boxes", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # BatchNorm, because with frozen statistics the activations of random weights explode.
    opts = ["MODEL.DEVICE", args.device]
    opts += ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]
    cfg = load_config("configs/retinanet_R50_FPN.yaml", opts)
    model = build_model(cfg).train()
    batch = []
    for _ in range(2):
        corner = torch.rand(args.boxes, 2) * torch.tensor([args.width, args.height]) * 0.7
        size = torch.rand(args.boxes, 2) * 150 + 20
        instances = Instances((args.height, args.width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], 1))
        instances.gt_boxes.clip(instances.image_size)
        instances.gt_classes = torch.randint(0, 80, (args.boxes,))
        image = torch.randint(0, 256, (3, args.height, args.width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})

    def step() -> None:
        model.zero_grad()
        sum(model(batch).values()).backward()

    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        features = [features[name] for name in model.head_in_features]
        anchors = Boxes.cat(model.anchor_generator(features))
        logits, _ = model._transpose_dense_predictions(model.head(features), [80, 4])
        logits = torch.cat(logits, 1)
        gt = [inputs["instances"].to(args.device) for inputs in batch]
        labels, _ = label_anchors(model.anchor_matcher, anchors, gt, 80)
        initial = model.criterion.anchor_losses(logits, labels)
        spread = model.criterion.anchor_losses(logits + 2 * torch.randn_like(logits), labels)
        easy = spread.clone()
        easy[(labels >= 0) & (labels < 80)] *= 1e-3

    calls: dict[str, Callable[[], object]] = {"training step, all anchors": step}
    for name, ohem in SELECTIONS.items():
        for when, losses in (("initial", initial), ("spread", spread), ("easy positives", easy)):
            calls[f"{name}, {when}"] = lambda ohem=ohem, losses=losses: ohem(
                losses, labels, anchors.tensor, 80
            )
    with EventStorage():
        medians = {name: t.median for name, t in measure(calls, args.repeat).items()}
    base = medians["training step, all anchors"]
    print(f"{len(anchors)} anchors per image, {int((labels < 80).sum() - (labels < 0).sum())} "
          f"positive in the batch, {args.device}, {torch.get_num_threads()} threads")  # fmt: skip
    print(
        tabulate(
            [[n, 1e3 * t, f"{100 * t / base:.1f} %"] for n, t in medians.items()],
            ["", "ms", "of a step"],
            floatfmt=".1f",
        )
    )


if __name__ == "__main__":
    main()
