"""The processes of a run: started here by Detectron2's ``launch``, or by torchrun or Slurm's srun.

A failure anywhere ends in one line that names the first cause, and a rendezvous in a stated time.
"""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT, _distributed_worker
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from retinanet_ext.errors import INPUT_ERROR, InputError, StoppedError, explain, first_line

logger = logging.getLogger(__name__)

SLACK = 60
"""Seconds after the rendezvous's timeout at which processes that torch still keeps are ended: it
gives a port that another service answers, or NCCL, all the time they want."""

URL = "torchrun://"

LOST_PEER = "the connection to another process is lost, whose own message says why"
STOPPED = "stopped while nothing was being trained"

Main = Callable[..., None]


class GroupError(RuntimeError):
    """How a group of processes ended, as its first failing process tells it.

    Attributes:
        code: the exit code.
        args: the one line; empty where another process prints it.
    """

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line)
        self.code = code


@dataclass(frozen=True)
class Group:
    """The processes of a run, and this one's place among them.

    Attributes:
        starter: ``launch``, ``torchrun`` or ``srun``.
        num_machines: each has as many processes.
        num_local: processes on a machine.
        machine_rank: of this machine.
        url: where the processes meet.
        local_rank: of this process on its machine; None if it is yet to start the others.
    """

    starter: str
    num_machines: int
    num_local: int
    machine_rank: int
    url: str
    local_rank: int | None = None

    @property
    def size(self) -> int:
        return self.num_machines * self.num_local

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, or has started it."""
        return not self.machine_rank and not self.local_rank


def find_group(args: argparse.Namespace, env: Mapping[str, str] = os.environ) -> Group:
    """Return the processes that torchrun or srun has started, else those that the flags ask for.

    Args:
        args: ``num_gpus``, ``num_machines`` and ``machine_rank``, each None if it was not given,
            and ``dist_url``, "auto" if it was not
        env: the environment

    Raises:
        InputError: variables are missing or contradict each other or the flags
    """
    if "LOCAL_RANK" in env:
        group = _torchrun(env)
        given: dict[str, tuple[Any, Any]] = {"--dist-url": (args.dist_url, "auto")}
    elif "SLURM_STEP_NUM_TASKS" in env and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        group = _srun(env, args.dist_url)
        given = {}
    else:
        return _launch(args)
    given |= {
        "--num-gpus": (args.num_gpus, group.num_local),
        "--num-machines": (args.num_machines, group.num_machines),
        "--machine-rank": (args.machine_rank, group.machine_rank),
    }
    for flag, (value, found) in given.items():
        if value not in (None, found):
            raise InputError(
                f"{flag} {value}: {group.starter} has started the processes, with {found}; "
                f"leave {flag} out"
            )
    _check_devices(group, "leave out --gpus-per-task and --gpu-bind, which hide the others")
    return group


def _launch(args: argparse.Namespace) -> Group:
    num_local = 1 if args.num_gpus is None else args.num_gpus
    num_machines = 1 if args.num_machines is None else args.num_machines
    machine_rank = args.machine_rank or 0
    for flag, value in (("--num-gpus", num_local), ("--num-machines", num_machines)):
        if value < 1:
            raise InputError(f"{flag} must be at least 1")
    if not 0 <= machine_rank < num_machines:
        raise InputError(
            f"--machine-rank {machine_rank} must be from 0 to {num_machines - 1}, "
            "one less than --num-machines"
        )
    if num_machines > 1 and not re.fullmatch(r"tcp://.+:\d+", args.dist_url):
        raise InputError(
            "--num-machines above 1 needs --dist-url tcp://HOST:PORT, "
            "an address of machine 0 that all machines reach"
        )
    group = Group("launch", num_machines, num_local, machine_rank, args.dist_url)
    _check_devices(group, f"--num-gpus {num_local} is too many")
    return group


def _torchrun(env: Mapping[str, str]) -> Group:
    rank, size, local_rank, num_local = (
        _number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise InputError(f"LOCAL_RANK is set, as by torchrun, but {name} is not")
    _check_ranks("torchrun", rank, size, local_rank, num_local)
    return Group("torchrun", size // num_local, num_local, rank // num_local, URL, local_rank)


def _meet_in_this_start(url: str, **kwargs: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """Meet as by ``env://``, apart from what an earlier start has left in torchrun's store.

    There the processes would find the addresses of those that they replace.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, size in dist.rendezvous("env://", **kwargs):
        yield dist.PrefixStore(f"start_{start}", store), rank, size


dist.register_rendezvous_handler(URL.partition(":")[0], _meet_in_this_start)


