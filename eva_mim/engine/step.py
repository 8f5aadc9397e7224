"""What both engines do alike in a step: weigh micro-batches, scale the loss, and leave out a step that is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.contracts import Batch, Rates, StepOutput, Task
from eva_mim.distributed import all_reduce_sum, world_size
from eva_mim.optim import LambSettings, LarsSettings, OptimSettings

SCALE_START, SCALE_LEAST, SCALE_WINDOW, SCALE_HYSTERESIS = 2.0**16, 1.0, 500, 2
"""fp16 loss scale of EVA's DeepSpeed configuration (facts of EVA-01/eva/utils.py create_ds_config)."""


def loss_weights(task: Task, batches: list[Batch]) -> list[Tensor | float]:
    """Factor of each micro-batch's mean loss, such that the plain mean over micro-batches and ranks is the mean over
    all terms of the global batch. Masks hide different numbers of patches; without this the loss would depend on how
    the batch is cut."""
    terms = [task.terms(batch) for batch in batches]
    counted = [term for term in terms if term is not None]
    if not counted:
        return [1.0] * len(batches)
    local = torch.stack(counted)
    mean = all_reduce_sum(local.sum()) / (len(batches) * world_size())
    return list(local / mean)


def autocast(device: torch.device, precision: str) -> Any:
    """Context with the precision of a forward pass; nothing for fp32."""
    dtype = low_precision(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def low_precision(precision: str) -> torch.dtype | None:
    """What autocast computes in; None for fp32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def telling(loss: Tensor) -> Tensor:
    """The loss, with a gradient that is NaN where it is not finite itself: so the reduced gradient tells every rank."""
    return loss * torch.where(loss.isfinite(), 1.0, float("nan"))


def set_rates(groups: list[dict[str, Any]], rates: Rates) -> None:
    """Learning rate and weight decay of the next step."""
    for group in groups:
        group["lr"] = rates.lr * group["lr_scale"]
        group["weight_decay"] = rates.weight_decay * group["decays"]


class LossScale:
    """The dynamic loss scale of fp16, on the device: nothing waits for it.

    DeepSpeed's rule: the first overflow is forgiven, each further one halves the scale, and a window of steps without one
    doubles it and forgives again. Other precisions have a scale of 1 that never moves.
    """

    def __init__(self, precision: str, device: torch.device):
        self.dynamic = precision == "fp16"
        self.value = torch.tensor(SCALE_START if self.dynamic else 1.0, device=device)
        self._good = torch.tensor(0, device=device)
        self._left = torch.tensor(SCALE_HYSTERESIS, device=device)

    def update(self, bad: Tensor) -> None:
        """After a step; `bad` is a scalar bool."""
        if not self.dynamic:
            return
        halve = bad & (self._left <= 1)
        double = ~bad & (self._good > 0) & (self._good % SCALE_WINDOW == 0)
        self._left = torch.where(double, SCALE_HYSTERESIS, torch.where(bad & ~halve, self._left - 1, self._left))
        self._good = torch.where(bad, 0, self._good + 1)
        lower = torch.clamp(self.value / 2, min=SCALE_LEAST)
        self.value = torch.where(halve, lower, torch.where(double, self.value * 2, self.value))

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [float(self.value), float(self._good), float(self._left)]

    def restore(self, state: list[float]) -> None:
        """What `state` gave."""
        value, good, left = state
        self.value, self._good, self._left = (
            torch.full_like(own, number)
            for own, number in zip((self.value, self._good, self._left), (value, good, left), strict=True)
        )


class Watched(torch.optim.Optimizer):
    """An optimizer that can leave a step out, and tell how far it moved the weights, without asking the host."""

    watch = False
    found_inf: Tensor | None = None
    """1 where the step is left out."""
    grad_scale: Tensor | None = None
    """Gradients are divided by it."""
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    """What it remembers of each tensor."""
    counts = True
    """It also remembers the number of updates that were taken, as "step"."""
    _squares: list[Tensor]
    """[2] squared norms of each tensor's update and of the tensor before it."""

    def begun(self, parameter: Tensor) -> dict[str, Tensor]:
        """Its record of a tensor, made as for a first update where there is none."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update({moment: torch.zeros_like(parameter) for moment in self.moments})
            if self.counts:
                state["step"] = torch.zeros((), device=parameter.device)
        return state

    def update_ratio(self, device: torch.device, sharded: bool) -> Tensor | None:
        """Norm of the last watched update over that of the weights, over all ranks; None when nothing was watched."""
        if not self.watch:
            return None
        # Where DeepSpeed left the step out, nothing was measured.
        squares = torch.stack(self._squares).sum(0) if self._squares else torch.zeros(2, device=device)
        self._squares = []
        norms = (all_reduce_sum(squares) if sharded else squares).sqrt()
        return norms[0] / norms[1].clamp(min=1e-30)

    def _given(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """1, or 0 where the step is left out; the unscaled gradient, or zeros."""
        assert p.grad is not None
        done = p.new_ones(()) if self.found_inf is None else 1 - self.found_inf
        return done, torch.where(done > 0, p.grad if self.grad_scale is None else p.grad / self.grad_scale, 0.0)


class WatchedAdamW(Watched, torch.optim.AdamW):
    """torch's fused AdamW."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__(groups, fused=True, **options)
        self._squares = []

    def step(self, closure: Any = None) -> Any:
        """One update; DeepSpeed calls it once for each group of its own."""
        result = super().step(closure)
        if self.watch:
            self._squares += [self._squared(group, p) for group in self.param_groups for p in group["params"]
                              if p.grad is not None and "step" in self.state[p]]
        return result

    @torch.no_grad()
    def _squared(self, group: dict[str, Any], p: Tensor) -> Tensor:
        """[2] squared norms of this tensor's update and of the tensor before it, from AdamW's own formula."""
        state, (first, second) = self.state[p], group["betas"]
        # A skipped first step leaves the count at 0.
        count = state["step"].clamp(min=1).to(p.device)
        spread = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
        moved = state["exp_avg"].div(1 - first**count).div_(spread).mul_(group["lr"])
        before = (p + moved).div_(1 - group["lr"] * group["weight_decay"])
        done = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        return torch.stack([(before - p).square_().sum() * done, before.square_().sum()])


class TensorByTensor(Watched):
    """An optimizer whose step is a rule for each whole tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        raise NotImplementedError


class WatchedLamb(TensorByTensor):
    """LAMB, step by step as timm's `Lamb` with limits on the trust ratio (see `LambSettings`).

    Not timm's own class: that counts its steps on the host, and cannot leave one out without waiting for the device.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: LambSettings, **options: Any):
        # "capturable" makes torch restore the count of steps to the weights' device.
        super().__init__(groups, {**options, "capturable": True})
        self._trust, self._adapt_all = settings.trust, settings.adapt == "all"
        self._squares = []

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        state, (beta1, beta2) = self.begun(p), group["betas"]
        done, gradient = self._given(p)
        state["step"] += done
        state["exp_avg"].lerp_(gradient, (1 - beta1) * done)
        state["exp_avg_sq"].lerp_(gradient.square_(), (1 - beta2) * done)
        # A skipped first step leaves the count at 0. In fp32, 1 - 0.999^1 would lose five digits.
        count = state["step"].double().clamp(min=1)
        spread = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**count)).div_(spread).add_(p, alpha=group["weight_decay"])
        before, length, rate = p.norm(), update.norm(), group["lr"] * done
        if self._adapt_all or group["decays"]:
            ratio = before / length
            if self._trust:
                ratio = ratio.clamp(*self._trust)
            rate = rate * torch.where((before > 0) & (length > 0), ratio, 1.0)
        p.addcmul_(update, rate, value=-1)
        if self.watch:
            self._squares.append(torch.stack([rate * length, before]).square_())


