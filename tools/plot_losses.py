#!/usr/bin/env python3
"""Draw losses: figure 1, 5 or 6 of the paper, or registered losses of your choice."""

import argparse
from pathlib import Path

from retinanet_ext.analysis.figures import draw_losses, save_figure
from retinanet_ext.errors import InputError


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what",
        nargs="+",
        metavar="1 | 5 | 6 | LOSS",
        help="a figure, or losses such as cross_entropy focal:gamma=3 focal_star:gamma=4,beta=0",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/figures"),
        metavar="FILE | FOLDER",
        help="a .svg or .png file, or a folder for both; default: output/figures",
    )
    args = parser.parse_args()
    try:
        name, figure = draw_losses(args.what)
        files = [args.output]
        if not args.output.suffix:
            files = [args.output / f"{name}{suffix}" for suffix in (".svg", ".png")]
        for path in files:
            save_figure(figure, path)
            print(f"Wrote {path}")
    except InputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
