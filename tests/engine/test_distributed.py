"""Which processes a run has, as torchrun's and Slurm's variables and the flags say."""

import os
import sys
from pathlib import Path

import pytest

from retinanet_ext.engine.distributed import find_group, first_node, is_restarted, job_ids
from retinanet_ext.engine.launch import argument_parser
from retinanet_ext.errors import InputError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "1",
}


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def group_of(env, *flags):
    return find_group(argument_parser().parse_args(flags), env)


def test_one_process_without_flags():
    group = group_of({})
    assert (group.size, group.local_rank, group.is_main) == (1, None, True)


@pytest.mark.parametrize("env", [TORCHRUN, SRUN])
def test_the_place_in_a_group_that_was_started(env):
    group = group_of(env)
    assert (group.num_machines, group.num_local, group.size) == (2, 4, 8)
    assert (group.machine_rank, group.local_rank, group.is_main) == (1, 1, False)


def test_where_the_processes_meet():
    assert group_of(TORCHRUN).url == "torchrun://"
    assert group_of(SRUN).url == f"tcp://gpu03:{10000 + 123457 % 20000}"
    assert group_of({**SRUN, "MASTER_PORT": "29500"}).url == "tcp://gpu03:29500"
    assert group_of(SRUN, "--dist-url", "tcp://other:1").url == "tcp://other:1"


def test_torchrun_inside_of_slurm():
    assert group_of(SRUN | TORCHRUN).starter == "torchrun"


def test_a_batch_script_starts_its_processes_itself():
    """Slurm sets the job's tasks in the script too, where no step has been started."""
    env = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    group = group_of(env, "--num-gpus", "8")
    assert (group.starter, group.size, group.local_rank) == ("launch", 8, None)


@pytest.mark.parametrize(
    ("env", "flags", "expected"),
    [
        ({}, ["--num-gpus", "0"], "--num-gpus must be at least 1"),
        ({}, ["--num-machines", "2"], "--dist-url tcp://HOST:PORT"),
        ({}, ["--num-machines", "2", "--dist-url", "tcp://host"], "--dist-url tcp://HOST:PORT"),
        (
            {},
            ["--num-machines", "2", "--machine-rank", "2"],
            "--machine-rank 2 must be from 0 to 1",
        ),
        (TORCHRUN, ["--num-gpus", "8"], "--num-gpus 8: torchrun has started the processes, with 4"),
        (TORCHRUN, ["--num-machines", "1"], "--num-machines 1: torchrun"),
        (TORCHRUN, ["--dist-url", "tcp://host:1"], "leave --dist-url out"),
        (TORCHRUN | {"WORLD_SIZE": ""}, [], "WORLD_SIZE"),
        (TORCHRUN | {"RANK": "-1"}, [], "RANK"),
        (TORCHRUN | {"RANK": "8"}, [], "process 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, [], "ranks must go machine by machine"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, [], "as many on each"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, [], "as many on each"),
        (TORCHRUN | {"MASTER_ADDR": ""}, [], "MASTER_ADDR is not"),
        (SRUN, ["--num-gpus", "8"], "--num-gpus 8: srun has started the processes, with 4"),
        (SRUN, ["--machine-rank", "0"], "--machine-rank 0: srun"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "3"}, [], "--ntasks-per-node"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "0"}, [], "SLURM_STEP_NUM_NODES"),
        (SRUN | {"SLURM_LOCALID": "2"}, [], "--distribution=block"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, [], "names no host"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "two"}, [], "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_contradictions_are_one_line(env, flags, expected):
    with pytest.raises(InputError) as error:
        group_of(env, *flags)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("env", [{}, SRUN])
def test_more_processes_than_devices(env, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match=r"4 processes on this machine, which shows 1 CUDA"):
        group_of(env, "--num-gpus", "4")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-05,07],login1", "gpu03"),
        ("gpu[7,9-12]", "gpu7"),
        ("rack1-gpu[001-128].cluster", "rack1-gpu001.cluster"),
        ("r[1-2]n[05-06]", "r1n05"),
        ("login1,gpu[03-05]", "login1"),
    ],
)
def test_first_node_of_slurms_list(nodes, first):
    assert first_node(nodes) == first


def test_started_again():
    assert not is_restarted({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": ""})
    assert is_restarted({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert is_restarted({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "2"})


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_job_is_named_by_what_started_it():
    env = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "7"}
    torchrun, slurm = job_ids(env)
    assert slurm == "slurm 7"
    # Another torchrun has another process, or the same number at another time.
    assert str(os.getppid()) in torchrun.split()
    assert torchrun.split()[-1] in Path(f"/proc/{os.getppid()}/stat").read_text().split()
    assert job_ids({}) == []