def _srun(env: Mapping[str, str], dist_url: str) -> Group:
    rank, size, local_rank, num_machines = (
        _number(env, f"SLURM_{name}")
        for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID", "STEP_NUM_NODES")
    )
    if num_machines < 1 or size % num_machines:
        raise InputError(
            f"srun has {size} tasks (SLURM_STEP_NUM_TASKS) on {num_machines} nodes "
            "(SLURM_STEP_NUM_NODES); each node needs as many: set --ntasks-per-node"
        )
    num_local = size // num_machines
    _check_ranks("srun", rank, size, local_rank, num_local)
    if dist_url == "auto":
        job = _number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID")
        host = env.get("MASTER_ADDR") or first_node(env.get("SLURM_STEP_NODELIST", ""))
        # Below the ports that systems hand out by themselves.
        dist_url = f"tcp://{host}:{env.get('MASTER_PORT') or 10000 + job % 20000}"
    return Group("srun", num_machines, num_local, rank // num_local, dist_url, local_rank)


def _check_ranks(starter: str, rank: int, size: int, local_rank: int, num_local: int) -> None:
    if num_local < 1 or size % num_local or rank >= size or rank % num_local != local_rank:
        raise InputError(
            f"{starter}'s variables say that this is process {rank} of {size}, and process "
            f"{local_rank} of {num_local} on its machine; ranks must go machine by machine, with "
            "as many on each" + ("; set --distribution=block" if starter == "srun" else "")
        )


def _number(env: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,18}", env.get(name, "")):
        raise InputError(
            f"the environment variable {name}, which tells this process its place among the "
            f"others, must be a whole number, and is {env.get(name, 'not set')}"
        )
    return int(env[name])


def first_node(nodes: str) -> str:
    """Return the first host of Slurm's list, such as gpu03 of "gpu[03-05,07],login1"."""
    first, *_ = re.split(r",(?![^\[]*\])", nodes)  # at commas outside of brackets
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)
    if not host:
        raise InputError(
            f"SLURM_STEP_NODELIST {nodes!r} names no host; give --dist-url tcp://HOST:PORT"
        )
    return host


def _check_devices(group: Group, remedy: str) -> None:
    if torch.cuda.is_available() and group.num_local > torch.cuda.device_count():
        raise InputError(
            f"{group.num_local} processes on this machine, which shows "
            f"{torch.cuda.device_count()} CUDA devices; {remedy}"
        )


def is_restarted(env: Mapping[str, str] = os.environ) -> bool:
    """Tell whether torchrun has restarted its processes, or Slurm has requeued the job."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(env.get(name, "0") not in ("", "0") for name in names)


def job_ids(env: Mapping[str, str] = os.environ) -> list[str]:
    """Return what names this job, the same in all its restarts and in no other job.

    For torchrun that is its process and when it was started: its run id is "none" by default.
    """
    ids = []
    if "TORCHELASTIC_RESTART_COUNT" in env:
        parent = os.getppid()
        started = ""
        if sys.platform == "linux":
            started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
        ids.append(f"torchrun {env.get('TORCHELASTIC_RUN_ID', '')} {parent} {started}")
    if "SLURM_JOB_ID" in env:
        ids.append(f"slurm {env['SLURM_JOB_ID']}")
    return ids


def run(group: Group, main: Main, args: tuple[Any, ...], *, timeout: float) -> None:
    """Call ``main(*args)`` on every process of a group, which meets first.

    Args:
        group: of one process, this one; or which ``launch`` is to start; or which this one joins
        main: can be pickled; so can ``args``
        args: of ``main``
        timeout: seconds that the processes may take to meet

    Raises:
        InputError: the processes did not meet
        GroupError: a process that ``launch`` has started failed
        Exception: what ``main`` raised in this process
    """
    if group.size == 1:
        main(*args)
        return
    # For NCCL, which waits for the others without end.
    os.environ.setdefault("TORCH_DIST_INIT_BARRIER", "1")
    if group.local_rank is None:
        _start(group, main, args, timeout)
    else:
        _join(group, main, args, timeout)


def _start(group: Group, main: Main, args: tuple[Any, ...], timeout: float) -> None:
    """Start this machine's processes and wait for them."""
    context = multiprocessing.get_context("spawn")
    met, ends = context.Event(), context.SimpleQueue()
    started = time.monotonic()
    late = False

    def give_up() -> None:
        nonlocal late
        late = not met.is_set()
        for child in multiprocessing.active_children() if late else ():
            child.kill()

    try:
        with _passing_signals_on() as signals, _after(timeout + SLACK, give_up):
            launch(
                _child,
                group.num_local,
                group.num_machines,
                group.machine_rank,
                group.url,
                (main, args, met, ends),
                timedelta(seconds=timeout),
            )
    except KeyboardInterrupt:  # the second; the first has asked them to stop
        for child in multiprocessing.active_children():
            child.kill()
        raise
    except (ProcessRaisedException, ProcessExitedException) as error:
        if ends.empty():
            if signals:
                raise StoppedError(STOPPED) from None
            if late or (not met.is_set() and isinstance(error, ProcessRaisedException)):
                message = "no answer" if late else str(error)
                raise InputError(_no_rendezvous(group, message, started, timeout)) from None
            if isinstance(error, ProcessExitedException):
                raise GroupError(_killed(error), 1) from None
            if lost_peer(error):
                raise GroupError(LOST_PEER, 1) from None
            raise
    if not ends.empty():
        # The first cause, not what it then did to the other processes.
        raise GroupError(*ends.get())


