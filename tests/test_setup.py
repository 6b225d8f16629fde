"""Packaging, the set-up script's refusals, and which skips the test run itself accepts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")

READ_PACKAGING = """
import json, sys
sys.modules["torch"] = None  # importing it is now an error
import setuptools
from distutils.core import run_setup
dist = run_setup("setup.py", stop_after="init")
print(json.dumps({
    "version": dist.get_version(),
    "packages": dist.packages,
    "package_data": dist.package_data,
    "ext_modules": dist.ext_modules,
    "extras": dist.extras_require,
    "scripts": dist.entry_points["console_scripts"],
}))
"""


@pytest.fixture(scope="module")
def packaging() -> dict:
    command = [sys.executable, "-c", READ_PACKAGING]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def test_packaging_is_pure_python_and_leaves_no_package_out(packaging):
    inits = sorted((ROOT / "retinanet_ext").rglob("__init__.py"))
    assert sorted(packaging["packages"]) == sorted(
        ".".join(init.parent.relative_to(ROOT).parts) for init in inits
    )
    assert not packaging["ext_modules"]


def test_console_script_is_the_command_line(packaging):
    from retinanet_ext import cli

    assert packaging["scripts"] == [f"{cli.PROGRAM} = {cli.__name__}:{cli.main.__name__}"]


def test_type_checkers_read_the_installed_package(packaging):
    marker, *_ = packaging["package_data"]["retinanet_ext"]
    assert marker == "py.typed" and (ROOT / "retinanet_ext" / marker).is_file()


def test_version_is_the_package_s(packaging):
    import retinanet_ext

    assert packaging["version"] == retinanet_ext.__version__


def test_detectron2_is_pinned_to_one_commit_everywhere(packaging):
    (requirement,) = packaging["extras"]["detectron2"]
    source = r"detectron2 ?@ git\+https://github.com/facebookresearch/detectron2.git@([0-9a-f]{40})"
    commit = re.fullmatch(source, requirement)[1]
    texts = [ROOT / "Makefile", ROOT / ".ci/run", *(ROOT / "tools").glob("*.sh")]
    texts += [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in texts:
        assert set(re.findall(r"\b[0-9a-f]{40}\b", path.read_text(encoding="utf-8"))) <= {commit}


# The set-up script, in a copy of what it reads, with only the named tools on PATH.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "setup.py", checkout)
    shutil.copytree(ROOT / "tools", checkout / "tools")
    return checkout


def write_tool(checkout: Path, name: str, script: str) -> Path:
    path = checkout.parent / "bin" / name
    path.write_text(f"#!{BASH}\n{script}\n")
    path.chmod(0o755)
    return path


def set_up(checkout: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": str(checkout.parent / "bin"), **variables}
    command = [BASH, "tools/setup_env.sh"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def the_line_it_stops_with(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_no_interpreter(checkout):
    line = the_line_it_stops_with(set_up(checkout, PYTHON="python3.99"))
    assert "python3.99" in line and "PYTHON=" in line


def test_old_interpreter(checkout):
    # Says 3.9 where it is asked for its version, and finds it too old.
    old = write_tool(checkout, "python3", 'case "$2" in *print*) echo 3.9 ;; *) exit 1 ;; esac')
    for variables in ({}, {"PYTHON": str(old)}):
        line = the_line_it_stops_with(set_up(checkout, **variables))
        assert "3.9" in line and "3.10 or newer" in line and "PYTHON=" in line


def test_no_venv_module(checkout):
    write_tool(
        checkout, "python3", 'case "$2" in *ensurepip*) exit 1 ;; *print*) echo 3.11 ;; esac'
    )
    line = the_line_it_stops_with(set_up(checkout))
    assert "venv module" in line and "python3-venv" in line


def test_no_git(checkout):
    line = the_line_it_stops_with(set_up(checkout, PYTHON=sys.executable))
    assert "git is missing" in line and "DETECTRON2=" in line


def test_repository_out_of_reach(checkout):
    write_tool(checkout, "git", "exit 128")
    line = the_line_it_stops_with(set_up(checkout, PYTHON=sys.executable))
    assert "github.com/facebookresearch/detectron2.git" in line and "DETECTRON2=" in line


def test_no_compiler(checkout):
    write_tool(checkout, "git", "exit 0")
    write_tool(checkout, "timeout", 'shift; "$@"')
    line = the_line_it_stops_with(set_up(checkout, PYTHON=sys.executable))
    assert "C++ compiler" in line and "CXX=" in line and "PURE=1" in line
    line = the_line_it_stops_with(set_up(checkout, PYTHON=sys.executable, CXX="c++-99"))
    assert "c++-99" in line


def test_no_python_headers(checkout):
    write_tool(checkout, "git", "exit 0")
    write_tool(checkout, "timeout", 'shift; "$@"')
    write_tool(checkout, "c++", "exit 0")
    answers = "*include*) echo /nowhere ;; *print*) echo 3.11 ;;"
    write_tool(checkout, "python3", f'case "$2" in {answers} esac')
    line = the_line_it_stops_with(set_up(checkout))
    assert "/nowhere/Python.h" in line and "python3-dev" in line


@pytest.mark.parametrize("source", ["nowhere", "nowhere.whl"])
def test_detectron2_source_that_is_not_there(checkout, source):
    line = the_line_it_stops_with(set_up(checkout, PYTHON=sys.executable, DETECTRON2=source))
    assert f"DETECTRON2={source}" in line and "wheel" in line


def test_environment_that_is_not_there(checkout):
    line = the_line_it_stops_with(set_up(checkout, VENV="../missing"))
    assert "../missing/bin/python" in line and "VENV=" in line


def test_second_call_runs_nothing(checkout):
    ran = checkout / "ran"
    environment = checkout / ".venv"
    (environment / "bin").mkdir(parents=True)
    write_tool(checkout, "python", f"echo >{ran}; exit 1").rename(environment / "bin/python")
    stamp = environment / ".retinanet_ext"
    stamp.write_text(f"{checkout} ../detectron2\n")
    assert set_up(checkout).returncode == 0
    assert set_up(checkout, DETECTRON2="../detectron2").returncode == 0
    assert not ran.exists()

    newer = stamp.stat().st_mtime + 10
    os.utime(checkout / "setup.py", (newer, newer))
    assert set_up(checkout).returncode != 0
    assert ran.exists()


@pytest.mark.parametrize(
    ("source", "helps"), [("", True), ("clone", True), ("clone", False), ("detectron2.whl", True)]
)
def test_an_extension_that_does_not_load_is_built_anew_or_done_without(checkout, source, helps):
    """As one that pip kept from another PyTorch; here pip and the interpreter only say so."""
    for name in ("git", "c++"):
        write_tool(checkout, name, "exit 0")
    write_tool(checkout, "timeout", 'shift; "$@"')
    write_tool(checkout, "rm", "exit 0")
    (checkout / "clone").mkdir()
    for name in ("Python.h", "detectron2.whl", "clone/setup.py"):
        (checkout / name).write_text("")
    environment = checkout / ".venv"
    (environment / "bin").mkdir(parents=True)
    log, loads = checkout / "log", checkout / "loads"
    mends = "--no-cache-dir" if helps else "nothing"
    answers = f"""case "$*" in
        *pip*install*) echo "$*" >>{log}; [[ $* != *{mends}* ]] || : >{loads} ;;
        *get_path*) echo {checkout} ;;
        *version_info*) echo 3.11 ;;
        *detectron2._C*) [[ -e {loads} ]] ;;
        *torchvision*) exit 1 ;;
    esac"""
    write_tool(checkout, "python", answers).rename(environment / "bin/python")
    result = set_up(checkout, DETECTRON2=source)
    assert result.returncode == 0, result.stderr
    anew = [line for line in log.read_text().splitlines() if "--no-cache-dir" in line]
    expected = {"": "git+https://github.com/", "clone": f"{checkout}/clone"}.get(source)
    if expected is None:  # a wheel is as it is
        assert not anew
    else:
        (line,) = anew
        assert "--force-reinstall" in line and "--no-deps" in line and expected in line
    without = "Going on without Detectron2's compiled extension" in result.stdout
    assert without != (helps and bool(anew))


@pytest.mark.parametrize("source", ["", "clone"])
def test_pure_needs_no_compiler(checkout, source):
    """pip and the interpreter only say so; nothing of Detectron2 is built a second time."""
    write_tool(checkout, "git", "exit 0")
    write_tool(checkout, "timeout", 'shift; "$@"')
    write_tool(checkout, "rm", "exit 0")
    (checkout / "clone").mkdir()
    (checkout / "clone/setup.py").write_text("")
    environment = checkout / ".venv"
    (environment / "bin").mkdir(parents=True)
    log, installed = checkout / "log", checkout / "installed"
    answers = f"""case "$*" in
        *pip*install*) echo "$* $DIST_EXTRA_CONFIG" >>{log}; : >{installed} ;;
        *version_info*) echo 3.11 ;;
        *detectron2._C*) exit 1 ;;
        *detectron2.layers*) [[ -e {installed} ]] ;;
    esac"""
    write_tool(checkout, "python", answers).rename(environment / "bin/python")
    result = set_up(checkout, DETECTRON2=source, PURE="1", CXX="/nonexistent")
    assert result.returncode == 0, result.stderr
    calls = log.read_text().splitlines()
    (pure,) = (call for call in calls if "tools/pure.cfg" in call)
    assert "--no-cache-dir" in pure
    assert (f"{checkout}/clone" if source else "git+https://github.com/") in pure
    assert not any("force-reinstall" in call or "[detectron2" in call for call in calls)
    assert set_up(checkout, DETECTRON2=source, PURE="1").returncode == 0
    assert log.read_text().splitlines() == calls


def test_a_pure_wheel_has_the_python_files_and_nothing_compiled(tmp_path):
    source = tmp_path / "source"
    (source / "package").mkdir(parents=True)
    (source / "package/__init__.py").write_text("")
    (source / "package/data.yaml").write_text("")
    setup = """from setuptools import Extension, setup
