"""The processes of a run, the exit code they end with, and the one line that says why."""

from __future__ import annotations

import argparse
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as launch_processes
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from retinanet_ext.errors import (
    FAILED,
    INPUT_ERROR,
    STOPPED,
    InputError,
    NonFiniteError,
    StoppedError,
    explain,
    first_line,
)

RENDEZVOUS_TIMEOUT = 300
"""Seconds in which the processes that ``launch`` starts must meet."""

GRACE = 5
"""Seconds that a process waits before it reports what another process may report as well."""


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's argument parser, with a free port by default."""
    parser = default_argument_parser()
    parser.description = "Train a detector, or evaluate its weights with --eval-only."
    parser.set_defaults(dist_url="auto")
    return parser


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> int:
    """Call ``main_func(*args)`` in every process of a run, and return the exit code.

    The arguments are those of Detectron2's ``launch``. A process that torchrun has started joins
    the others instead of starting any. Without CUDA the processes train on the CPU.

    Args:
        main_func: trains or evaluates; can be pickled, as can ``args``
        num_gpus_per_machine: processes per machine
        num_machines: machines, each with as many processes
        machine_rank: rank of this machine
        dist_url: where the processes meet, ``tcp://HOST:PORT``; "auto": a free port
        args: of ``main_func``
        timeout: of the rendezvous and of every collective operation

    Returns:
        0, or after one line on stderr: 2 for an :class:`InputError`, 3 for a loss or gradient that
        is not finite, 143 for a training that was stopped and can be resumed, 130 for an interrupt,
        1 for a process that was lost, for memory that ran out and for results other than
        ``TEST.EXPECTED_RESULTS``
    """
    _tolerate_closed_streams()
    # NCCL would otherwise wait for absent processes without a timeout.
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
    try:
        if "LOCAL_RANK" in os.environ:
            _join_torchrun(num_gpus_per_machine, timeout)
            return run(main_func, args)
        check_processes(num_gpus_per_machine, num_machines, machine_rank, dist_url)
        if num_gpus_per_machine * num_machines == 1:
            return run(main_func, args)
        processes = (num_gpus_per_machine, num_machines, machine_rank, dist_url)
        return _start(main_func, *processes, args, timeout)
    except InputError as error:
        return _report(INPUT_ERROR, str(error))


