#!/usr/bin/env python3
"""Make a weights file that Detectron2's own RetinaNet loads, from a checkpoint of training."""

import argparse

from retinanet_ext.engine import export_weights
from retinanet_ext.errors import InputError


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="such as OUTPUT_DIR/model_final.pth")
    parser.add_argument("output", help="the .pth file to write; must not exist")
    args = parser.parse_args()
    try:
        export_weights(args.checkpoint, args.output)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"Wrote {args.output}")


if __name__ == "__main__":
    main()
