#!/usr/bin/env python3
"""Repeat a training step that was not finite, from the file that training saved of it."""

import argparse
import json

from detectron2.utils.logger import setup_logger

from retinanet_ext.engine.replay import replay_step
from retinanet_ext.errors import InputError


def main() -> None:
    """Run the command line; exit code 0: not finite again, 1: finite this time, 2: no such step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="such as OUTPUT_DIR/non_finite/iter_0000041_rank0.pth")
    args = parser.parse_args()
    setup_logger(name="retinanet_ext")
    try:
        report = replay_step(args.file)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(json.dumps(report, indent=2, allow_nan=False))
    if not report["reproduced"]:
        parser.exit(1, "not reproduced: loss and gradient are finite this time\n")
    print(f"reproduced: {report['cause']}")


if __name__ == "__main__":
    main()