class WatchedLars(TensorByTensor):
    """LARS, step by step as in MoCo v3 and MAE (see `LarsSettings`).

    Not timm's own class: that cannot leave a step out, and adds 1e-8 to norms that are divided by.
    """

    moments, counts = ("moved",), False

    def __init__(self, groups: list[dict[str, Any]], settings: LarsSettings, lr: float):
        super().__init__(groups, {"lr": lr})
        self._momentum, self._trust = settings.momentum, settings.trust
        self._squares = []

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.begun(p)
        done, gradient = self._given(p)
        update, before = gradient.add(p, alpha=group["weight_decay"]), p.norm()
        if p.ndim > 1:
            length = update.norm()
            update *= torch.where((before > 0) & (length > 0), self._trust * before / length, 1.0)
        # Exactly what it was where the step is left out.
        state["moved"].copy_(torch.where(done > 0, state["moved"] * self._momentum + update, state["moved"]))
        rate = group["lr"] * done
        p.addcmul_(state["moved"], rate, value=-1)
        if self.watch:
            self._squares.append(torch.stack([rate * state["moved"].norm(), before]).square_())


def build_optimizer(groups: list[dict[str, Any]], settings: OptimSettings) -> Watched:
    """The optimizer that the settings name, for `parameter_groups`."""
    if settings.optimizer == "lars":
        return WatchedLars(groups, settings.lars, settings.lr)
    options = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.optimizer == "lamb":
        return WatchedLamb(groups, settings.lamb, **options)
    return WatchedAdamW(groups, **options)


def conclude(
    outputs: list[StepOutput], weights: list[Tensor | float], norm: Tensor, scale: LossScale, update_ratio: Tensor | None
) -> StepOutput:
    """This rank's share of the step's loss and metrics (detached); moves the loss scale. See `contracts.Engine.step`."""
    count, used, bad = len(outputs), scale.value, ~norm.isfinite()
    scale.update(bad)
    loss = torch.stack([output.loss.detach().float() * w for output, w in zip(outputs, weights, strict=True)]).sum()
    metrics = {
        name: torch.stack([o.metrics[name] * w for o, w in zip(outputs, weights, strict=True)]).sum() / count
        for name in outputs[0].metrics
    }
    return StepOutput(loss / count, metrics).with_metrics(
        grad_norm=norm, skipped=bad.float(), update_ratio=update_ratio, loss_scale=used if scale.dynamic else None
    )


def clip_and_step(optimizer: Watched, parameters: Iterable[nn.Parameter], clip: float | None, scale: LossScale) -> Tensor:
    """Clip to the global norm `clip` and step, or leave the weights alone where the gradient is not finite.

    Returns the norm before clipping, of the unscaled gradient; nothing waits for the device.
    """
    limit: Any = float("inf") if clip is None else clip * scale.value
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit) / scale.value
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.grad_scale = scale.value if scale.dynamic else None
    optimizer.step()
    return norm.detach()
