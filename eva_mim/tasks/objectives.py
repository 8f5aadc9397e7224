"""Losses between a student's prediction and a teacher's features, row by row: of patches [M, C], and of summaries [B, C]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.distributed import all_reduce_sum


class RowLosses(NamedTuple):
    """What an objective returns: a number for each patch or image."""

    loss: Tensor
    """[M], differentiable."""
    metrics: Mapping[str, Tensor] = {}
    """Detached, [M] each; their means are logged."""

    @property
    def mean(self) -> Tensor:
        """The loss of a step; 0 for M = 0, with a gradient."""
        return mean_of(self.loss)


def mean_of(values: Tensor) -> Tensor:
    """Returns the mean of [M]; 0 for M = 0."""
    return values.mean() if len(values) else values.sum()


Objective = Callable[[Tensor, Tensor], RowLosses]
COSINE_SHARE = 0.9
"""Weight of 1 - cosine beside smooth L1 (AM-RADIO, section 3.2)."""
UP_TO_ROTATION = ("cosine", "mse")
"""Names of losses of patches that do not change when prediction and target are rotated alike."""
SAMPLES = 10_000_000
"""Summaries after which the dispersion of a teacher's directions is fixed (NVIDIA's TAO)."""
NEAR = 1e-3
"""1 - cosine below which the squared angle is a series: the derivative of the arc cosine is infinite at 1."""


def masked_cosine(prediction: Tensor, target: Tensor) -> RowLosses:
    """Returns minus the cosine of each of [M, C] predictions and targets (EVA-01/eva/engine_for_pretraining.py).

    It is computed in fp32, because squares of half-precision features overflow or vanish. Finite for norms from 1e-8 to 1e4.
    """
    cosine = _cosine(prediction, target)
    return RowLosses(-cosine, _figures(cosine, target))


def masked_mse(prediction: Tensor, target: Tensor) -> RowLosses:
    """Returns the squared error of each of [M, C], a mean over C (MAE, section 3, for pixel targets), in fp32."""
    error = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(-1)
    return RowLosses(error, _figures(_cosine(prediction, target), target))


def cosine_smooth_l1(prediction: Tensor, target: Tensor) -> RowLosses:
    """Returns 0.9 (1 - cosine) + 0.1 smooth L1, a mean over C, of each of [M, C] (AM-RADIO, equation 3), in fp32."""
    cosine = _cosine(prediction, target)
    error = F.smooth_l1_loss(prediction.float(), target.float(), reduction="none").mean(-1)
    return RowLosses(COSINE_SHARE * (1 - cosine) + (1 - COSINE_SHARE) * error, _figures(cosine, target))


def summary_cosine(prediction: Tensor, target: Tensor) -> RowLosses:
    """Returns 1 - cosine of each of [B, C] predictions and summaries (AM-RADIO, equation 2), in fp32."""
    cosine = _cosine(prediction, target)
    return RowLosses(1 - cosine, {"summary_cosine": cosine.detach()})


class SummaryAngle:
    """The squared angle between prediction and summary, divided by the mean squared angle between the teacher's summaries and
    their mean direction, so that teachers of other spreads weigh alike (C-RADIOv4, section 3.1).

    That dispersion is a running mean in float64 over all ranks; it is fixed after 10 million summaries.
    """

    def __init__(self, width: int):
        self.state: dict[str, Tensor] = {
            "direction": torch.zeros(width, dtype=torch.float64),
            "angles": torch.zeros(2, dtype=torch.float64),
        }
        """Sum of the unit vectors, and number and sum of the squared angles to their mean direction; over all ranks."""
        self._fresh = {name: torch.zeros_like(value) for name, value in self.state.items()}
        self.started = False
        """True once there is a mean direction."""

    def to(self, device: torch.device) -> SummaryAngle:
        """Moves all tensors to `device`."""
        self.state = {name: value.to(device) for name, value in self.state.items()}
        self._fresh = {name: value.to(device) for name, value in self._fresh.items()}
        return self

    @torch.no_grad()
    def add(self, summary: Tensor) -> None:
        """Adds summaries [B, C] of this process."""
        unit = F.normalize(summary.double(), dim=-1)
        unit = unit.where(unit.isfinite().all(1, keepdim=True), 0.0)
        measuring = (self.state["angles"][0] < SAMPLES).double()
        self._fresh["direction"] += measuring * unit.sum(0)
        direction = F.normalize(self.state["direction"], dim=0)
        known = direction.any() & unit.any(1)
        angles = squared_angle(1 - unit @ direction).where(known, 0.0)
        self._fresh["angles"] += measuring * torch.stack([known.sum().double(), angles.sum()])

    @torch.no_grad()
    def gather(self) -> None:
        """Adds what all ranks have added since the last call. Every rank must call."""
        for name, value in self._fresh.items():
            self.state[name] += all_reduce_sum(value)
            self._fresh[name] = torch.zeros_like(value)
        self.started = True

    def restore(self, name: str, value: Tensor) -> None:
        """Sets a tensor of `state`."""
        self.state[name] = value.to(self.state[name].device)
        self.started = True

    def dispersion(self) -> Tensor:
        """Returns the mean squared angle, a scalar; 1 while none is known."""
        count, total = self.state["angles"]
        return torch.where((count > 0) & (total > 0), total / count.clamp(min=1.0), 1.0).float()

    def __call__(self, prediction: Tensor, target: Tensor) -> RowLosses:
        """Returns the loss of each of [B, C]."""
        unit, wanted = (F.normalize(one.float(), dim=-1) for one in (prediction, target))
        apart = (unit - wanted).square().sum(-1) / 2  # 1 - cosine, without its cancellation
        angles = squared_angle(apart)
        return RowLosses(angles / self.dispersion(), {"summary_cosine": 1 - apart.detach()})


def squared_angle(apart: Tensor) -> Tensor:
    """Returns the squared angle, in radians, of vectors whose cosine is 1 - `apart`; differentiable at 0."""
    near = apart < NEAR
    series = apart * (2 + apart * (1 / 3 + apart * (4 / 45)))
    far = (1 - apart.where(~near, 1.0)).clamp(min=-1 + 1e-6).arccos().square()
    return torch.where(near, series, far)


def _cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return (F.normalize(prediction.float(), dim=-1) * F.normalize(target.float(), dim=-1)).sum(-1)


def _figures(cosine: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {"cosine": cosine.detach(), "target_norm": target.detach().float().norm(dim=-1)}
