"""Which tests may be skipped: those marked ``cuda`` without a CUDA device, and those marked
``weights`` without real weights; in CI no others."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from importlib.util import find_spec

import pytest
from hypothesis import settings

LOGGERS = ("detectron2", "fvcore", "retinanet_ext", "detectron2.engine.train_loop")

# Tests that run beside each other have a core each, and what they start has too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# No cache of an earlier run, and none in the home of whoever runs the tests.
os.environ["RETINANET_EXT_CACHE"] = tempfile.mkdtemp(prefix="retinanet_ext_cache_")
atexit.register(shutil.rmtree, os.environ["RETINANET_EXT_CACHE"], ignore_errors=True)

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")

# No deadline: a busy machine is no failure. In CI the same examples every time.
settings.register_profile("retinanet_ext", deadline=None, derandomize=IN_CI)
settings.load_profile("retinanet_ext")


def pytest_configure(config: pytest.Config) -> None:
    if IN_CI and find_spec("detectron2") is None:
        raise pytest.UsageError("Detectron2 is not installed; `make test` installs it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_cuda = [item for item in items if item.get_closest_marker("cuda")]
    if not needs_cuda:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needs_cuda:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    may_skip = item.get_closest_marker("cuda") or item.get_closest_marker("weights")
    if report.skipped and not hasattr(report, "wasxfail") and not may_skip:
        fail_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:  # a whole module, as by pytest.importorskip
        fail_in_ci(report)
    return report


def fail_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI:
        _, _, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason} (in CI only tests marked cuda or weights may be skipped)"


@pytest.fixture
def restore_logging() -> Iterator[None]:
    """Undo what a command line does to loggers, for the tests that come after it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(log.level, log.propagate, log.handlers[:], log.filters[:]) for log in loggers]
    raises = logging.raiseExceptions
    yield
    logging.raiseExceptions = raises
    for log, (level, propagate, handlers, filters) in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.propagate = propagate
        log.handlers[:] = handlers
        log.filters[:] = filters
