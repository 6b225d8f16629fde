"""Inference, post-processing alone or end to end: time and memory beside the other detectors'.

    python benchmarks/bench_inference.py [--images 1 8] [--device cuda] [--save]
    python benchmarks/bench_inference.py --network [--precision bfloat16] [--images 1 8] [--save]

From the head's output to detections: Detectron2's RetinaNet, torchvision's and this detector get
the same logits and deltas, of 80 classes at 608 x 800. Permuting them to one row per anchor is
included where an implementation needs it. The limit reads logits and deltas once.

With ``--network`` from the images to detections, R-50-FPN: ratios are to Detectron2's in float32,
whose weights are this detector's too. The others get a precision by an autocast around them, this
detector by ``TEST.PRECISION``. Weights are random, the statistics of BatchNorm those of the images;
the classifier's last layer is scaled so that the wanted share of scores passes the threshold.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from bench_train_step import make_detectron2, make_torchvision
from common import argument_parser, autocast, hardware, measure, peak_memory, save
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import ImageList
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributions import Normal
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection._utils import BoxCoder

from retinanet_ext.engine import load_config
from retinanet_ext.modeling.inference import PRECISIONS

STRIDES = [8, 16, 32, 64, 128]
SPREAD = 1.5  # standard deviation of the logits
SHARES = [0.5, 0.05, 0.0005]
BASELINE = "Detectron2"
CHANNELS_LAST = ("MODEL.CHANNELS_LAST", "True")


def torchvision_postprocess(
    model: DenseDetector, images: ImageList, anchors: list[Tensor], predictions: list[list[Tensor]]
) -> list[dict[str, Tensor]]:
    """Run torchvision's post-processing with the settings of ``model``."""
    settings = SimpleNamespace(
        score_thresh=model.test_score_thresh,
        topk_candidates=model.test_topk_candidates,
        nms_thresh=model.test_nms_thresh,
        detections_per_img=model.max_detections_per_image,
        box_coder=BoxCoder(weights=model.box2box_transform.weights),
    )
    logits, deltas = predictions
    outputs = {
        "cls_logits": [permute_to_N_HWA_K(level, model.num_classes) for level in logits],
        "bbox_regression": [permute_to_N_HWA_K(level, 4) for level in deltas],
    }
    return TorchvisionRetinaNet.postprocess_detections(
        settings, outputs, [anchors] * len(images), images.image_sizes
    )


