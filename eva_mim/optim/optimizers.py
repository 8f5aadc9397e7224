"""AdamW, LAMB and LARS that can skip a step on the device, without a host sync."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eva_mim.core.distributed import all_reduce_sum
from eva_mim.optim import LambSettings, LarsSettings, OptimSettings


class SkippableOptimizer(torch.optim.Optimizer):
    """An optimizer that can skip a step, and measure the size of its update, without a host sync."""

    measure_update = False
    found_inf: Tensor | None = None
    """Scalar: 1 if the step is skipped, else 0; None if no step is skipped."""
    grad_scale: Tensor | None = None
    """Scalar by which gradients are divided; None for 1."""
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    """Names of the moments kept for each tensor."""
    counts = True
    """True if the state also has the number of updates made, as "step"."""
    _squares: list[Tensor]
    """For each tensor [2]: squared norms of its update, and of the tensor before the update."""

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns the optimizer state of a parameter, initialised if missing."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update({moment: torch.zeros_like(parameter) for moment in self.moments})
            if self.counts:
                state["step"] = torch.zeros((), device=parameter.device)
        return state

    def update_ratio(self, device: torch.device, sharded: bool) -> Tensor | None:
        """Returns the norm of the last update divided by that of the weights, over all ranks (a scalar); None if `measure_update`
        is off. `sharded`: each rank has measured its own shard."""
        if not self.measure_update:
            return None
        # After a step that DeepSpeed skipped, there are no measurements.
        squares = torch.stack(self._squares).sum(0) if self._squares else torch.zeros(2, device=device)
        self._squares = []
        norms = (all_reduce_sum(squares) if sharded else squares).sqrt()
        return norms[0] / norms[1].clamp(min=1e-30)

    def _given(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Returns 1 and the unscaled gradient; for a skipped step 0 and zeros."""
        assert p.grad is not None
        done = p.new_ones(()) if self.found_inf is None else 1 - self.found_inf
        return done, torch.where(done > 0, p.grad if self.grad_scale is None else p.grad / self.grad_scale, 0.0)


