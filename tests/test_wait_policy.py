"""OpenMP's threads sleep while they wait, unless the person has said how they are to wait."""

import os
import re
import subprocess
import sys

import pytest

from training import ROOT

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
ENTRY_POINTS = {
    "train_net.py": ["train_net.py", "--help"],
    "retinanet-ext": ["-m", "retinanet_ext", "export-weights", "none.pth", "none.pth"],
}


def spin_counts(*argv, **variables):
    """How often libgomp says that a waiting thread spins, in each process that loads it."""
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    env |= {"OMP_DISPLAY_ENV": "verbose", **variables}
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)


@pytest.mark.parametrize("argv", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_entry_points_set_it_before_libgomp_reads_it(argv):
    assert spin_counts(*argv) == ["0"]


def test_what_the_person_has_set_stays():
    assert spin_counts(*ENTRY_POINTS["train_net.py"], GOMP_SPINCOUNT="1234") == ["1234"]


def test_a_program_that_has_loaded_torch_is_left_alone():
    program = "import os, torch, retinanet_ext; assert 'OMP_WAIT_POLICY' not in os.environ"
    (count,) = spin_counts("-c", f"{program}; print('fine')")
    assert int(count) > 0
