"""Engine state for checkpoints: weights, optimizer moments and counters, as unsharded tensors."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from eva_mim.core.contracts import StateGroup
from eva_mim.engine.loss_scale import LossScale
from eva_mim.optim.optimizers import SkippableOptimizer

UPDATES, LOSS_SCALE = "updates", "loss_scale"


class EngineState:
    """Checkpoint state of an engine without sharding: every rank has all tensors in full."""

    def __init__(self, module: nn.Module, optimizer: SkippableOptimizer, scale: LossScale):
        self._module, self._optimizer, self._scale = module, optimizer, scale
        self._trained = {name: value for name, value in module.named_parameters() if value.requires_grad}

    def state(self) -> dict[str, StateGroup]:
        """See `contracts.Engine`. Moments that do not exist yet are zeros, as the optimizer initialises them."""
        self._begin()
        tensors = self._module.state_dict(keep_vars=True)
        kinds = {name: (str(value.dtype).removeprefix("torch."), self._shape(value)) for name, value in tensors.items()}
        parts = {"module": StateGroup(kinds, lambda name: self._weight(tensors[name]),
                                lambda name, value: self._put_weight(tensors[name], value))}
        moments = {name: ("float32", self._shape(value)) for name, value in self._trained.items()}
        for moment in self._optimizer.moments:
            parts[moment] = StateGroup(moments, partial(self._read_moment, moment), partial(self._put_moment, moment))
        counts: dict[str, tuple[str, tuple[int, ...]]] = {LOSS_SCALE: ("float64", (len(self._scale.state()),))}
        if self._optimizer.counts:
            counts[UPDATES] = "float64", ()
        return parts | {"counts": StateGroup(counts, self._count, self._put_count)}

    def _states(self) -> Iterable[dict[str, Tensor]]:
        """Returns the optimizer state of each tensor that it updates."""
        return [self._optimizer.state_of(value) for value in self._trained.values()]

    def _begin(self) -> None:
        """Initialises missing optimizer state."""
        self._states()

    def _shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(value.shape)

    def _weight(self, value: Tensor) -> Tensor:
        return value

    def _put_weight(self, value: Tensor, new: Tensor) -> None:
        value.data.copy_(new)

    def _moment(self, moment: str, value: Tensor) -> Tensor:
        return self._optimizer.state_of(value)[moment]

    def _set_moment(self, moment: str, value: Tensor, new: Tensor) -> None:
        self._optimizer.state_of(value)[moment].copy_(new)

    def _read_moment(self, moment: str, name: str) -> Tensor:
        return self._moment(moment, self._trained[name])

    def _put_moment(self, moment: str, name: str, new: Tensor) -> None:
        self._set_moment(moment, self._trained[name], new)

    def _count(self, name: str) -> Tensor:
        if name == LOSS_SCALE:
            return torch.tensor(self._scale.state(), dtype=torch.float64)
        # The number of updates is the same for all tensors, except for one that never had a gradient.
        return torch.tensor(max(float(state["step"]) for state in self._states()), dtype=torch.float64)

    def _put_count(self, name: str, value: Tensor) -> None:
        if name == LOSS_SCALE:
            self._scale.restore(value.tolist())
            return
        for state in self._states():
            state["step"].fill_(float(value))
