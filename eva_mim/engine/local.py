"""One process, plain torch: the reference, and the default on a laptop or a single GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.core.contracts import Batch, Part, Rates, StepOutput, Task
from eva_mim.core.distributed import world_size
from eva_mim.core.errors import UserError
from eva_mim.core.timing import phase
from eva_mim.engine import RunSettings
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.state import Holdings
from eva_mim.engine.step import autocast, clip_and_step, conclude, loss_weights, set_rates, telling
from eva_mim.optim import OptimSettings
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.optimizers import build_optimizer


class LocalEngine:
    """fp32 weights; forward passes under autocast."""

    def __init__(self, student: nn.Module, run: RunSettings, optim: OptimSettings, device: torch.device):
        if world_size() > 1:
            raise UserError(f"run.engine=local runs one process, but {world_size()} were started; set run.engine=deepspeed")
        self.module = student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device, self._clip = device, optim.clip_grad
        self._precision = run.precision
        self._scale = LossScale(run.precision, device)
        groups = parameter_groups(student, optim)
        self._optimizer = build_optimizer(groups, optim)
        self._holdings = Holdings(self.module, self._optimizer, self._scale)
        self._parameters = [parameter for group in groups for parameter in group["params"]]

    def step(self, task: Task, batches: list[Batch], rates: Rates, watch: bool = False) -> StepOutput:
        """See `contracts.Engine`."""
        set_rates(self._optimizer.param_groups, rates)
        self._optimizer.watch = watch
        with self.autocast():
            batches = task.prepare(self.module, batches)
        weights = loss_weights(task, batches)
        scale = self._scale.value
        outputs = []
        for batch, weight in zip(batches, weights, strict=True):
            with self.autocast():
                output = task.loss(self.module, batch)
            with phase("backward"):
                torch.autograd.backward(telling(output.loss) * (weight * scale / len(batches)))
            outputs.append(output)
        with phase("optimizer"):
            norm = clip_and_step(self._optimizer, self._parameters, self._clip, self._scale)
            self._optimizer.zero_grad(set_to_none=True)
        ratio = self._optimizer.update_ratio(self._device, sharded=False)
        return conclude(outputs, weights, norm, self._scale, ratio)

    def weights(self) -> Mapping[str, Tensor]:
        """See `contracts.Engine`."""
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def whole(self) -> AbstractContextManager[nn.Module]:
        """Nothing is sharded."""
        return nullcontext(self.module)

    def autocast(self) -> Any:
        """bf16 or fp16 autocast, or nothing for fp32."""
        return autocast(self._device, self._precision)

    def loss_scale(self) -> float:
        """See `contracts.Engine`."""
        return float(self._scale.value)

    def parts(self) -> dict[str, Part]:
        """See `contracts.Engine`."""
        return self._holdings.parts()