def main() -> None:
    """Measure and print the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.network:
        bench_network(args)
    else:
        bench_postprocessing(args)


def parse() -> argparse.Namespace:
    """Return the settings."""
    parser = argument_parser(__doc__.splitlines()[0], repeat=7)
    parser.add_argument("--height", type=int, default=608)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        help=f"of all scores over the threshold; {SHARES[-1]} is like a trained detector's, and "
        "the one of --network",
    )
    parser.add_argument("--network", action="store_true", help="measure backbone and head too")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="with --network")
    args = parser.parse_args()
    args.shares = args.shares or (SHARES[-1:] if args.network else SHARES)
    if not args.network:
        if args.precision != "float32":
            parser.error("--precision is that of --network")
        del args.precision  # no setting of post-processing, as saved results have it
    return args


def bench_postprocessing(args: argparse.Namespace) -> None:
    """Measure post-processing, from the head's output."""
    models = {}
    for name in ("RetinaNet", "RetinaNetExt"):
        opts = ["MODEL.META_ARCHITECTURE", name, "MODEL.DEVICE", args.device]
        cfg = load_config("configs/retinanet_R50_FPN.yaml", opts)
        models[name] = build_model(cfg).eval()
    stock, ours = models.values()
    threshold = torch.tensor(ours.test_score_thresh).logit().item()

    rows, table = [], []
    for num_images in args.images:
        sizes = [(-(-args.height // s), -(-args.width // s)) for s in STRIDES]
        features = [torch.empty(num_images, 1, *size, device=args.device) for size in sizes]
        anchors = [level.tensor for level in ours.anchor_generator(features)]
        images = ImageList(
            torch.empty(num_images, 3, args.height, args.width, device=args.device),
            [(args.height, args.width)] * num_images,
        )
        for share in args.shares:
            mean = threshold - SPREAD * Normal(0, 1).icdf(torch.tensor(1 - share)).item()
            logits, deltas = (
                [torch.randn(num_images, 9 * dim, *size, device=args.device) for size in sizes]
                for dim in (ours.num_classes, 4)
            )
            logits = [level * SPREAD + mean for level in logits]
            inputs = [logits, [level * 0.3 for level in deltas]]
            calls = {
                "detectron2": lambda x=inputs, f=features, i=images: stock.forward_inference(
                    i, f, x
                ),
                "torchvision": lambda x=inputs, a=anchors, i=images: torchvision_postprocess(
                    ours, i, a, x
                ),
                "retinanet_ext": lambda x=inputs, f=features, i=images: ours.forward_inference(
                    i, f, x
                ),
                "limit": lambda x=inputs: [level.sum() for kind in x for level in kind],
            }
            with torch.no_grad():
                times = measure(calls, args.repeat)
                memory = {name: peak_memory(call, args.device) for name, call in calls.items()}
            rows += [
                {
                    "images": num_images,
                    "share_over_threshold": share,
                    "name": name,
                    "time": times[name],
                    "peak_bytes": memory[name],
                }
                for name in calls
            ]
            ratio = times["retinanet_ext"].median / times["detectron2"].median
            table.append([num_images, share, *times.values(), f"{ratio:.3f}",
                          *(f"{m / 2**20:.1f}" for m in [*memory.values()][:-1])])  # fmt: skip
    print(f"{len(torch.cat(anchors))} anchors an image, {hardware(args.device)}, {args.threads} "
          f"threads; ms, medians (quartiles) of {args.repeat}; peak MiB beyond inputs")  # fmt: skip
    names = ["Detectron2", "torchvision", "ours"]
    headers = ["images", "over .05", *names, "limit", "ours / Detectron2"]
    headers += [f"MiB {n}" for n in names]
    print(tabulate(table, headers, disable_numparse=True))
    if args.save:
        print(save("inference", rows, args))


@torch.no_grad()
def make_realistic(
    detect: Callable[[], object], backbone: nn.Module, cls_score: nn.Module, share: float
) -> None:
    """Fit BatchNorm to the images, and make the given share of the scores exceed .05.

    Args:
        detect: runs the detector on the images
        backbone: the detector's, in eval mode
        cls_score: the layer whose outputs are the logits
        share: fraction of all logits, above 0
    """
    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.train().momentum = 1.0  # the statistics of one pass
    detect()
    for layer in layers:
        layer.eval()
    outputs: list[Tensor] = []
    hook = cls_score.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    detect()
    hook.remove()
    logits = torch.cat([output.flatten() for output in outputs])
    lowest = logits.topk(max(round(share * len(logits)), 1)).values[-1]
    scale = SPREAD / logits.std()
    threshold = torch.tensor(0.05).logit()
    cls_score.weight.mul_(scale)
    cls_score.bias.mul_(scale).add_(threshold.to(scale) - scale * lowest)


def bench_network(args: argparse.Namespace) -> None:
    """Measure the whole inference, from the images."""
    device, precision = args.device, args.precision
    stock = make_detectron2("RetinaNet", device)[0].eval()
    ours = {
        name: make_detectron2("RetinaNetExt", device, ("TEST.PRECISION", precision, *opts))[0]
        for name, opts in {"ours": (), "ours, channels last": CHANNELS_LAST}.items()
    }
    torchvision = make_torchvision(args)[0].eval()
    torchvision.detections_per_img = stock.max_detections_per_image

    def detect(model: nn.Module, batch: list[dict[str, Any]], autocast_to: str) -> object:
        with autocast(autocast_to, device):
            if model is torchvision:
                return model([inputs["image"].to(device) / 255 for inputs in batch])
            return model(batch)

    ways = {(BASELINE, "float32"): (stock, "float32")}
    ways[BASELINE, precision] = (stock, precision)  # the same where it is float32
    ways["torchvision", precision] = (torchvision, precision)
    for name, model in ours.items():
        ways[name, precision] = (model.eval(), "float32")  # TEST.PRECISION is its own

    rows, table = [], []
    for num_images in args.images:
        size = (3, args.height, args.width)
        batch = [
            {"image": torch.randint(0, 256, size, dtype=torch.uint8)} for _ in range(num_images)
        ]
        for share in args.shares:
            for model, layer in (
                (stock, stock.head.cls_score),
                (torchvision, torchvision.head.classification_head.cls_logits),
            ):
                make_realistic(
                    lambda model=model, batch=batch: detect(model, batch[:1], "float32"),
                    model.backbone,
                    layer,
                    share,
                )
            for model in ours.values():
                model.load_state_dict(stock.state_dict(), strict=False)  # less the normaliser
            calls = {
                way: lambda given=given, batch=batch: detect(given[0], batch, given[1])
                for way, given in ways.items()
            }
            with torch.no_grad():
                times = measure(calls, args.repeat)
                memory = {way: peak_memory(call, device) for way, call in calls.items()}
            for way, time in times.items():
                name, of = way
                row = {
                    "images": num_images,
                    "share_over_threshold": share,
                    "name": name,
                    "precision": of,
                    "time": time,
                    "ratio": time.median / times[BASELINE, "float32"].median,
                    "peak_bytes": memory[way],
                }
                rows.append(row)
                cells = [f"{row['ratio']:.3f}", f"{memory[way] / 2**20:.0f}"]
                table.append([num_images, share, name, of, time, *cells])
    print(
        f"{args.height} x {args.width}, {hardware(device)}, {args.threads} threads; medians "
        f"(quartiles) of {args.repeat}; peak MiB beyond weights and images"
    )
    headers = ["images", "over .05", "", "precision", "ms", "ratio", "peak MiB"]
    print(tabulate(table, headers, disable_numparse=True))
    if args.save:
        print(f"Wrote {save('inference_network', rows, args)}")


if __name__ == "__main__":
    main()
