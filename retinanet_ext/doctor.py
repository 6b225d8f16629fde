"""Check the environment: what is installed, what the machine has, and what to do about it.

A package may be missing or broken. Each check therefore imports what it checks, and its failure is
a line of the report.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from retinanet_ext.errors import first_line

OK, WARNING, PROBLEM = "ok", "warning", "problem"
MIN_PYTHON, MIN_TORCH = (3, 10), (2, 6)
GIB = 2**30
MIN_FREE, LITTLE_FREE = 1 * GIB, 5 * GIB
"""Bytes on the disk: room for one checkpoint of R-101, and for the checkpoints of a run."""
MIN_SHARED_MEMORY = GIB
"""Bytes of ``/dev/shm``, through which workers hand batches over. A Docker container has 64 MiB."""


class Line(NamedTuple):
    """One line of the report: ``ok``, ``warning`` or ``problem``, what is meant, and the remedy."""

    status: str
    subject: str
    text: str


Lines = Iterator[Line]


def diagnose(output: Path) -> list[Line]:
    """Return the report on this environment.

    Args:
        output: folder that a run is to be written to
    """
    has_torch = _try_import("torch")[0] is not None
    checks = [_python, _torch]
    if has_torch:
        checks += [_torchvision, _detectron2, _cuda, _triton]
    checks += [_setuptools, _packages, _extras, partial(_folder, output), _shared_memory, _cpu]
    return [line for check in checks for line in _guarded(check)]


def describe(lines: Sequence[Line]) -> str:
    """Return the report as text, a line each."""
    return "\n".join(f"{status:7}  {subject}: {text}" for status, subject, text in lines)


def _guarded(check: Callable[[], Lines]) -> list[Line]:
    try:
        return list(check())
    except Exception as error:  # of a package in a state that nobody foresaw
        return [Line(PROBLEM, "a check", f"failed: {type(error).__name__}: {first_line(error)}")]


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    """Return a module, or None and the first line of why it cannot be imported."""
    try:
        return import_module(name), ""
    except Exception as error:  # a broken extension raises OSError or RuntimeError, too
        return None, first_line(error)


def _version(package: str) -> str:
    """Return the installed version, empty if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _python() -> Lines:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        remedy = "3.10 or newer is needed: PYTHON=python3.12 make test"
        yield Line(PROBLEM, "Python", f"{version}; {remedy}")
    else:
        yield Line(OK, "Python", f"{version}, {sys.executable}")


def _torch() -> Lines:
    torch, reason = _try_import("torch")
    if torch is None:
        version = _version("torch")
        state = f"{version} cannot be imported" if version else "is not installed"
        remedy = "pip install --force-reinstall torch torchvision"
        yield Line(PROBLEM, "PyTorch", f"{state}: {reason}; {remedy}")
    elif _numbers(torch.__version__) < MIN_TORCH:
        remedy = "2.6 or newer is needed: pip install -U torch torchvision"
        yield Line(PROBLEM, "PyTorch", f"{torch.__version__}; {remedy}")
    else:
        yield Line(OK, "PyTorch", torch.__version__)


def _torchvision() -> Lines:
    version, torch_version = _version("torchvision"), _version("torch").partition("+")[0]
    remedy = f"pip install torch=={torch_version} torchvision"
    needed = re.search(r"\btorch\s*\(?==\s*([\d.]+)", " ".join(_requirements("torchvision")))
    _, reason = _try_import("torchvision.ops")
    if needed and needed[1] != torch_version:
        text = f"{version} belongs to PyTorch {needed[1]}, and {torch_version} is installed"
        yield Line(PROBLEM, "torchvision", f"{text}; {remedy}")
    elif reason:
        yield Line(PROBLEM, "torchvision", f"cannot be imported: {reason}; {remedy}")
    else:
        yield Line(OK, "torchvision", version)


