#!/usr/bin/env python3
"""Train a detector, or evaluate one; ``train_net.py --help`` says how."""

import sys

from retinanet_ext.engine import main

if __name__ == "__main__":
    sys.exit(main())
