#!/usr/bin/env python3
"""Check the data of a config before training: what is wrong with them, what anchors cover."""

from __future__ import annotations

import argparse
from pathlib import Path

from retinanet_ext.data.report import check_data, refuse_existing
from retinanet_ext.engine import load_config
from retinanet_ext.errors import InputError


def main() -> None:
    """Run the command line; the exit code is 1 where training would refuse the data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="as for training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all of it as JSON")
    parser.add_argument(
        "--search-anchors", action="store_true", help="look for anchors that cover more boxes"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config values")
    args = parser.parse_args()
    try:
        if args.output:
            refuse_existing(args.output)
        cfg, _ = load_config(args.config_file, args.opts)
        report = check_data(cfg, search_anchors=args.search_anchors)
        print(report.text)
        if args.output:
            report.write(args.output)
            print(f"\nWrote {args.output}")
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    parser.exit(report.exit_code)


if __name__ == "__main__":
    main()
