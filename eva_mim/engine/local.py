"""Local engine: one process with plain torch; the reference, and the default on a laptop or a single GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from eva_mim.core.distributed import world_size
from eva_mim.core.errors import UserError
from eva_mim.core.losses import StepOutput
from eva_mim.engine import RunSettings
from eva_mim.engine.base import BaseEngine
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.state import EngineState
from eva_mim.engine.step import Shares, clip_and_step, placed, scaled_loss
from eva_mim.optim import OptimSettings
from eva_mim.optim.groups import parameter_groups
from eva_mim.optim.optimizers import build_optimizer


class LocalEngine(BaseEngine):
    """One process with fp32 weights and forward passes under autocast. Raises UserError for several processes."""

    def __init__(
        self, student: nn.Module, run: RunSettings, optim: OptimSettings, device: torch.device, micro_batches: int | None = None
    ):
        if world_size() > 1:
            raise UserError(f"run.engine=local runs one process, but {world_size()} were started; set run.engine=deepspeed")
        self.module = placed(student, "local", device)
        self.forward, self._device, self._sharded = self.module, device, False
        self._precision, self._clip, self._scale = run.precision, optim.clip_grad, LossScale(run.precision, device)
        groups = parameter_groups(student, optim)
        self._watched = build_optimizer(groups, optim)
        self._state = EngineState(self.module, self._watched, self._scale)
        self._parameters = [parameter for group in groups for parameter in group["params"]]

    def _backward(self, output: StepOutput, shares: Shares, count: int) -> None:
        torch.autograd.backward(scaled_loss(output, shares, self._scale.value, count))

    def _update(self, last: bool) -> Tensor | None:
        if not last:
            return None
        norm = clip_and_step(self._watched, self._parameters, self._clip, self._scale)
        self._watched.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> Mapping[str, Tensor]:
        """See `contracts.Engine`."""
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def full_module(self) -> AbstractContextManager[nn.Module]:
        """Returns a context with the module itself, since nothing is sharded."""
        return nullcontext(self.module)
