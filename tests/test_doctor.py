"""``retinanet-ext doctor``: an environment that is well, and what may be wrong with one."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from retinanet_ext import doctor
from retinanet_ext.doctor import OK, PROBLEM, WARNING, diagnose

ROOT = Path(__file__).parents[1]


def run_doctor(tmp_path, **env):
    command = [sys.executable, "-m", "retinanet_ext", "doctor", "--output", str(tmp_path)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def find(lines, subject):
    (line,) = (line for line in lines if line.subject == subject)
    return line


@pytest.fixture
def without(monkeypatch):
    """Make the import of a module fail."""

    def fail(name, error):
        def import_module(wanted):
            if wanted == name:
                raise error
            return original(wanted)

        original = doctor.import_module
        monkeypatch.setattr(doctor, "import_module", import_module)

    return fail


@pytest.fixture
def cards(monkeypatch):
    """Pretend that PyTorch finds cards, given as (name, major, minor)."""

    def pretend(*found, architectures=("sm_80", "sm_90", "compute_90")):
        found = [
            SimpleNamespace(name=name, major=major, minor=minor, total_memory=16 * doctor.GIB)
            for name, major, minor in found
        ]
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)

    return pretend


def test_this_environment_has_no_problem(tmp_path):
    done = run_doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith((f"{OK:7}  ", f"{WARNING:7}  ")) for line in lines)
    assert f"{OK:7}  PyTorch: {torch.__version__}" in lines


BROKEN = {
    "torch": "raise OSError('libcudart.so.13: cannot open shared object file')",
    "detectron2": "raise ImportError('cannot import name Image')",
}


@pytest.mark.parametrize(
    ("package", "subject"), [("torch", "PyTorch"), ("detectron2", "Detectron2")]
)
def test_a_package_that_does_not_import_is_the_one_problem(package, subject, tmp_path):
    (tmp_path / f"{package}.py").write_text(BROKEN[package])
    done = run_doctor(tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(PROBLEM))
    assert line.startswith(f"{PROBLEM}  {subject}: ") and BROKEN[package][-20:-2] in line
    assert "; pip install " in line


def test_an_extension_built_for_another_pytorch(without, monkeypatch, tmp_path):
    without("detectron2._C", ImportError("undefined symbol: _ZN3c10"))
    monkeypatch.setattr(doctor, "_has_extension", lambda _: True)
    line = find(diagnose(tmp_path), "Detectron2's extension")
    assert line.status == WARNING
    assert "undefined symbol" in line.text and "another PyTorch" in line.text
    assert "--no-cache-dir" in line.text and "--force-reinstall" in line.text


def test_no_extension_is_fine_and_says_what_is_lost(without, monkeypatch, tmp_path):
    without("detectron2._C", ImportError("No module named 'detectron2._C'"))
    monkeypatch.setattr(doctor, "_has_extension", lambda _: False)
    line = find(diagnose(tmp_path), "Detectron2's extension")
    assert line.status == OK
    assert "deformable convolutions" in line.text and "COCO evaluation" in line.text


def versions(monkeypatch, **changed):
    original = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: changed.get(name) or original(name))


def test_torchvision_of_another_pytorch(monkeypatch, tmp_path):
    versions(monkeypatch, torch="9.9.0+cu999")
    line = find(diagnose(tmp_path), "torchvision")
    assert line.status == PROBLEM
    assert "belongs to PyTorch" in line.text
    assert line.text.endswith("9.9.0 is installed; pip install torch==9.9.0 torchvision")


def test_another_commit_of_detectron2(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_installed_commit", lambda _: "f" * 40)
    line = find(diagnose(tmp_path), "Detectron2")
    assert line.status == WARNING and f"commit {'f' * 12}, and 02b5c4e295e9 is" in line.text


def test_missing_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_is_installed", lambda r: not r.startswith(("scipy", "timm")))
    lines = diagnose(tmp_path)
    assert find(lines, "packages") == (PROBLEM, "packages", "missing: scipy; pip install scipy")
    assert find(lines, "extra timm").status == OK
    assert "pip install -e '.[timm]'" in find(lines, "extra timm").text


def test_setuptools_without_what_detectron2_imports(monkeypatch, tmp_path):
    original = doctor.util.find_spec
    monkeypatch.setattr(
        doctor.util, "find_spec", lambda name: name != "pkg_resources" and original(name)
    )
    line = find(diagnose(tmp_path), "setuptools")
    assert line.status == WARNING and line.text.endswith("pip install 'setuptools<82'")


@pytest.mark.parametrize(
    ("capability", "has_code"),
    [((8, 0), True), ((8, 6), True), ((9, 0), True), ((12, 0), True), ((7, 5), False)],
)
def test_a_card_runs_code_of_its_generation_or_earlier_intermediate_code(
    capability, has_code, cards, tmp_path
):
    cards(("NVIDIA Card", *capability))
    line = find(diagnose(tmp_path), "card 0")
    assert line.status == (OK if has_code else PROBLEM)
    if not has_code:
        assert line.text.startswith(
            "NVIDIA Card, sm_75, 16 GiB, for which this PyTorch has no code"
        )


def test_code_of_one_architecture_alone_runs_on_no_other():
    assert doctor._has_code(["sm_90a"], (9, 0)) and not doctor._has_code(["sm_90a"], (10, 0))


def test_two_kinds_of_cards(cards, tmp_path):
    cards(("NVIDIA A", 8, 0), ("NVIDIA B", 9, 0), ("NVIDIA A", 8, 0))
    line = find(diagnose(tmp_path), "cards")
    assert line.status == WARNING
    assert "of 2 kinds (NVIDIA A, NVIDIA B)" in line.text and "CUDA_VISIBLE_DEVICES" in line.text


def test_no_triton_matters_beside_a_card_only(cards, without, tmp_path):
    without("triton", ModuleNotFoundError("No module named 'triton'"))
    assert find(diagnose(tmp_path), "Triton").status == OK
    cards(("NVIDIA A", 8, 0))
    line = find(diagnose(tmp_path), "Triton")
    assert line.status == WARNING and line.text.endswith("pip install triton")


NO_CUDA = {
    "The NVIDIA driver on your system is too old (found version 11040).": (
        *({}, True, PROBLEM),
        "the driver is too old",
    ),
    "Found no NVIDIA driver on your system.": ({}, False, OK, "training runs on the CPU"),
    "No CUDA GPUs are available": ({"CUDA_VISIBLE_DEVICES": ""}, True, OK, "hidden by"),
    "Torch not compiled with CUDA enabled": ({}, True, WARNING, "this PyTorch has no CUDA"),
    "CUDA unknown error": ({}, True, PROBLEM, "nvidia-smi"),
}


@pytest.mark.parametrize("reason", NO_CUDA)
def test_why_cuda_does_not_start(reason, monkeypatch, tmp_path):
    env, has_driver, status, text = NO_CUDA[reason]

    def init():
        raise RuntimeError(f"{reason}\nand more")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/bin/nvidia-smi" if has_driver else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    line = find(diagnose(tmp_path), "CUDA")
    assert line.status == status and text in line.text and "\n" not in line.text


@pytest.mark.parametrize(("free", "status"), [(0.5, PROBLEM), (3, WARNING), (50, OK)])
def test_disk_space(free, status, monkeypatch, tmp_path):
    usage = SimpleNamespace(free=free * doctor.GIB, total=100 * doctor.GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert find(diagnose(tmp_path / "not" / "there"), "output folder").status == status


def test_a_folder_that_cannot_be_written():
    line = find(diagnose(Path("/proc/runs")), "output folder")
    assert line.status == PROBLEM and "/proc cannot be written" in line.text


def test_little_shared_memory_and_a_busy_machine(monkeypatch, tmp_path):
    usage = SimpleNamespace(free=50 * doctor.GIB, total=64 * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    lines = diagnose(tmp_path)
    assert "--shm-size" in find(lines, "shared memory").text
    assert "OMP_WAIT_POLICY=passive" in find(lines, "CPU").text
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert find(diagnose(tmp_path), "CPU").status == OK
