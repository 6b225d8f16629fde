"""Neither Detectron2's compiled extension, which ``PURE=1`` does without, nor ``torch.jit.script``,
which torch announces to remove, is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

TRAIN_AND_DETECT = """
import sys

import torch

sys.modules["detectron2._C"] = None  # importing it is now an error
del torch.jit.script

import train_net
from retinanet_ext.engine import Predictor, argument_parser, load_config

folder = sys.argv[1]
opts = ["OUTPUT_DIR", folder, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2"]
args = argument_parser().parse_args(["--config-file", "tests/engine/tiny.yaml", *opts])
train_net.main(args)
cfg = load_config(f"{folder}/config.yaml", ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"])
(found,) = Predictor(cfg)(["tests/fixtures/bccd_mini/images/BloodImage_00066.jpg"])
print(len(found))
"""


def test_training_evaluation_and_detection_run_without_them(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_DETECT, str(tmp_path / "run")],
        cwd=ROOT,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) == 100  # TEST.DETECTIONS_PER_IMAGE
    *_, last = map(json.loads, (tmp_path / "run/metrics.json").read_text().splitlines())
    assert "bbox/AP" in last
