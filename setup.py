"""Packaging. Pure Python: nothing is compiled, and PyTorch is not imported."""

import re
from pathlib import Path

from setuptools import find_packages, setup

init = Path(__file__).with_name("retinanet_ext") / "__init__.py"
version = re.search(r'^__version__ = "(.+)"$', init.read_text(encoding="utf-8"), re.MULTILINE)[1]

setup(
    name="retinanet-ext",
    version=version,
    description="RetinaNet and the focal loss (arXiv 1708.02002) as a Detectron2 plugin",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["retinanet_ext", "retinanet_ext.*"]),
    entry_points={"console_scripts": ["retinanet-ext = retinanet_ext.cli:main"]},
    package_data={"retinanet_ext": ["py.typed", "experiments/*.yaml"]},
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "fvcore",
        "pycocotools",
        "hotcoco>=1.3",
        # The same cv2 as opencv-python, whose wheel needs libGL, libxcb and libglib from the
        # system: on a bare server or container `import cv2` fails with it.
        "opencv-python-headless",
        "numpy",
        "pillow",
        "pyyaml",
        "tabulate",
        "matplotlib",
        "scipy",
        "markdown-it-py",
    ],
    extras_require={
        # Its build imports torch: install torch first, then this with --no-build-isolation
        # (`make test` and `make demo` do both).
        "detectron2": [
            "detectron2 @ git+https://github.com/facebookresearch/detectron2.git"
            "@02b5c4e295e990042a714712c21dc79b731e8833"
        ],
        # For MODEL.BACKBONE.NAME build_retinanet_timm_fpn_backbone.
        "timm": ["timm>=1.0.9"],
        # For retinanet-ext export --format onnx.
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "timm>=1.0.9"),
            *("onnx", "onnxscript", "onnxruntime"),
        ],
    },
)
