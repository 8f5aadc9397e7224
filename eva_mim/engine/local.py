"""One process, plain torch: the reference, and the default on a laptop or a single GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.contracts import Batch, StepOutput, Task
from eva_mim.distributed import world_size
from eva_mim.engine import RunSettings
from eva_mim.engine.step import combine, loss_weights
from eva_mim.optim import OptimSettings, parameter_groups

STATE = "engine.pt"


class LocalEngine:
    """AdamW on fp32 weights; forward passes under autocast."""

    def __init__(self, student: nn.Module, run: RunSettings, optim: OptimSettings, device: torch.device):
        if world_size() > 1:
            raise UserError(f"run.engine=local runs one process, but {world_size()} were started; set run.engine=deepspeed")
        self.module = student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device, self._clip = device, optim.clip_grad
        self._dtype = torch.bfloat16 if run.precision == "bf16" else None
        groups = parameter_groups(student, optim)
        self._optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        self._parameters = [parameter for group in groups for parameter in group["params"]]

    def step(self, task: Task, batches: list[Batch], lr: float) -> StepOutput:
        """See `contracts.Engine`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        weights = loss_weights(task, batches)
        outputs = []
        for batch, weight in zip(batches, weights, strict=True):
            with self.autocast():
                output = task.loss(self.module, batch)
            torch.autograd.backward(output.loss * weight / len(batches))
            outputs.append(output)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        total = combine(outputs, weights)
        return StepOutput(total.loss, {**total.metrics, "grad_norm": norm.detach()})

    def weights(self) -> Mapping[str, Tensor]:
        """See `contracts.Engine`."""
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def whole(self) -> AbstractContextManager[nn.Module]:
        """Nothing is sharded."""
        return nullcontext(self.module)

    def autocast(self) -> Any:
        """bf16 autocast, or nothing for fp32."""
        return torch.autocast(self._device.type, self._dtype) if self._dtype else nullcontext()

    def save(self, folder: Path) -> None:
        """Weights and optimizer state into `folder`."""
        torch.save({"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}, folder / STATE)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Raises UserError for another engine's checkpoint."""
        if not (folder / STATE).exists():
            raise UserError(f"{folder} was not written by run.engine=local; resume it with the engine that wrote it")
        state = torch.load(folder / STATE, map_location=self._device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