def run(main_func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Call ``main_func(*args)`` in this process, and return the exit code as :func:`launch` does.

    Raises:
        Exception: one that :func:`~retinanet_ext.errors.explain` does not know
    """
    train_loop = logging.getLogger("detectron2.engine.train_loop")
    train_loop.addFilter(_is_unexpected)
    try:
        main_func(*args)
        _leave_processes()
        return 0
    except KeyboardInterrupt:
        return _report(130, "interrupted")
    except Exception as error:
        end = explain(error)
        if end is None:
            raise
        code, line = end
        if isinstance(error, StoppedError | NonFiniteError):  # which all processes raise
            if comm.get_local_rank() == 0:
                _report(code, line)
            comm.synchronize()  # the launcher ends the others once one has ended
            _leave_processes()
            return code
        if comm.get_world_size() > 1:
            # The process that failed first, or rank 0 where all fail alike, reports it meanwhile;
            # then the launcher ends the others.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
            time.sleep(GRACE * ((comm.get_local_rank() > 0) + (code == FAILED)))
        return _report(code, line)
    finally:
        train_loop.removeFilter(_is_unexpected)


def _report(code: int, line: str) -> int:
    """Write the line to log.txt, if it is open, and to stderr."""
    record = logging.makeLogRecord({"name": "retinanet_ext", "levelname": "ERROR", "msg": line})
    for handler in logging.getLogger("retinanet_ext").handlers:
        if getattr(handler, "stream", sys.stdout) is not sys.stdout:
            handler.emit(record)
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    return code


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Filter out the traceback of an error that ends in one line."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or explain(error) is None


def _tolerate_closed_streams() -> None:
    """Log without tracebacks to a full disk or a closed pipe, and any file name to stdout."""
    logging.raiseExceptions = False
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure:
        reconfigure(errors="backslashreplace")


def check_processes(
    num_local: int, num_machines: int = 1, machine_rank: int = 0, dist_url: str = "auto"
) -> None:
    """Refuse flags of processes that cannot be started; the arguments are those of :func:`launch`.

    Raises:
        InputError: names the flag and what is allowed
    """
    for flag, value in (("--num-gpus", num_local), ("--num-machines", num_machines)):
        if value < 1:
            raise InputError(f"{flag} must be at least 1, got {value}")
    if not 0 <= machine_rank < num_machines:
        raise InputError(
            f"--machine-rank must be from 0 to {num_machines - 1}, one less than --num-machines; "
            f"got {machine_rank}"
        )
    if num_machines > 1 and not re.fullmatch(r"tcp://.+:\d+", dist_url):
        raise InputError(
            "--num-machines above 1 needs --dist-url tcp://HOST:PORT, an address of machine 0 that "
            "all machines reach"
        )
    if torch.cuda.is_available() and num_local > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus {num_local}: this machine has {torch.cuda.device_count()} CUDA devices"
        )


def _join_torchrun(num_gpus: int, timeout: timedelta) -> None:
    """Join the processes that torchrun has started, as its environment variables say."""
    try:
        local_rank, num_local = (int(os.environ[n]) for n in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"LOCAL_RANK is set, as by torchrun, and LOCAL_WORLD_SIZE is no number: {error}"
        ) from error
    if num_gpus not in (1, num_local):
        raise InputError(
            f"--num-gpus {num_gpus}: torchrun has started {num_local} processes per machine; leave "
            "--num-gpus out"
        )
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(local_rank)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # The store outlives a restart. Without a prefix the processes would find the addresses of
        # those that they replace.
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group(
            "nccl" if has_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        comm.create_local_process_group(num_local)
        comm.synchronize()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"the processes of torchrun did not meet: {first_line(error)}") from error


def torchrun_store() -> dist.Store | None:
    """Return the store of torchrun's agent, which outlives the processes that it restarts."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def _start(
    main_func: Callable[..., Any],
    num_local: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
    timeout: timedelta,
) -> int:
    """Start this machine's processes, wait for them, and return the exit code."""
    # It would warn of each process that it ends after the first one has failed.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    met = multiprocessing.get_context("spawn").Event()
    try:
        with _forwarded_signals() as received, _time_limit(met):
            launch_processes(
                *(_worker, num_local, num_machines, machine_rank, dist_url),
                args=(main_func, args, num_local, met),
                timeout=timeout,
            )
    except KeyboardInterrupt:  # the second one; the first asked the processes to stop
        _kill_processes()
        return _report(130, "interrupted")
    except (ProcessExitedException, ProcessRaisedException) as error:
        exit_code = getattr(error, "exit_code", FAILED)
        if exit_code > 0 and met.is_set():
            return exit_code  # the process has reported why
        if received:
            return _report(STOPPED, "stopped before the first iteration")
        if met.is_set():
            memory = ", as by a system out of memory" * (error.signal_name == "SIGKILL")
            return _report(
                FAILED,
                f"process {error.error_index} was ended by {error.signal_name}{memory}; --resume "
                "continues from the last checkpoint",
            )
        causes = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception): (.+)", str(error), re.MULTILINE)
        cause = first_line(causes[-1])[:300] if causes else f"{RENDEZVOUS_TIMEOUT} seconds passed"
        return _report(
            INPUT_ERROR,
            f"the {num_local * num_machines} processes did not meet at {dist_url}: {cause}; check "
            f"that the command runs on all {num_machines} machines with this address, that it is "
            "machine 0's, and that the port is free there and open to the others",
        )
    return 0


@contextmanager
def _time_limit(met: Event) -> Iterator[None]:
    """Kill the started processes if they have not met in time."""
    timer = threading.Timer(RENDEZVOUS_TIMEOUT, lambda: met.is_set() or _kill_processes())
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill_processes() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _worker(
    main_func: Callable[..., Any], args: tuple[Any, ...], num_local: int, met: Event
) -> None:
    """Do one process's part and exit with its code."""
    met.set()
    end_with_parent()
    _tolerate_closed_streams()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local))
    try:
        code = run(main_func, args)
    except Exception:
        traceback.print_exc()
        code = FAILED
    sys.exit(code)


def _leave_processes() -> None:
    """End this process's connections, and the threads that serve them, before Python ends.

    Detectron2 keeps the groups, which would keep the threads. One that then frees what it had last
    sent needs the interpreter, and without it aborts the process.
    """
    if not dist.is_initialized():
        return
    comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()


@contextmanager
def _forwarded_signals() -> Iterator[list[int]]:
    """Forward SIGTERM and one Ctrl-C to the started processes, which save a checkpoint first.

    Yields:
        the signals that were received
    """
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for child in multiprocessing.active_children():
            child.terminate()

    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Have Linux kill this process when its parent is killed, so that no orphan keeps a device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