def _requirements(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _is_installed(requirement: str) -> bool:
    package = _package(requirement)
    # Four packages give cv2; any of them will do.
    return bool(util.find_spec("cv2") if package.startswith("opencv") else _version(package))


def _package(requirement: str) -> str:
    return re.split(r"[\s;<>=!~\[(@]", requirement, maxsplit=1)[0]


def _packages() -> Lines:
    """Check what setup.py requires. PyTorch and torchvision have lines of their own."""
    required = [each for each in _requirements("retinanet-ext") if "extra ==" not in each]
    missing = [_package(each) for each in required if not _is_installed(each)]
    missing = [package for package in missing if package not in ("torch", "torchvision")]
    if not required:
        remedy = "pip install --no-build-isolation --no-deps -e ."
        yield Line(WARNING, "packages", f"retinanet-ext is not installed; {remedy}")
    elif missing:
        names = " ".join(missing)
        yield Line(PROBLEM, "packages", f"missing: {names}; pip install {names}")
    else:
        yield Line(OK, "packages", "all that setup.py requires are installed")


def _extras() -> Lines:
    """List the optional packages, except for those of development."""
    extras: dict[str, list[str]] = {}
    for requirement in _requirements("retinanet-ext"):
        extra = re.search(r"extra == .([\w-]+)", requirement)
        if extra and extra[1] not in ("dev", "detectron2"):
            extras.setdefault(extra[1], []).append(requirement)
    for extra, requirements in extras.items():
        missing = [_package(each) for each in requirements if not _is_installed(each)]
        if missing:
            text = (
                f"not installed: {' '.join(missing)}; if you need it: pip install -e '.[{extra}]'"
            )
            yield Line(OK, f"extra {extra}", text)
        else:
            found = [f"{_package(each)} {_version(_package(each))}" for each in requirements]
            yield Line(OK, f"extra {extra}", ", ".join(found))


def _detectron2() -> Lines:
    pinned = next((r for r in _requirements("retinanet-ext") if r.startswith("detectron2")), "")
    source = pinned.partition(";")[0].partition("@")[2].strip()
    version = _version("detectron2")
    options = "--no-cache-dir --no-deps --force-reinstall " if version else ""
    install = f"pip install --no-build-isolation {options}{source}"
    if not source:
        install = "make test installs it"
    layers, reason = _try_import("detectron2.layers")
    if layers is None:
        state = f"{version} cannot be imported" if version else "is not installed"
        yield Line(PROBLEM, "Detectron2", f"{state}: {reason}; {install}")
        return
    commit, wanted = _installed_commit("detectron2"), source.rpartition("@")[2]
    text = f"{version}, commit {commit[:12] or 'unknown'}"
    if commit and wanted and commit != wanted:
        text += f", and {wanted[:12]} is the one that is tested; {install}"
        yield Line(WARNING, "Detectron2", text)
    else:
        yield Line(OK, "Detectron2", text)

    lost = "deformable convolutions do not work and COCO evaluation is slower"
    extension, reason = _try_import("detectron2._C")
    if extension is not None:
        yield Line(OK, "Detectron2's extension", "loads")
    elif _has_extension(layers):
        text = f"does not load ({reason}), as one that was built for another PyTorch: {lost}"
        yield Line(WARNING, "Detectron2's extension", f"{text}; {install}")
    else:
        yield Line(OK, "Detectron2's extension", f"not built, and RetinaNet needs none: {lost}")


def _has_extension(layers: ModuleType) -> bool:
    return any(Path(layers.__file__ or "").parents[1].glob("_C.*"))


def _installed_commit(package: str) -> str:
    text = metadata.distribution(package).read_text("direct_url.json") or ""
    found = re.search(r'"commit_id": *"([0-9a-f]+)"', text)
    return found[1] if found else ""


def _setuptools() -> Lines:
    version = _version("setuptools")
    if util.find_spec("pkg_resources"):
        yield Line(OK, "setuptools", version)
    else:
        text = f"{version or 'missing'}, without pkg_resources, which detectron2.model_zoo imports"
        yield Line(WARNING, "setuptools", f"{text}; pip install 'setuptools<82'")


def _cuda() -> Lines:
    torch = import_module("torch")
    built = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}"
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except Exception as error:
        yield _without_cuda(first_line(error), built)
        return
    if torch.version.hip:
        yield Line(OK, "GPU", f"{count} by ROCm {torch.version.hip}, which is not tested")
        return
    yield Line(OK, "CUDA", f"{torch.version.cuda}, {count} cards")
    names = []
    architectures = torch.cuda.get_arch_list()
    for index in range(count):
        card = torch.cuda.get_device_properties(index)
        names.append(card.name)
        text = f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / GIB:.0f} GiB"
        if _has_code(architectures, (card.major, card.minor)):
            yield Line(OK, f"card {index}", text)
        else:
            text += f", for which this PyTorch has no code (only {', '.join(architectures)})"
            remedy = "install a PyTorch that has: https://pytorch.org/get-started/previous-versions"
            yield Line(PROBLEM, f"card {index}", f"{text}; {remedy}")
    if len(set(names)) > 1:
        text = f"of {len(set(names))} kinds ({', '.join(sorted(set(names)))}): the slowest sets the"
        remedy = "CUDA_VISIBLE_DEVICES=0,1 before a command chooses"
        yield Line(WARNING, "cards", f"{text} pace and the smallest the batch; {remedy}")


