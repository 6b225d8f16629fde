"""Fixtures of the engine's tests."""

import logging

import pytest

LOGGERS = ("detectron2", "fvcore", "retinanet_ext", "detectron2.engine.train_loop")


@pytest.fixture
def restore_logging():
    """Undo what a command line does to loggers, for the tests that come after it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(log.level, log.propagate, log.handlers[:], log.filters[:]) for log in loggers]
    yield
    for log, (level, propagate, handlers, filters) in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.propagate = propagate
        log.handlers[:] = handlers
        log.filters[:] = filters
