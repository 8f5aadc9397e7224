"""Engine state for ZeRO 1 to 3, where weights and moments are sharded over ranks. It is imported after DeepSpeed is set up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.distributed import rank, world_size
from eva_mim.engine.loss_scale import LossScale
from eva_mim.engine.state import EngineState
from eva_mim.optim.optimizers import SkippableOptimizer


class ShardedState(EngineState):
    """Checkpoint state of an engine with ZeRO 1 to 3; `zero` is DeepSpeed's optimizer around ours.

    With ZeRO 1 and 2 each rank has all weights, and the optimizer updates a copy of the rank's shard of each parameter group's
    flat vector; with ZeRO 3 each rank has an equal shard of every parameter.
    """

    def __init__(self, module: nn.Module, optimizer: SkippableOptimizer, scale: LossScale, zero: Any, stage: int):
        super().__init__(module, optimizer, scale)
        self._zero, self._shared_out = zero, stage == 3
        self._vectors = zero.fp32_partitioned_groups_flat if self._shared_out else zero.single_partition_of_fp32_groups

    def _states(self) -> Iterable[dict[str, Tensor]]:
        return [self._optimizer.state_of(vector) for vector in self._vectors]

    def _begin(self) -> None:
        self._states()
        if not self._shared_out:  # DeepSpeed does this after the first group's first step, when other groups lack moments
            for group, vector in zip(self._zero.bit16_groups, self._vectors, strict=True):
                deepspeed.utils.lazy_init_hp_params_optimizer_state(group, vector, self._optimizer.state)

    def _shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(getattr(value, "ds_shape", value.shape))

    def _weight(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            return deepspeed.utils.safe_get_full_fp32_param(value)  # type: ignore[no-any-return]
        with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
            return value.detach().clone()

    def _put_weight(self, value: Tensor, new: Tensor) -> None:
        with deepspeed.zero.GatheredParameters([value], modifier_rank=0, enabled=hasattr(value, "ds_id")):
            value.data.copy_(new)
        if not value.requires_grad:
            return
        if self._shared_out:
            deepspeed.utils.safe_set_local_fp32_param(value, self._share(value, new))
        else:
            deepspeed.utils.safe_set_full_fp32_param(value, new)

    def _moment(self, moment: str, value: Tensor) -> Tensor:
        return deepspeed.utils.safe_get_full_optimizer_state(value, moment)  # type: ignore[no-any-return]

    def _set_moment(self, moment: str, value: Tensor, new: Tensor) -> None:
        if self._shared_out:
            deepspeed.utils.safe_set_local_optimizer_state(value, self._share(value, new), moment)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(value, new, moment)

    def _share(self, value: Any, new: Tensor) -> Tensor:
        """Returns this rank's shard of an unsharded tensor, padded with zeros. DeepSpeed's own function fails for tensors whose
        size is not divisible by the number of ranks."""
        size = value.ds_tensor.numel()
        return F.pad(new.flatten(), (0, size * world_size() - new.numel()))[rank() * size : (rank() + 1) * size]
