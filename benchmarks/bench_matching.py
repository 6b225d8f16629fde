"""Labelling anchors: time and memory beside Detectron2's and torchvision's, by number of boxes.

    python benchmarks/bench_matching.py [--boxes 7 100 500] [--device cuda] [--save]

Each call takes two images with the paper's anchors, 91,260 per image of 608 x 800. Detectron2 and
torchvision are timed for matching alone, ``matcher(pairwise_iou(boxes, anchors))``; ours includes
the labels. The limit reads anchors and boxes once and writes labels and matches once.
"""

from __future__ import annotations

import torch
from common import argument_parser, hardware, measure, peak_memory, save
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou
from tabulate import tabulate
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher
from torchvision.ops import box_iou

from retinanet_ext.modeling import AnchorMatcher, OctaveAnchorGenerator
from retinanet_ext.modeling.matching import label_anchors

STRIDES = [8, 16, 32, 64, 128]
NUM_CLASSES = 80
RULE = ([0.4, 0.5], [0, -1, 1])


def make_anchors(height: int, width: int, device: str) -> Boxes:
    """Return the paper's anchors of all levels."""
    generator = OctaveAnchorGenerator(aspect_ratios=[[0.5, 1.0, 2.0]], strides=STRIDES)
    features = [torch.empty(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]
    return Boxes(Boxes.cat(generator(features)).tensor.to(device))


def make_instances(count: int, height: int, width: int, device: str) -> Instances:
    """Return boxes with sides of 12 to 250 pixels, anywhere in the image, with random classes."""
    centre = torch.rand(count, 2) * torch.tensor([width, height])
    side = torch.exp(2.5 + 3 * torch.rand(count, 2))
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([centre - side / 2, centre + side / 2], 1))
    instances.gt_boxes.clip(instances.image_size)
    instances.gt_classes = torch.randint(0, NUM_CLASSES, (count,))
    return instances.to(device)


def limit(anchors: Boxes, gt: list[Instances]) -> tuple[torch.Tensor, ...]:
    """Read what a matcher reads, and write as much as it writes, (N, R) twice."""
    read = anchors.tensor.sum() + sum(g.gt_boxes.tensor.sum() for g in gt)
    labels = torch.full((len(gt), len(anchors)), NUM_CLASSES, device=anchors.device)
    return read, labels, torch.zeros_like(labels)


def main() -> None:
    """Measure and print the table."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=9)
    parser.add_argument("--height", type=int, default=608)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--boxes", type=int, nargs="+", default=[7, 10, 100, 500, 1000])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    anchors = make_anchors(args.height, args.width, args.device)
    ours = AnchorMatcher(*RULE)
    stock = Matcher(*RULE, allow_low_quality_matches=True)
    low, high = RULE[0]
    torchvision = TorchvisionMatcher(high, low, allow_low_quality_matches=True)
    rows, table = [], []
    for count in args.boxes:
        gt = [
            make_instances(count, args.height, args.width, args.device) for _ in range(args.images)
        ]
        calls = {
            "Detectron2": lambda gt=gt: [stock(pairwise_iou(g.gt_boxes, anchors)) for g in gt],
            "torchvision": lambda gt=gt: [
                torchvision(box_iou(g.gt_boxes.tensor, anchors.tensor)) for g in gt
            ],
            "ours": lambda gt=gt: label_anchors(ours, anchors, gt, NUM_CLASSES),
            "limit": lambda gt=gt: limit(anchors, gt),
        }
        times = measure(calls, args.repeat)
        for name, call in calls.items():
            row = {
                "boxes": count,
                "name": name,
                "time": times[name],
                "ratio": times[name].median / times["Detectron2"].median,
                "peak_bytes": peak_memory(call, args.device),
            }
            rows.append(row)
            memory = f"{row['peak_bytes'] / 2**20:.1f}"
            table.append([count, name, times[name], f"{row['ratio']:.3f}", memory])
    print(
        f"{args.images} images, {len(anchors)} anchors each, {hardware(args.device)}, "
        f"{args.threads} threads; medians (quartiles) of {args.repeat}"
    )
    print(tabulate(table, ["boxes", "", "ms", "ratio", "peak MiB"], disable_numparse=True))
    if args.save:
        print(f"Wrote {save('matching', rows, args)}")


if __name__ == "__main__":
    main()
