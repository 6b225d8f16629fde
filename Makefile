override VENV := $(or $(VENV),.venv)
export VENV PYTHON DETECTRON2 PURE PYTHONS TORCHES TESTS

RUN := "$(VENV)/bin/python"
DEMO := output/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help demo test lint matrix env

help:
	@echo "make demo    train the quick start, evaluate it and draw its detections"
	@echo "make test    run the tests"
	@echo "make lint    check style (ruff) and types (mypy)"
	@echo "make matrix  run the core tests on several versions of Python and PyTorch (tools/matrix.sh)"
	@echo
	@echo "Each sets up .venv at its first call (PyTorch and Detectron2: some minutes, 6 GB). Or:"
	@echo "  PYTHON=python3.12      the interpreter that makes .venv"
	@echo "  VENV=/path/to/env      use this environment; a Detectron2 in it is kept as it is"
	@echo "  DETECTRON2=SOURCE      install Detectron2 from a local clone, a wheel or a mirror's URL"
	@echo "  PURE=1                 install Detectron2's Python files alone: no C++ compiler needed"
	@echo "  ARGS=\"SOLVER.MAX_ITER 60\"  config values for make demo"

demo: env
	@$(RUN) train_net.py --config-file configs/quickstart.yaml OUTPUT_DIR $(DEMO) $(ARGS)

test: env
	@$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

matrix:
	@bash tools/matrix.sh

env:
	@bash tools/setup_env.sh
