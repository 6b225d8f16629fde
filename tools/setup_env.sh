#!/usr/bin/env bash
# Sets up the environment that the Makefile's commands run in; does nothing if that was done before.
#   VENV        the environment (.venv, which is made here; any other must exist)
#   PYTHON      the interpreter that makes .venv (python3)
#   DETECTRON2  a local clone, a wheel or a git URL to install Detectron2 from
#   PURE        1: install Detectron2's Python files alone, which needs no C++ compiler
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."

TORCH="torch==2.11.0 torchvision==0.26.0"
VENV=${VENV:-.venv}
stamp=$VENV/.retinanet_ext # written at the end: the checkout that is installed, and DETECTRON2
env_python=$VENV/bin/python

die() {
  echo "Set-up stopped: $1" >&2
  exit 1
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

check_python() { # check_python INTERPRETER REMEDY
  local version
  version=$(python_version "$1") || die "$1 does not run as a Python interpreter: $2."
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$1 is Python $version, and 3.10 or newer is needed: $2."
}

has_pip() { [[ -x $env_python ]] && "$env_python" -m pip --version >/dev/null 2>&1; }
can_import() { [[ -x $env_python ]] && "$env_python" -c "import $1" >/dev/null 2>&1; }
extension_loads() { can_import 'torch, detectron2._C'; }

[[ $(<setup.py) =~ git\+(https://[^\"]+)\"[[:space:]]*\"@([0-9a-f]{40}) ]]
official=${BASH_REMATCH[1]} commit=${BASH_REMATCH[2]}
anew='--no-build-isolation --no-cache-dir --no-deps --force-reinstall'

# Where Detectron2 comes from: sets `requirements` (pip's arguments) and `to_build` (of these what
# builds Detectron2, if any), and fails at once, not after a download of gigabytes, if that source
# or what its build needs is missing.
check_detectron2_source() {
  local source=${DETECTRON2:-} python=$1 url='' include
  to_build=''
  case $source in
    '')
      url=$official
      requirements=(-e '.[detectron2,dev]')
      to_build=git+$url@$commit
      ;;
    *.whl)
      [[ $source == *://* || -f $source ]] || die "DETECTRON2=$source is no file: give a wheel's path."
      requirements=("$source" -e '.[dev]')
      return
      ;;
    *://* | git@*)
      url=${source#git+}
      [[ $url == git@* ]] && url=${url/://} && url=ssh://$url
      [[ ${url##*/} == *@* ]] || url=$url@$commit
      requirements=("git+$url" -e '.[dev]')
      url=${url%@*}
      ;;
    *)
      if [[ -f $source/setup.py ]]; then
        requirements=("$(cd "$source" && pwd)" -e '.[dev]')
      elif [[ -f $source/HEAD ]]; then # a bare clone
        url=file://$(cd "$source" && pwd)
        requirements=("git+$url@$commit" -e '.[dev]')
      else
        die "DETECTRON2=$source is neither a clone of Detectron2, a wheel nor a git URL: give one of these."
      fi
      ;;
  esac

  to_build=${to_build:-${requirements[0]}}
  if [[ $url ]]; then
    command -v git >/dev/null ||
      die "git is missing, and Detectron2 comes by it: install git (apt install git), or give a local clone or wheel with DETECTRON2=."
    GIT_TERMINAL_PROMPT=0 timeout 60 git ls-remote "$url" HEAD >/dev/null 2>&1 ||
      die "Detectron2's repository $url cannot be reached: give a local clone, a wheel or a mirror's URL with DETECTRON2=."
  fi
  [[ ${PURE:-} == 1 ]] && return
  command -v "${CXX:-c++}" >/dev/null ||
    die "no C++ compiler (${CXX:-c++}), and Detectron2's build needs one: install it (apt install g++), name it with CXX=, give a wheel with DETECTRON2=, or do without with PURE=1."
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ -f $include/Python.h ]] ||
    die "$include/Python.h is missing, and Detectron2's build needs it: install Python's headers (apt install python3-dev), give a wheel with DETECTRON2=, or do without with PURE=1."
}

[[ -z ${PYTHON:-} ]] || check_python "$PYTHON" "install Python 3.10 or newer, or name another one with PYTHON="
if [[ -n ${PYTHON:-} && $VENV == .venv && -x $env_python ]]; then
  [[ $(python_version "$PYTHON") == $(python_version "$env_python") ]] ||
    die ".venv has Python $(python_version "$env_python") and PYTHON=$PYTHON is another: remove .venv to have it made anew, or leave PYTHON out."
fi
if [[ -x $env_python && -f $stamp && ! setup.py -nt $stamp ]]; then
  [[ $(<"$stamp") == "$PWD "${DETECTRON2:-*} ]] && exit 0
fi

# The environment itself.
base_python=$env_python
if [[ $VENV != .venv ]]; then
  check_python "$env_python" "give an environment with bin/python of 3.10 or newer as VENV=, or leave VENV out"
  has_pip || die "VENV=$VENV has no pip: run $env_python -m ensurepip."
  "$env_python" -c 'import os, sys, sysconfig; sys.exit(not os.access(sysconfig.get_path("purelib"), os.W_OK))' &&
    [[ -w $VENV ]] ||
    die "VENV=$VENV cannot be written, so the plugin cannot be installed there: give an environment of your own, or leave VENV out."
elif ! has_pip; then
  base_python=${PYTHON:-python3}
  check_python "$base_python" "install Python 3.10 or newer, or name another one with PYTHON="
  "$base_python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$base_python lacks the venv module: install it (apt install python3-venv), or name another interpreter with PYTHON=."
fi

detectron2_is_there=false
can_import 'torch, torchvision, detectron2.layers' && detectron2_is_there=true
$detectron2_is_there || check_detectron2_source "$base_python"

if ! has_pip; then
  echo "Setting up $VENV: PyTorch and Detectron2, once; some minutes and 6 GB."
  "$base_python" -m venv "$VENV" || die "$base_python cannot make $VENV: remove what is left of it and see the reason above."
fi
# With what is installed as constraints, pip adds packages and changes none.
"$env_python" -m pip --disable-pip-version-check list --format=freeze \
  --exclude detectron2 --exclude retinanet-ext >"$VENV/.constraints"

no_index="see pip's reason above, and check the package index (PIP_INDEX_URL= names a mirror)"
# Detectron2's model zoo imports pkg_resources, which setuptools has up to 81.
setuptools='setuptools>=64,<82'
! can_import setuptools || setuptools='setuptools>=64'
pip_add() { "$env_python" -m pip install --disable-pip-version-check -c "$VENV/.constraints" "$@"; }

if $detectron2_is_there; then
  [[ -z ${DETECTRON2:-} ]] || echo "DETECTRON2=$DETECTRON2 is not used: $VENV has Detectron2 already (uninstall that first)."
  pip_add "$setuptools" wheel || die "pip could not add setuptools and wheel to $VENV: $no_index."
  pip_add --no-build-isolation --no-deps -e . ||
    die "pip could not install the plugin in $VENV; its reason is above."
  missing=$("$env_python" - <<'END'
import re
from importlib import metadata, util

for requirement in metadata.requires("retinanet-ext"):
    name = re.match(r"[\w-]+", requirement)[0]
    # Four packages give cv2; any of them will do.
    if not util.find_spec("cv2" if name.startswith("opencv") else name):
        print(name)
END
  )
  missing=${missing//$'\n'/ }
  # shellcheck disable=SC2086
  [[ -z $missing ]] || pip_add $missing || die "pip could not add $missing to $VENV: $no_index."
else
  # PyTorch first: Detectron2's build imports it, hence no build isolation either.
  if ! can_import 'torch, torchvision'; then
    can_import torch && TORCH=torchvision # the one that fits the PyTorch that is there
    # shellcheck disable=SC2086
    pip_add $TORCH || die "pip could not install $TORCH: $no_index, the disk space and the Python version."
  fi
  pip_add "$setuptools" wheel ninja || die "pip could not add setuptools, wheel and ninja: $no_index."
  if [[ ${PURE:-} == 1 && $to_build ]]; then
    # pip must not keep this wheel, because without PURE it would hand it out again.
    DIST_EXTRA_CONFIG=$PWD/tools/pure.cfg pip_add --no-build-isolation --no-cache-dir "$to_build" ||
      die "pip could not install Detectron2's Python files; its reason is above."
    requirements=(-e '.[dev]')
    to_build=''
  fi
  # RetinaNet uses none of Detectron2's own CUDA kernels: built for the CPU, it needs no CUDA
  # toolkit that matches PyTorch's. FORCE_CUDA=1 builds them all the same.
  CUDA_VISIBLE_DEVICES='' pip_add --no-build-isolation "${requirements[@]}" ||
    die "pip could not build Detectron2 or install the plugin; its reason is above."
  # pip keeps what it has built, and a build for another PyTorch does not load.
  if [[ $to_build ]] && ! extension_loads; then
    echo "Building Detectron2 anew: what pip had kept of it was built for another PyTorch."
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES='' pip_add $anew "$to_build" ||
      die "pip could not build Detectron2; its reason is above."
  fi
fi

can_import 'torch, detectron2.layers, cv2, retinanet_ext' ||
  die "Detectron2 in $VENV does not import: see $env_python -c 'import torch, detectron2.layers, cv2', and remove what is broken."
[[ ${PURE:-} == 1 ]] || extension_loads ||
  echo "Going on without Detectron2's compiled extension, which the PyTorch in $VENV does not load: RetinaNet needs it for deformable convolutions alone, and COCO evaluation is slower. To build it: $env_python -m pip install $anew git+$official@$commit"
rm "$VENV/.constraints"
echo "$PWD ${DETECTRON2:-}" >"$stamp"
