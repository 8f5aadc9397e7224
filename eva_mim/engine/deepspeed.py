"""Any number of processes through DeepSpeed, ZeRO 0 to 3, on GPUs (nccl) or CPUs (gloo). The only file that imports it."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.contracts import Batch, StepOutput, Task
from eva_mim.distributed import is_main, local_rank, rank, world_size
from eva_mim.engine import RunSettings
from eva_mim.engine.step import combine, loss_weights
from eva_mim.optim import OptimSettings, parameter_groups

TAG = "engine"


class DeepSpeedEngine:
    """torch's AdamW under DeepSpeed: nothing is compiled at start."""

    def __init__(self, student: nn.Module, run: RunSettings, optim: OptimSettings, device: torch.device):
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
        groups = parameter_groups(student, optim)
        self._lr_scales = [group["lr_scale"] for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        config = {
            "train_batch_size": run.global_batch,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": run.global_batch // (micro * world_size()),
            "gradient_clipping": optim.clip_grad or 0.0,
            "zero_optimization": {"stage": run.zero_stage},
            "zero_allow_untested_optimizer": True,
            # Autocast as in the local engine; gradients travel in fp32.
            "torch_autocast": {
                "enabled": run.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=student.to(device), optimizer=optimizer, config=config
        )
        self._zero, self._device = run.zero_stage, device
        self._dtype = torch.bfloat16 if run.precision == "bf16" else None
        self.module: nn.Module = self._engine.module

    def step(self, task: Task, batches: list[Batch], lr: float) -> StepOutput:
        """See `contracts.Engine`."""
        for group, scale in zip(self._optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = lr * scale
        weights = loss_weights(task, batches)
        outputs = []
        for batch, weight in zip(batches, weights, strict=True):
            with self.autocast():
                output = task.loss(self._engine, batch)
            self._engine.backward(output.loss * weight)  # divides by the number of micro-batches itself
            outputs.append(output)
            norm = self._unsharded_norm() if batch is batches[-1] and not self._zero else None
            self._engine.step()
        if norm is None:
            norm = torch.as_tensor(self._engine.get_global_grad_norm() or 0.0, device=self._device).detach()
        total = combine(outputs, weights)
        return StepOutput(total.loss, {**total.metrics, "grad_norm": norm})

    def _unsharded_norm(self) -> Tensor:
        """Gradient norm before clipping; with ZeRO 0 DeepSpeed does not tell it."""
        return torch.nn.utils.clip_grad_norm_(self.module.parameters(), float("inf")).detach()

    def weights(self) -> Mapping[str, Tensor]:
        """See `contracts.Engine`."""
        with self.whole() as module:
            state = module.state_dict() if is_main() else {}
            return {name: value.detach().cpu().clone() for name, value in state.items()}

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The module itself, or with ZeRO 3 an unsharded copy of it, brought up to date."""
        if self._plain is None:
            yield self.module
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            self._plain.load_state_dict(self.module.state_dict())
        yield self._plain

    def autocast(self) -> Any:
        """bf16 autocast, or nothing for fp32."""
        return torch.autocast(self._device.type, self._dtype) if self._dtype else nullcontext()

    def save(self, folder: Path) -> None:
        """DeepSpeed's own files below `folder`; every rank must call."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Raises UserError when nothing was restored."""
        if not (folder / TAG).is_dir():
            raise UserError(f"{folder} was not written by run.engine=deepspeed; resume it with the engine that wrote it")
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise UserError(f"{folder}: DeepSpeed could not load its checkpoint (written with another number of processes?)")
