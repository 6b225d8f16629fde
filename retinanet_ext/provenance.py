"""What a result depends on besides config and data: versions, commit and processor."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import retinanet_ext


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {
        "retinanet_ext": retinanet_ext.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "detectron2")},
    }


def commit() -> str:
    """Return the project's commit, marked if files differ from it; empty outside of git."""
    root = Path(retinanet_ext.__file__).resolve().parents[1]

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        top = git("rev-parse", "--show-toplevel")
        if not top or Path(top) != root:  # installed below another project's repository
            return ""
        head = git("rev-parse", "--short=10", "HEAD")
        changed = head and git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git
        return ""
    return f"{head} with changes" if changed else head


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
