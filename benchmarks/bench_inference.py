"""Post-processing: time and memory from the head's output to detections, beside the others'.

    python benchmarks/bench_inference.py [--images 1 8] [--device cuda] [--save]

Detectron2's RetinaNet, torchvision's and this detector get the same logits and deltas, of 80
classes at 608 x 800. Laying them out anchor by anchor is part of each that needs it.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from common import argument_parser, hardware, measure, peak_memory, save
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import ImageList
from tabulate import tabulate
from torch import Tensor
from torch.distributions import Normal
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection._utils import BoxCoder

from retinanet_ext.engine import load_config

STRIDES = [8, 16, 32, 64, 128]
SPREAD = 1.5  # standard deviation of the logits


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
    parser = argument_parser(__doc__.splitlines()[0], repeat=7)
    parser.add_argument("--height", type=int, default=608)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=[0.5, 0.05, 0.0005],
        help="of all scores over the threshold; the last is like a trained detector's",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    models = {}
    for name in ("RetinaNet", "RetinaNetExt"):
        opts = ["MODEL.META_ARCHITECTURE", name, "MODEL.DEVICE", args.device]
        cfg, _ = load_config("configs/retinanet_R50_FPN.yaml", opts)
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
                          *(f"{m / 2**20:.1f}" for m in memory.values())])  # fmt: skip
    print(f"{len(torch.cat(anchors))} anchors an image, {hardware(args.device)}, {args.threads} "
          f"threads; ms, medians (quartiles) of {args.repeat}; peak MiB beyond inputs")  # fmt: skip
    names = ["Detectron2", "torchvision", "ours"]
    headers = ["images", "over .05", *names, "ours / Detectron2", *(f"MiB {n}" for n in names)]
    print(tabulate(table, headers, disable_numparse=True))
    if args.save:
        print(save("inference", rows, args))


if __name__ == "__main__":
    main()