def _child(main: Main, args: tuple[Any, ...], met: Event, ends: SimpleQueue) -> None:
    """Do one process's part."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent asks for a stop
    met.set()
    try:
        _allow_long_waits()
        main(*args)
    except Exception as error:
        if end := explain(error):
            code, line = end
            ends.put((line[:2000], code))  # nobody reads yet, and the pipe must hold them all
        # All processes stop; the first to end must not have the others ended.
        if not isinstance(error, StoppedError):
            raise
    dist.destroy_process_group()


def _join(group: Group, main: Main, args: tuple[Any, ...], timeout: float) -> None:
    """Meet the processes that torchrun or srun has started beside this one."""
    if group.starter == "torchrun":
        end_with_parent()
    started = time.monotonic()
    met = False

    def member() -> None:
        nonlocal met
        met = True
        _allow_long_waits()
        main(*args)

    def give_up() -> None:
        if not met:
            line = _no_rendezvous(group, "no answer", started, timeout)
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
            os._exit(INPUT_ERROR)  # the main thread waits inside of torch

    try:
        with _after(timeout + SLACK, give_up):
            _distributed_worker(
                group.local_rank,
                member,
                group.size,
                group.num_local,
                group.machine_rank,
                group.url,
                (),
                timedelta(seconds=timeout),
            )
    except StoppedError:
        dist.destroy_process_group()
        raise
    except Exception as error:
        if not met:
            message = f"{type(error).__name__}: {error}"
            raise InputError(_no_rendezvous(group, message, started, timeout)) from error
        if lost_peer(error) and not explain(error):
            raise GroupError(LOST_PEER, 1) from None
        raise
    dist.destroy_process_group()


def lost_peer(error: BaseException) -> bool:
    """Tell whether an error is only what another process's end did to this one.

    The first three are what gloo says, the others NCCL.
    """
    signs = r"closed by peer|Connection reset|Broken pipe|ncclRemoteError|NCCL \w+ was aborted"
    # An error of the system is this process's own, such as a pipe that nobody reads.
    return not isinstance(error, OSError) and bool(re.search(signs, str(error)))


def _killed(error: ProcessExitedException) -> str:
    how = error.signal_name or f"exit code {error.exit_code}"
    memory = ", as a system out of memory does" if error.signal_name == "SIGKILL" else ""
    return (
        f"process {error.error_index} was ended by {how}{memory}; the others are stopped, "
        "--resume goes on from the last checkpoint"
    )


def _allow_long_waits() -> None:
    """Undo the rendezvous's timeout, which Detectron2 gives to all that follows as well."""
    dist.distributed_c10d._set_pg_timeout(DEFAULT_TIMEOUT)
    dist.distributed_c10d._get_default_store().set_timeout(DEFAULT_TIMEOUT)


def _no_rendezvous(group: Group, message: str, started: float, timeout: float) -> str:
    """Return the one line for processes that did not meet, from torch's message."""
    where = group.url
    if where == URL:
        where = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    causes = re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception): (.+)", message, re.MULTILINE)
    cause = first_line((causes or [message])[-1]).rstrip(".")[:300]
    everywhere = f"on all {group.num_machines} machines" if group.num_machines > 1 else "for each"
    return (
        f"the {group.size} processes did not meet at {where}, after "
        f"{time.monotonic() - started:.0f} seconds (--rendezvous-timeout {timeout:g}): {cause}; "
        f"check that the command runs {everywhere} with this address, that it is the first "
        "process's, and that its port is free there and open to the others"
    )


@contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` in another thread if this takes longer."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _passing_signals_on() -> Iterator[list[int]]:
    """Ask the started processes to stop when this one is, and go on waiting for them.

    SIGINT, from a terminal, asks as SIGTERM does; a second one ends this process, and so them.
    """
    received: list[int] = []

    def ask(number: int, frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        children = multiprocessing.active_children()
        if not children:
            raise StoppedError(STOPPED)
        for child in children:
            child.terminate()

    if not _gets_signals():
        yield received
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_at_interrupt() -> Iterator[None]:
    """Take SIGINT, from a terminal, for SIGTERM; a second one interrupts as usual."""

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # after the last iteration
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _gets_signals():
        yield  # one that was started in the background, or by launch, ignores it
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _gets_signals() -> bool:
    return threading.current_thread() is threading.main_thread()


def agree(find: Callable[[], Any]) -> Any:
    """Call ``find`` on one process a machine, and return what it gave to all processes of it.

    Raises:
        Exception: what ``find`` raised, in the process it did
        GroupError: in the others, without a line
    """
    result, end = None, None
    raised: Exception | None = None
    if comm.get_local_rank() == 0:
        try:
            result = find()
        except Exception as error:
            raised, end = error, explain(error)
            if end is None:
                raise
    results = comm.all_gather((result, end))
    failed = next((rank for rank, (_, end) in enumerate(results) if end), None)
    if failed is None:
        return results[comm.get_rank() - comm.get_local_rank()][0]
    if raised is not None and failed == comm.get_rank():
        raise raised
    raise GroupError("", results[failed][1][0])


def end_with_parent() -> None:
    """Have Linux end this process when its parent is killed, so that no orphan goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
