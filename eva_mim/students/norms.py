"""Batch norm with the statistics of all ranks: a step does not depend on the number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eva_mim.core.distributed import all_reduce_sum


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.clone())


class GlobalNorm(_BatchNorm):
    """torch's batch norm of rows [B, D] or maps [B, D, H, W], with the statistics of all ranks' micro-batches. torch's own
    SyncBatchNorm is for GPUs alone."""

    def _check_input_dim(self, input: Tensor) -> None:
        return

    def forward(self, input: Tensor) -> Tensor:
        """Returns the standardised input, in fp32; in training every rank must call."""
        if not self.training:
            return super().forward(input.float())
        inner = [0, *range(2, input.ndim)]
        exact = input.double() if input.ndim == 2 else input.float()  # maps have too many values for a copy in doubles
        count = exact.new_full((1,), input.numel() / input.shape[1], dtype=torch.float64)  # filled there: no copy, no wait
        own = torch.cat([exact.sum(inner, dtype=torch.float64), exact.square().sum(inner, dtype=torch.float64), count])
        sums = _SumOverRanks.apply(own)  # type: ignore[no-untyped-call]
        total = sums[-1].detach()
        mean = sums[: len(sums) // 2] / total
        variance = (sums[len(sums) // 2 : -1] / total - mean.square()).clamp(min=0)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * (total / (total - 1).clamp(min=1))).float(), self.momentum)
        shape = (1, -1, *[1] * (input.ndim - 2))
        scale = (variance + self.eps).rsqrt()
        standard = (exact - mean.view(shape).to(exact.dtype)) * scale.view(shape).to(exact.dtype)
        found: Tensor = standard.float()
        if self.affine:
            found = found * self.weight.float().view(shape) + self.bias.float().view(shape)
        return found


def with_global_norms(module: nn.Module) -> nn.Module:
    """Replaces each fresh batch norm inside a module by a `GlobalNorm`; returns the module."""
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm) and not isinstance(child, GlobalNorm):
            setattr(module, name, GlobalNorm(child.num_features, child.eps, child.momentum, child.affine))
        else:
            with_global_norms(child)
    return module
