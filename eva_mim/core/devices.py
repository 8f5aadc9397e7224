"""Which device a process computes on, and whether those of all processes fit together. torch is imported by what needs it."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from eva_mim.core.errors import UserError
from eva_mim.core.launch import launch
from eva_mim.core.settings import few

if TYPE_CHECKING:
    import torch

PATIENCE = 30.0
"""Seconds that rank 0 waits until all ranks have heard of a mistake."""


def pick_device(name: str) -> torch.device:
    """Returns the device for "auto", "cpu" or "cuda": of several visible GPUs the one of this rank on its host, and the only one
    where the launcher shows each process its own. Raises UserError if this rank has no GPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "sees no GPU (look at nvidia-smi, CUDA_VISIBLE_DEVICES)"
        raise UserError(f"run.device=cuda: torch {torch.__version__} {why}; set run.device=cpu, or auto")
    if name != "cuda":
        return torch.device(name)
    visible, own = torch.cuda.device_count(), launch()
    if visible > 1 and own.local_rank >= visible:
        raise UserError(f"run.device: rank {own.rank} is process {own.local_rank} of its host, which shows {visible} GPUs; start "
                        "as many processes a host as it has GPUs")
    return torch.device("cuda", own.local_rank if visible > 1 else 0)


def set_arithmetic(*, tf32: bool = False, deterministic: bool = False) -> None:
    """Sets how GPUs compute what is in fp32: matrix products and convolutions alike exactly, or in TF32 (torch alone takes TF32
    for convolutions); and whether by deterministic algorithms where torch has them: it warns where not."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def agreed_device(name: str, store: Any) -> torch.device:
    """Returns this rank's device, after rank 0 has looked at those of all; `store` is torch's, of all processes. Raises UserError
    on every rank if one rank has no device, or another kind than the others, or if two share a GPU."""
    import torch

    own = launch()
    said: dict[str, Any] = {"host": socket.gethostname(), "error": "", "type": "", "gpu": ""}
    try:
        device = pick_device(name)
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        said |= {"type": device.type, "gpu": gpu}
    except UserError as error:
        said["error"] = str(error)
    store.set(str(own.rank), json.dumps(said))
    if own.rank == 0:
        told = [json.loads(store.get(str(number))) for number in range(own.world)]
        store.set("verdict", device_mistake(told))
    if mistake := store.get("verdict").decode():
        heard, end = store.add("heard", 1), time.monotonic() + PATIENCE
        while own.rank == 0 and heard < own.world and time.monotonic() < end:  # it may keep the store, which ends with it
            time.sleep(0.05)
            heard = store.add("heard", 0)
        raise UserError(mistake)
    return device


def device_mistake(told: list[dict[str, Any]]) -> str:
    """Returns what is wrong with the devices of a run, "" if nothing is. `told` has for each rank the host, the type of the
    device, the GPU's unique name, and the error that kept it from having one."""
    def names(numbers: list[int]) -> str:
        return few([f"{number} on {told[number]['host']}" for number in numbers], 4)

    if failed := [number for number, one in enumerate(told) if one["error"]]:
        return f"rank {names(failed)}: {told[failed[0]]['error']}"
    if without := [number for number, one in enumerate(told) if one["type"] != "cuda"]:
        if len(without) < len(told):
            others = len(told) - len(without)
            return (f"run.device: rank {names(without)} has no GPU that torch sees, and {others} other processes have one; look "
                    "at nvidia-smi there, or set run.device=cpu")
        return ""
    places: dict[tuple[str, str], list[int]] = {}
    for number, one in enumerate(told):
        places.setdefault((one["host"], one["gpu"]), []).append(number)
    if shared := next((ranks for ranks in places.values() if len(ranks) > 1), None):
        return (f"run.device: rank {names(shared)} share one GPU; start as many processes a host as it has GPUs "
                "(srun: --gpus-per-task=1, or --ntasks-per-node and --gpus-per-node alike)")
    return ""
