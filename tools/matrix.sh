#!/usr/bin/env bash
# Runs the core tests on several versions of Python and PyTorch, each without and with Detectron2's
# compiled extension, and prints a table. Each pair has an environment of its own in .matrix (6 GB),
# which is removed after its tests.
#   PYTHONS  interpreters (those of 3.10 to 3.13 that run)
#   TORCHES  pairs torch+torchvision (2.11.0+0.26.0 2.14.1+0.29.1)
#   TESTS    arguments of pytest
set -euo pipefail
cd "${BASH_SOURCE[0]%/*}/.."

TORCHES=${TORCHES:-2.11.0+0.26.0 2.14.1+0.29.1}
TESTS=${TESTS:-tests/losses tests/modeling tests/test_sampling.py tests/test_plugin.py
  tests/test_without_extension.py tests/engine/test_train_step.py tests/engine/test_predictor.py}
if [[ -z ${PYTHONS:-} ]]; then
  for python in python3.{10..13}; do
    "$python" --version >/dev/null 2>&1 && PYTHONS+=" $python"
  done
fi

failed=0
row() { printf '| %-11s | %-7s | %-11s | %-9s | %s |\n' "$@" | tee -a .matrix/table.md; }

run_tests() { # run_tests PYTHON TORCH TORCHVISION EXTENSION
  local name=.matrix/$1-$2-$4 result
  # shellcheck disable=SC2086
  "$VENV/bin/python" -m pytest -n auto --maxprocesses 4 $TESTS >"$name.log" 2>&1 || failed=1
  result=$(tail -n 1 "$name.log")
  row "$1" "$2" "$3" "$4" "${result//=/}"
}

mkdir -p .matrix
rm -f .matrix/table.md
row Python torch torchvision extension 'core tests'
row --- --- --- --- ---
for python in $PYTHONS; do
  for pair in $TORCHES; do
    export VENV=$PWD/.matrix/venv
    torch=${pair%+*} torchvision=${pair#*+}
    rm -rf "$VENV"
    if ! {
      "$python" -m venv "$VENV"
      "$VENV/bin/python" -m pip install "torch==$torch" "torchvision==$torchvision" 'setuptools<82'
      PURE=1 bash tools/setup_env.sh
    } >".matrix/$python-$torch-setup.log" 2>&1; then
      failed=1
      row "$python" "$torch" "$torchvision" '' "not installed: .matrix/$python-$torch-setup.log"
      continue
    fi
    run_tests "$python" "$torch" "$torchvision" without
    if {
      "$VENV/bin/python" -m pip uninstall -y detectron2
      rm "$VENV/.retinanet_ext"
      PURE='' bash tools/setup_env.sh
      "$VENV/bin/python" -c 'import torch, detectron2._C'
    } >>".matrix/$python-$torch-setup.log" 2>&1; then
      run_tests "$python" "$torch" "$torchvision" with
    else
      failed=1
      row "$python" "$torch" "$torchvision" with "not built: .matrix/$python-$torch-setup.log"
    fi
  done
done
rm -rf .matrix/venv
exit "$failed"
