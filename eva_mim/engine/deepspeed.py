"""Any number of processes through DeepSpeed, ZeRO 0 to 3, on GPUs (nccl) or CPUs (gloo). Imported here and in
`fragments.py` alone."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.nn import functional

from eva_mim.core.contracts import Batch, Rates, Task
from eva_mim.core.distributed import is_main, local_rank, rank, world_size
from eva_mim.core.losses import StepOutput
from eva_mim.engine import RunSettings
from eva_mim.engine.base import BaseEngine
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.state import EngineState
from eva_mim.engine.step import Shares, clip_and_step, low_precision, scaled_loss
from eva_mim.optim import OptimSettings, check_sharding
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.optimizers import build_optimizer


class DeepSpeedEngine(BaseEngine):
    """Our optimizers under DeepSpeed: nothing is compiled at start."""

    def __init__(self, student: nn.Module, run: RunSettings, optim: OptimSettings, device: torch.device):
        check_sharding(optim, run.zero_stage)
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # On CPUs DeepSpeed would compile a shared-memory all-reduce for a minute at the first start; gloo has its own.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        # Every collective of DeepSpeed's would otherwise print the same notice about torch's next names.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if world_size() == 1:  # a single process without a launcher: DeepSpeed wants a group all the same
            for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
                os.environ.setdefault(name, str(value))
            os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
            os.environ.setdefault("MASTER_PORT", "0")
        os.environ.setdefault("LOCAL_RANK", str(local_rank()))
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, rank=rank(), world_size=world_size())
        micro = run.micro_batch or run.global_batch // world_size()
        # ZeRO 3 fetches parameters when a module is called; evaluation also calls parts of modules, so it gets a plain copy.
        self._plain = copy.deepcopy(student).to(device) if run.zero_stage == 3 else None
        self._linear = functional.linear  # ZeRO 3 puts its own in the place, which rounds otherwise: not for evaluation
        groups = parameter_groups(student, optim)
        self._watched = build_optimizer(groups, optim)
        self._clip, self._scale = optim.clip_grad, LossScale(run.precision, device)
        self._precision, dtype = run.precision, low_precision(run.precision)
        config = {
            "train_batch_size": run.global_batch,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": run.global_batch // (micro * world_size()),
            # With ZeRO 0 the step is ours: DeepSpeed would neither tell the norm nor leave out a step that is not finite.
            "gradient_clipping": (optim.clip_grad or 0.0) if run.zero_stage else 0.0,
            "zero_optimization": {"stage": run.zero_stage},
            "zero_allow_untested_optimizer": True,
            # Autocast as in the local engine; gradients travel in fp32.
            "torch_autocast": {
                "enabled": dtype is not None,
                "dtype": str(dtype or torch.bfloat16).removeprefix("torch."),
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }
        self._network, self._optimizer, _, _ = deepspeed.initialize(
            model=student.to(device), optimizer=self._watched, config=config
        )
        self.forward = self._network
        if world_size() > 1:  # DeepSpeed's own group of all processes, which has torch's default
            torch.distributed.set_timeout(timedelta(minutes=run.timeout_minutes), self._network.data_parallel_group)
        # DeepSpeed gives each group of a rank its own loss scale, and these drift apart; ours is one for all.
        self._network.torch_autocast_z0_gradscaler = None
        self._optimizer.torch_autocast_gradscaler = None
        self._sharded, self._device = run.zero_stage > 0, device
        self.module: nn.Module = self._network.module
        from eva_mim.engine.sharded_state import ShardedState

        # Not DeepSpeed's own checkpoints: these belong to one stage and one number of processes.
        whole = self.module, self._watched, self._scale
        self._state = ShardedState(*whole, self._optimizer, run.zero_stage) if run.zero_stage else EngineState(*whole)

    def step(self, task: Task, batches: list[Batch], rates: Rates, measure_update: bool = False) -> StepOutput:
        """See `contracts.Engine`."""
        if self._sharded and self._scale.dynamic:
            self._optimizer.override_loss_scale(float(self._scale.value))  # DeepSpeed multiplies and divides by it
        return super().step(task, batches, rates, measure_update)

    def _backward(self, output: StepOutput, shares: Shares, count: int) -> None:
        # Divides by the number of micro-batches itself; reduces over ranks after the last.
        self._network.backward(scaled_loss(output, shares, 1.0 if self._sharded else self._scale.value, 1))

    def _update(self, last: bool) -> Tensor | None:
        """After each micro-batch; the norm of the unscaled, unclipped gradient after the last."""
        if not last:
            self._network.step()
            return None
        if self._sharded:
            self._network.step()  # leaves the weights alone, on all ranks, where the gradient is not finite
            return torch.as_tensor(self._network.get_global_grad_norm(), dtype=torch.float32, device=self._device).detach()
        norm = clip_and_step(self._watched, self.module.parameters(), self._clip, self._scale)
        self._watched.zero_grad(set_to_none=True)  # DeepSpeed's own step then finds nothing to do but count
        self._network.step()
        return norm

    def weights(self) -> Mapping[str, Tensor]:
        """See `contracts.Engine`."""
        with self.full_module() as module:
            state = module.state_dict() if is_main() else {}
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    @contextmanager
    def full_module(self) -> Iterator[nn.Module]:
        """The module itself, or with ZeRO 3 an unsharded copy of it, brought up to date."""
        if self._plain is None:
            yield self.module
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            self._plain.load_state_dict(self.module.state_dict())
        zeros, functional.linear = functional.linear, self._linear
        try:
            yield self._plain
        finally:
            functional.linear = zeros
