#!/usr/bin/env python3
"""Measure on which anchors a checkpoint's loss lies, at several gamma (figure 4 of the paper)."""

import argparse

from detectron2.utils.logger import setup_logger

from retinanet_ext.analysis.loss_cdf import NUM_NEGATIVES, NUM_POSITIVES
from retinanet_ext.engine.failures import explain
from retinanet_ext.errors import InputError
from retinanet_ext.experiments.loss_analysis import analyze_loss


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="as for training")
    parser.add_argument("--weights", required=True, help="such as OUTPUT_DIR/model_final.pth")
    parser.add_argument(
        "--dataset", choices=("train", "test"), default="test", help="of the config; default: test"
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="at most, chosen at random")
    parser.add_argument(
        "--negatives", type=int, default=NUM_NEGATIVES, metavar="N", help="sampled at most"
    )
    parser.add_argument(
        "--positives", type=int, default=NUM_POSITIVES, metavar="N", help="sampled at most"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images and the sample")
    parser.add_argument(
        "--output", metavar="FOLDER", help="default: loss_cdf-DATASET beside the weights"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values")
    args = parser.parse_args()
    setup_logger(name="retinanet_ext")
    try:
        text = analyze_loss(
            args.config_file,
            args.weights,
            args.opts,
            dataset=args.dataset,
            num_images=args.num_images,
            num_positives=args.positives,
            num_negatives=args.negatives,
            seed=args.seed,
            output=args.output,
        )
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {explain(error)[1]}\n")
    print(text)


if __name__ == "__main__":
    main()