def _without_cuda(reason: str, built: str) -> Line:
    """Tell why CUDA does not start; without a card that is no fault."""
    has_driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if "too old" in reason:
        text = f"the driver is too old ({reason})"
        return Line(PROBLEM, "CUDA", f"{text}; update it, or install a PyTorch for an older CUDA")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return Line(OK, "CUDA", "hidden by CUDA_VISIBLE_DEVICES: training runs on the CPU")
    if not has_driver:
        return Line(OK, "CUDA", "no NVIDIA driver, so no card: training runs on the CPU")
    if "not compiled with CUDA" in reason:
        remedy = "pip install --force-reinstall torch torchvision, from an index with CUDA"
        text = f"there is a driver, but this PyTorch has no CUDA; {remedy}"
        return Line(WARNING, "CUDA", text)
    text = f"there is a driver, but CUDA does not start: {reason} ({built})"
    return Line(PROBLEM, "CUDA", f"{text}; compare with what nvidia-smi prints")


def _has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Tell whether a card runs code for one of the architectures.

    It runs machine code (``sm_86``) of its own major version up to its minor one, and compiles
    intermediate code (``compute_90``) of any earlier architecture.
    """
    for kind, major, minor, suffix in re.findall(
        r"(sm|compute)_(\d+)(\d)([a-z]?)\b", " ".join(architectures)
    ):
        code = int(major), int(minor)
        if suffix:
            runs = code == capability
        elif kind == "sm":
            runs = code[0] == capability[0] and code <= capability
        else:
            runs = code <= capability
        if runs:
            return True
    return False


def _triton() -> Lines:
    triton, reason = _try_import("triton")
    if triton is not None:
        yield Line(OK, "Triton", triton.__version__)
    elif import_module("torch").cuda.is_available():
        text = f"cannot be imported ({reason}): loss and labels are computed by plain torch, slower"
        yield Line(WARNING, "Triton", f"{text}, and MODEL.COMPILE fails; pip install triton")
    else:
        yield Line(OK, "Triton", "not installed; only a GPU needs it")


def _folder(output: Path) -> Lines:
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        remedy = "choose another OUTPUT_DIR"
        text = f"{existing.absolute()} cannot be written: {error.strerror}"
        yield Line(PROBLEM, "output folder", f"{text}; {remedy}")
        return
    free = shutil.disk_usage(existing).free
    text = f"{output}, {free / GIB:.1f} GiB free"
    if free < LITTLE_FREE:
        remedy = "a checkpoint takes up to 0.5 GiB; free some, or choose another OUTPUT_DIR"
        status = PROBLEM if free < MIN_FREE else WARNING
        yield Line(status, "output folder", f"{text}; {remedy}")
    else:
        yield Line(OK, "output folder", text)


def _shared_memory() -> Lines:
    folder = Path("/dev/shm")
    if folder.is_dir() and (size := shutil.disk_usage(folder).total) < MIN_SHARED_MEMORY:
        text = f"/dev/shm has {size / 2**20:.0f} MiB, in which workers hand over their batches"
        remedy = "docker run --shm-size=8g, or DATALOADER.NUM_WORKERS 0"
        yield Line(WARNING, "shared memory", f"{text}; {remedy}")


def _cpu() -> Lines:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    text = f"{cores} cores, load {load:.1f}"
    if load >= cores / 2 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        remedy = "set OMP_WAIT_POLICY=passive before a training on the CPU (docs/speed.md)"
        yield Line(WARNING, "CPU", f"{text}: other processes use it; {remedy}")
    else:
        yield Line(OK, "CPU", text)