setup(name="package", version="1", packages=["package"], package_data={"package": ["*.yaml"]},
      ext_modules=[Extension("package._C", ["no_such_file.c"])])"""
    (source / "setup.py").write_text(setup)
    options = "--no-build-isolation --no-deps --no-index --no-cache-dir --wheel-dir"
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options.split(), str(tmp_path), str(source)],
        env={**os.environ, "DIST_EXTRA_CONFIG": str(ROOT / "tools/pure.cfg"), "CC": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in ZipFile(wheel).namelist() if name.startswith("package/")]
    assert sorted(names) == ["package/__init__.py", "package/data.yaml"]


# The test run.

SUITE = {
    "test_skips.py": """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("no good reason")

@pytest.mark.xfail(reason="known")
def test_is_known_to_fail():
    assert False

@pytest.mark.cuda
def test_on_a_device():
    assert False, "there is no device"
""",
    "test_module.py": "import pytest\npytest.importorskip('a_package_that_is_missing')\n",
    "torch.py": "class cuda:\n    is_available = staticmethod(lambda: False)\n",
    "detectron2.py": "",
}


def run_suite(folder: Path, *, ci: str, prelude: str = "") -> subprocess.CompletedProcess:
    for name, text in SUITE.items():
        (folder / name).write_text(text)
    shutil.copy(ROOT / "tests/conftest.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    arguments = ["--continue-on-collection-errors", "-p", "no:cacheprovider", "."]
    run = f"{prelude}\nimport sys, pytest\nsys.exit(pytest.main({arguments}))"
    return subprocess.run(
        [sys.executable, "-c", run],
        cwd=folder,
        env={**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )


def test_only_cuda_tests_may_skip_in_ci(tmp_path):
    result = run_suite(tmp_path, ci="true")
    assert result.returncode == 1
    # The test that skipped itself, and the module that skipped as a whole.
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 1 error" in result.stdout
    assert "no good reason" in result.stdout


def test_skips_are_reported_elsewhere(tmp_path):
    result = run_suite(tmp_path, ci="")
    assert result.returncode == 0, result.stdout
    assert "1 passed, 3 skipped, 1 xfailed" in result.stdout
    assert "needs a CUDA device" in result.stdout


def test_missing_detectron2_ends_the_run_in_ci(tmp_path):
    result = run_suite(tmp_path, ci="true", prelude="import sys; sys.modules['detectron2'] = None")
    assert result.returncode != 0
    assert result.stderr.strip() == "ERROR: Detectron2 is not installed; `make test` installs it"
