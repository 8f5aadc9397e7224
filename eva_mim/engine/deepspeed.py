"""DeepSpeed engine: any number of processes, ZeRO 0 to 3, on GPUs (nccl) or CPUs (gloo). Only this file and `sharded_state.py`
import DeepSpeed."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import Rates, Task
from eva_mim.core.distributed import is_main, local_rank, rank, set_timeout, world_size
from eva_mim.core.losses import StepOutput
from eva_mim.data.sampler import cut_batch
from eva_mim.engine import RunSettings
from eva_mim.engine.base import BaseEngine
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.state import EngineState
from eva_mim.engine.step import Shares, clip_and_step, low_precision, scaled_loss
from eva_mim.optim import OptimSettings, check_sharding
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.optimizers import build_optimizer

BUCKET = 50_000_000
"""Largest number of gradients that ZeRO reduces at once: 200 MB in fp32."""


class DeepSpeedEngine(BaseEngine):
    """DeepSpeed with our optimizers, so that no kernels are compiled at start."""

    def __init__(
        self, student: nn.Module, run: RunSettings, optim: OptimSettings, device: torch.device, micro_batches: int | None = None
    ):
        check_sharding(optim, run.zero_stage)
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # On CPUs DeepSpeed would compile a shared-memory all-reduce at the first start (a minute); gloo has its own.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        # Otherwise every collective of DeepSpeed prints the same warning about names that torch will change.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if world_size() == 1:  # a single process without a launcher also needs a process group for DeepSpeed
            for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
                os.environ.setdefault(name, str(value))
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "0")
        os.environ.setdefault("LOCAL_RANK", str(local_rank()))
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, rank=rank(), world_size=world_size())
        # ZeRO 3 gathers parameters when a module is called; evaluation also calls submodules, so it gets an unsharded copy.
        self._plain = copy.deepcopy(student).to(device) if run.zero_stage == 3 else None
        self._linear = functional.linear  # ZeRO 3 replaces it by a function that rounds differently; evaluation uses torch's
        groups = parameter_groups(student, optim)
        self._watched = build_optimizer(groups, optim)
        self._clip, self._scale = optim.clip_grad, LossScale(run.precision, device)
        self._precision = run.precision
        count = micro_batches or cut_batch(run.global_batch, run.micro_batch, world_size())[1]
        config = _configuration(run, count, sum(p.numel() for group in groups for p in group["params"]), device)
        self._network, self._optimizer, _, _ = deepspeed.initialize(
            args=SimpleNamespace(device_rank=device.index) if device.type == "cuda" else None,  # else LOCAL_RANK is its device
            model=student.to(device), optimizer=self._watched, config=config,
        )
        self.forward = self._network
        if world_size() > 1:  # DeepSpeed's own group of all processes has torch's default timeout
            set_timeout(run.timeout_minutes, self._network.data_parallel_group)
        # DeepSpeed keeps a loss scale for each parameter group and rank, which drift apart; ours is one for all.
        self._network.torch_autocast_z0_gradscaler = None
        self._optimizer.torch_autocast_gradscaler = None
        self._sharded, self._device = run.zero_stage > 0, device
        if self._sharded and self._clip is not None:
            self._watched.register_step_pre_hook(lambda *_: self._limit())
        self.module: nn.Module = self._network.module
        from eva_mim.engine.sharded_state import ShardedState

        # DeepSpeed's own checkpoints are not used, since they belong to one ZeRO stage and one number of processes.
        whole = self.module, self._watched, self._scale
        self._state = ShardedState(*whole, self._optimizer, run.zero_stage) if run.zero_stage else EngineState(*whole)

    def step(self, task: Task, batches: list[Batch], rates: Rates, measure_update: bool = False) -> StepOutput:
        """See `contracts.Engine`."""
        if self._sharded and self._scale.dynamic:
            self._optimizer.override_loss_scale(float(self._scale.value))  # DeepSpeed multiplies and divides by it
        return super().step(task, batches, rates, measure_update)

    def _backward(self, output: StepOutput, shares: Shares, count: int) -> None:
        # DeepSpeed divides by the number of micro-batches, and reduces over ranks after the last.
        self._network.backward(scaled_loss(output, shares, 1.0 if self._sharded else self._scale.value, 1))

    def _limit(self) -> None:
        """Clips the gradient of a parameter group that DeepSpeed is about to update: the optimizer divides by this."""
        assert self._clip is not None
        self._watched.grad_scale = ((self._norm() + 1e-6) / self._clip).clamp(min=1.0)

    def _norm(self) -> Tensor:
        """Returns the norm of the unscaled gradient over all ranks (a scalar), with ZeRO 1 to 3."""
        return torch.as_tensor(self._optimizer._global_grad_norm, dtype=torch.float32, device=self._device).detach()

    def _update(self, last: bool) -> Tensor | None:
        """See `BaseEngine`. DeepSpeed counts micro-batches by the calls of its own `step`."""
        if not last:
            self._network.step()
            return None
        if self._sharded:
            self._network.step()  # skips the update on all ranks if the gradient is not finite
            return self._norm()
        norm = clip_and_step(self._watched, self.module.parameters(), self._clip, self._scale)
        self._watched.zero_grad(set_to_none=True)  # without gradients DeepSpeed's own step only counts
        self._network.step()
        return norm

    def weights(self) -> Mapping[str, Tensor]:
        """See `contracts.Engine`."""
        with self.full_module() as module:
            state = module.state_dict() if is_main() else {}
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    @contextmanager
    def full_module(self) -> Iterator[nn.Module]:
        """Yields the module itself, or with ZeRO 3 an unsharded copy of it with the current weights."""
        if self._plain is None:
            yield self.module
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            self._plain.load_state_dict(self.module.state_dict())
        wrapped, functional.linear = functional.linear, self._linear
        try:
            yield self._plain
        finally:
            functional.linear = wrapped


def _configuration(run: RunSettings, count: int, trained: int, device: torch.device) -> dict[str, Any]:
    """Returns DeepSpeed's configuration for so many micro-batches of a process and trained values."""
    dtype = low_precision(run.precision)
    return {
        # It only counts micro-batches; their images differ between groups of teachers.
        "train_batch_size": count * world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        # Ours: with ZeRO 1 and 2 DeepSpeed would wait for the device before it updates each parameter group.
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": run.zero_stage,
            # ZeRO allocates its buckets whole, for 5e8 values by default: 2 GB for any model.
            "reduce_bucket_size": max(1, min(BUCKET, trained)),
            "overlap_comm": device.type == "cuda" and run.zero_stage in (1, 2),
        },
        # It would wait for the device before and after each micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        # Autocast as in the local engine; gradients are reduced in fp32.
        "torch_autocast": {
            "enabled": dtype is not None,
            "dtype": str(dtype or torch.bfloat16).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
