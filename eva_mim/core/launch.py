"""What the launcher says of this process: rank, number of processes, address of rank 0. It imports no torch.

torchrun and deepspeed's launcher, Open MPI's mpirun, srun, and Hydra's mpiexec (MPICH, Intel MPI) each set variables of their
own. mpirun under Slurm leaves traces of both: the launcher that started the processes themselves is looked for first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from eva_mim.core.errors import UserError

LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""Variables of rank, number of processes, and rank on the host. One of torchrun's is enough, of the others all must be there:
srun can set PMI_RANK. (SLURM_NTASKS is also set in a plain sbatch script, where one process runs; SLURM_STEP_NUM_TASKS by srun
alone.)"""
HERE = {"mpirun": "OMPI_COMM_WORLD_LOCAL_SIZE", "mpiexec": "MPI_LOCALNRANKS"}
"""Variables of the number of processes on this host."""
FIRST_PORT, PORTS = 20000, 20000
"""Ports from which one is chosen by the numbers of Slurm's job and step."""
TORCH_PORT = 29500
"""torchrun's default."""


@dataclass(frozen=True)
class Launch:
    """A process among those that were started together."""

    launcher: str
    """Key of `LAUNCHERS`, or "" for a process that was started alone."""
    rank: int = 0
    world: int = 1
    local_rank: int = 0


def launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Returns the place of this process, from `os.environ` by default. Raises UserError for variables that are no numbers."""
    found = os.environ if environment is None else environment
    for launcher, names in LAUNCHERS.items():
        if (any if launcher == "torchrun" else all)(name in found for name in names):
            values = {name: found.get(name, "1" if name == "WORLD_SIZE" else "0") for name in names}
            if not all(value.isdecimal() for value in values.values()):
                raise UserError(f"{launcher}: " + ", ".join(f"{name}={value}" for name, value in values.items()) + ": no numbers")
            return Launch(launcher, *map(int, values.values()))
    return Launch("")


def address(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Returns host and port of rank 0: MASTER_ADDR and MASTER_PORT where they are set; under srun the first host of the step,
    where rank 0 is with block, cyclic and plane distribution, and a port by the numbers of job and step.

    Raises UserError where the launcher does not tell it.
    """
    found = os.environ if environment is None else environment
    port, launcher = found.get("MASTER_PORT"), launch(found).launcher
    host, chosen = "", TORCH_PORT
    if launcher == "srun":
        host = "127.0.0.1" if found.get("SLURM_STEP_NUM_NODES") == "1" else first_host(found.get("SLURM_STEP_NODELIST", ""))
        job, step = (int(re.sub(r"\D", "", found.get(name, "")) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        chosen = FIRST_PORT + (job + 1009 * step) % PORTS
    elif launcher in HERE and found.get(HERE[launcher]) == found[LAUNCHERS[launcher][1]]:
        host = "127.0.0.1"
    host = found.get("MASTER_ADDR") or host
    if not host:
        raise UserError(f"{launcher}: nothing says where rank 0 is; set MASTER_ADDR to its host and MASTER_PORT to a free port "
                        "there (mpirun: -x MASTER_ADDR=HOST -x MASTER_PORT=29500)")
    if port is not None and not port.isdecimal():
        raise UserError(f"MASTER_PORT={port}: no number")
    return host, int(port or chosen)


def first_host(hosts: str) -> str:
    """Returns the first name of a list of hosts as Slurm writes it: `gpu[07-09,12],login` -> `gpu07`, "" for an empty list.
    (`scontrol show hostnames` writes them all, but containers rarely have it.)"""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""
