"""Rank, address and device from what launchers set, and processes that are told apart and told why they cannot run."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_mim.core.devices import device_mistake, pick_device, set_arithmetic
from eva_mim.core.distributed import detect_lost_processes
from eva_mim.core.errors import LostProcess, UserError
from eva_mim.core.launch import Launch, address, first_host, launch
from tests.ranks import Launched, script

SBATCH = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = SBATCH | {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "9",
                 "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[007-008]"}
CYCLIC = SRUN | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "node7", "MASTER_PORT": "4711"}
PORT = 20000 + (123456 + 1009 * 2) % 20000


@pytest.mark.parametrize(
    ("environment", "expected", "where"),
    [
        (TORCHRUN, Launch("torchrun", 11, 16, 3), ("node7", 4711)),
        (TORCHRUN | SRUN, Launch("torchrun", 11, 16, 3), ("node7", 4711)),  # srun starts a torchrun a host
        (SRUN, Launch("srun", 9, 16, 1), ("gpu007", PORT)),
        (CYCLIC, Launch("srun", 3, 16, 1), ("gpu007", PORT)),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1"}, Launch("srun", 9, 16, 1), ("127.0.0.1", PORT)),
        (SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "5"}, Launch("srun", 9, 16, 1), ("a", 5)),
        (SRUN | {"PMI_RANK": "9", "PMI_SIZE": "16"}, Launch("srun", 9, 16, 1), ("gpu007", PORT)),  # srun --mpi=pmi2
        (MPIRUN, Launch("mpirun", 5, 8, 5), ("127.0.0.1", 29500)),
        (MPIRUN | SRUN, Launch("mpirun", 5, 8, 5), ("127.0.0.1", 29500)),  # mpirun starts its daemons by srun
        (HYDRA, Launch("mpiexec", 1, 2, 1), ("127.0.0.1", 29500)),
        (SBATCH, Launch(""), None),  # one process in a batch script
        ({}, Launch(""), None),
        ({"WORLD_SIZE": "4"}, Launch("torchrun", 0, 4, 0), None),
    ],
)
def test_what_launchers_say(environment: dict[str, str], expected: Launch, where: tuple[str, int] | None) -> None:
    assert launch(environment) == expected
    if where:
        assert address(environment) == where


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "mpirun: nothing says where rank 0 is; set MASTER_ADDR to its host"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "torchrun: nothing says where rank 0 is"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "torchrun: RANK=one, WORLD_SIZE=2, LOCAL_RANK=0: no numbers"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT=http: no number"),
    ],
)
def test_what_launchers_do_not_say(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        address(environment)


@pytest.mark.parametrize(("hosts", "first"), [
    ("gpu[07-09,12],login", "gpu07"), ("a,b", "a"), ("rack[1-2]node[3,5-7]x,z", "rack1node3x"), ("n-1", "n-1"), ("", ""),
])
def test_the_first_of_slurms_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    ("visible", "local", "expected"),
    [(8, 3, "cuda:3"), (1, 3, "cuda:0"), (1, 0, "cuda:0"), (4, 5, "which shows 4 GPUs"), (0, 0, "cpu")],
)
def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch, visible: int, local: int, expected: str) -> None:
    """Slurm can show each task all GPUs of the host, or its own alone, which is number 0 to each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in (SRUN | {"SLURM_LOCALID": str(local)}).items():
        monkeypatch.setenv(name, value)
    if "shows" in expected:
        with pytest.raises(UserError, match=expected):
            pick_device("auto")
    else:
        assert str(pick_device("auto")) == expected


def card(host: str, gpu: str) -> dict[str, Any]:
    return {"host": host, "error": "", "type": "cuda" if gpu else "cpu", "gpu": gpu}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([card("a", "x"), card("a", "y"), card("b", "x")], ""),
        ([card("a", "")] * 3, ""),
        ([card("a", "x"), card("b", ""), card("a", "y")], "rank 1 on b has no GPU that torch sees, and 2 other processes have"),
        ([card("a", "x"), card("a", "y"), card("a", "x")], "rank 0 on a, 2 on a share one GPU; start as many"),
        ([card("a", "x"), card("b", "") | {"error": "run.device=cuda: broken"}], "rank 1 on b: run.device=cuda: broken"),
    ],
)
def test_devices_that_do_not_fit_together(told: list[dict[str, Any]], said: str) -> None:
    assert (said in device_mistake(told)) if said else device_mistake(told) == ""


TOGETHER = """
import os, sys, torch
from eva_mim.core import distributed
from eva_mim.core.errors import UserError
if os.environ["SLURM_PROCID"] == sys.argv[1]:
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.get_device_properties = lambda device: type("Card", (), {"uuid": "GPU-7"})
try:
    print(distributed.setup(sys.argv[2]), distributed.rank(), float(distributed.all_reduce_sum(torch.ones(1))))
    distributed.leave_group()
except UserError as error:
    print(f"refused: {error}")
    sys.stdout.flush()
    os._exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "device", "said"),
    [
        ("-", "cpu", "cpu {rank} 2.0"),
        ("0", "auto", "refused: run.device: rank 1 on {host} has no GPU that torch sees, and 1 other processes have one; look at "
                      "nvidia-smi there, or set run.device=cpu"),
    ],
)
def test_two_tasks_of_srun_find_each_other(tmp_path: Path, broken: str, device: str, said: str) -> None:
    """With nothing but Slurm's variables; one whose GPU is not there is told on both, within seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tasks = []
    for rank in range(2):
        own = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": str(rank),
                      "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": str((port - 20000 - 1009 * 2) % 20000)}
        if not 20000 <= port < 40000:
            own["MASTER_PORT"] = str(port)  # not one that a job's number leads to
        tasks.append(Launched(script, TOGETHER, broken, device, log=tmp_path / str(rank), **own))
    codes = [task.wait(60) for task in tasks]
    found = [(tmp_path / str(rank)).read_text().splitlines()[-1] for rank in range(2)]
    assert found == [said.format(rank=rank, host=socket.gethostname()) for rank in range(2)]
    assert codes == [2 if "refused" in said else 0] * 2


def test_fp32_is_of_one_kind() -> None:
    """torch alone would compute convolutions in TF32 and matrix products exactly."""
    for tf32 in (True, False):
        set_arithmetic(tf32=tf32, deterministic=tf32)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        assert torch.are_deterministic_algorithms_enabled() == tf32


NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3690, {}, NCCL version 2.28\nncclSystemError: Last error:\n{}"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (NCCL.format("invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on device 1"), UserError, "share one GPU"),
        (NCCL.format("unhandled cuda error", "Cuda failure 2 'out of memory'"), UserError, "a smaller run.micro_batch"),
        (NCCL.format("internal error", "Bootstrap : no socket interface found"), UserError, "NCCL_SOCKET_IFNAME"),
        (NCCL.format("remote process exited or there was a network error", "poll"), LostProcess, "another process has gone"),
        (NCCL.format("unhandled system error", "Connection closed by remote peer"), LostProcess, "another process has gone"),
        ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", LostProcess, "another process has gone"),
        (NCCL.format("invalid argument", "AllReduce : unknown type"), torch.distributed.DistBackendError, "unknown type"),
    ],
)
def test_what_nccl_says_is_a_mistake_or_a_lost_process(text: str, kind: type[Exception], said: str) -> None:
    """A mistake comes again: nobody shall start the run twenty times for it."""
    with pytest.raises(kind, match=said), detect_lost_processes(lambda: " in step 3"):
        raise torch.distributed.DistBackendError(text)