class SkippableAdamW(SkippableOptimizer, torch.optim.AdamW):
    """torch's fused AdamW, which can skip a step."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__(groups, fused=True, **options)
        self._squares = []

    def step(self, closure: Any = None) -> Any:
        """Makes one update; DeepSpeed calls it once for each of its own groups."""
        # torch wraps the step of AdamW once one is made, and the hooks of this optimizer would be called twice.
        plain: Any = torch.optim.AdamW.step
        result = (plain.__wrapped__ if getattr(plain, "hooked", False) else plain)(self, closure)
        if self.measure_update:
            self._squares += [self._squared(group, p) for group in self.param_groups for p in group["params"]
                              if p.grad is not None and "step" in self.state[p]]
        return result

    @torch.no_grad()
    def _squared(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """Returns [2]: squared norms of the tensor's update, recomputed by AdamW's formula, and of the tensor before it."""
        state, (first, second) = self.state[p], group["betas"]
        # A skipped first step leaves the count at 0.
        count = state["step"].clamp(min=1).to(p.device)
        spread = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
        moved = state["exp_avg"].div(1 - first**count).div_(spread).mul_(group["lr"])
        before = (p + moved).div_(1 - group["lr"] * group["weight_decay"])
        done = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        return torch.stack([(before - p).square_().sum() * done, before.square_().sum()])


class SkippableLamb(SkippableOptimizer):
    """LAMB, step by step as timm's `Lamb` with limits on the trust ratio (see `LambSettings`).

    It is not timm's class, since that counts its steps on the host and cannot skip one without waiting for the device. Many
    tensors are updated by each call of the device: a tensor for itself takes 34 small ones.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: LambSettings, **options: Any):
        # With "capturable" torch restores the count of steps to the weights' device.
        super().__init__(groups, {**options, "capturable": True})
        self._trust, self._adapt_all = settings.trust, settings.adapt == "all"
        self._squares = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Makes one update of each tensor that has a gradient."""
        for group in self.param_groups:
            for together in _pieces([p for p in group["params"] if p.grad is not None]):
                self._update(group, together)

    def _update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        states, (beta1, beta2) = [self.state_of(p) for p in weights], group["betas"]
        done, gradients = self._given(weights[0])[0], [self._given(p)[1] for p in weights]
        first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, [done] * len(steps))
        _lerp(first, gradients, (1 - beta1) * done)
        _lerp(second, torch._foreach_mul(gradients, gradients), (1 - beta2) * done)
        # A skipped first step leaves the count at 0. In fp32, 1 - 0.999^1 would lose five digits.
        count = torch.stack(steps).double().clamp(min=1)
        update = torch._foreach_div(second, list((1 - beta2**count).float().unbind()))
        torch._foreach_sqrt_(update)
        torch._foreach_add_(update, group["eps"])
        torch._foreach_reciprocal_(update)
        torch._foreach_mul_(update, first)
        torch._foreach_div_(update, list((1 - beta1**count).float().unbind()))
        torch._foreach_add_(update, weights, alpha=group["weight_decay"])
        before, length = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, update))
        rate = (group["lr"] * done).expand_as(before)
        if self._adapt_all or group["decays"]:
            ratio = before / length
            if self._trust:
                ratio = ratio.clamp(*self._trust)
            rate = rate * torch.where((before > 0) & (length > 0), ratio, 1.0)
        torch._foreach_mul_(update, list(rate.unbind()))
        torch._foreach_sub_(weights, update)
        if self.measure_update:
            self._squares.append(torch.stack([rate * length, before]).square_().sum(1))


PIECE = 2**26
"""Values updated at once by LAMB, whose update takes three copies of them: 0.8 GB."""


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the tensors in lists of at most `PIECE` values, or of one tensor."""
    piece: list[Tensor] = []
    for tensor in tensors:
        if piece and sum(one.numel() for one in piece) + tensor.numel() > PIECE:
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece


def _lerp(starts: list[Tensor], ends: list[Tensor] | tuple[Tensor, ...], weight: Tensor) -> None:
    """Moves each tensor of `starts` by `weight` (a scalar) of its way to `ends`."""
    ways = torch._foreach_sub(ends, starts)
    torch._foreach_mul_(ways, weight)
    torch._foreach_add_(starts, ways)


class SkippableLars(SkippableOptimizer):
    """LARS, step by step as in MoCo v3 and MAE (see `LarsSettings`).

    It is not timm's class, since that cannot skip a step, and adds 1e-8 to norms in denominators.
    """

    moments, counts = ("momentum_buffer",), False

    def __init__(self, groups: list[dict[str, Any]], settings: LarsSettings, lr: float):
        super().__init__(groups, {"lr": lr})
        self._momentum, self._trust = settings.momentum, settings.trust
        self._squares = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Makes one update of each tensor that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state_of(p)
        done, gradient = self._given(p)
        update, before = gradient.add(p, alpha=group["weight_decay"]), p.norm()
        if p.ndim > 1:
            length = update.norm()
            update *= torch.where((before > 0) & (length > 0), self._trust * before / length, 1.0)
        # After a skipped step the buffer is exactly as before.
        buffer = state["momentum_buffer"]
        buffer.copy_(torch.where(done > 0, buffer * self._momentum + update, buffer))
        rate = group["lr"] * done
        p.addcmul_(state["momentum_buffer"], rate, value=-1)
        if self.measure_update:
            self._squares.append(torch.stack([rate * state["momentum_buffer"].norm(), before]).square_())


def build_optimizer(groups: list[dict[str, Any]], settings: OptimSettings) -> SkippableOptimizer:
    """Returns the optimizer of the settings; `groups` come from `parameter_groups`."""
    if settings.optimizer == "lars":
        return SkippableLars(groups, settings.lars, settings.lr)
    options = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.optimizer == "lamb":
        return SkippableLamb(groups, settings.lamb, **options)
    return SkippableAdamW(groups, **options)
