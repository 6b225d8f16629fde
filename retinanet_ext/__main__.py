"""``python -m retinanet_ext``: the same as ``retinanet-ext``."""

import sys

from retinanet_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
