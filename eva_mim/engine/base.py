"""The step that both engines share; see `contracts.Engine`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import Rates, StateGroup, Task
from eva_mim.core.losses import StepOutput
from eva_mim.core.timing import phase
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.state import EngineState
from eva_mim.engine.step import Shares, autocast, loss_shares, reduce_outputs, set_rates
from eva_mim.optim.optimizers import SkippableOptimizer


class BaseEngine:
    """An engine without backward pass and weight update, which a subclass adds. The subclass sets the attributes below."""

    module: nn.Module
    forward: Callable[..., Any]
    """The student's forward pass as a task calls it: the module, or a wrapper of it. Only this callable may be compiled."""
    _watched: SkippableOptimizer
    _state: EngineState
    _scale: LossScale
    _precision: str
    _device: torch.device
    _sharded: bool
    """True if each rank has a shard of the optimizer's state."""

    def step(self, task: Task, batches: list[Batch], rates: Rates, measure_update: bool = False) -> StepOutput:
        """See `contracts.Engine`."""
        set_rates(self._watched.param_groups, rates)
        if hasattr(self.module, "heads_alone"):
            self.module.heads_alone = rates.heads_alone  # type: ignore[assignment]
        self._watched.measure_update = measure_update
        with self.autocast():
            batches = task.prepare(self.forward, batches)
        shares = loss_shares(task, batches)
        outputs = []
        for batch, share in zip(batches, shares, strict=True):
            with self.autocast():
                output = task.loss(self.forward, batch)
            with phase("backward"):
                self._backward(output, share, len(batches))
            outputs.append(output)
            with phase("optimizer"):
                norm = self._update(last=batch is batches[-1])
        assert norm is not None
        ratio = self._watched.update_ratio(self._device, sharded=self._sharded)
        return reduce_outputs(outputs, shares, norm, self._scale, ratio)

    def _backward(self, output: StepOutput, shares: Shares, count: int) -> None:
        """Accumulates the gradient of one of `count` micro-batches: that of the loss with each term times its share, times
        loss scale / count."""
        raise NotImplementedError

    def _update(self, last: bool) -> Tensor | None:
        """Updates the weights after the last micro-batch; returns the norm of the gradient, unscaled and before clipping (a
        scalar). `step` calls it after each micro-batch; it returns None before the last."""
        raise NotImplementedError

    def autocast(self) -> Any:
        """Returns a context with bf16 or fp16 autocast; for fp32 it does nothing."""
        return autocast(self._device, self._precision)

    def loss_scale(self) -> float:
        """See `contracts.Engine`."""
        return float(self._scale.value)

    def state(self) -> dict[str, StateGroup]:
        """See `contracts.Engine`."""
        return self._state.state()
