"""Sums between two log lines. Tensors stay on the device until the line is due."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eva_mim.contracts import StepOutput
from eva_mim.distributed import all_reduce_sum, world_size
from eva_mim.phases import Stopwatch


@dataclass(frozen=True)
class Window:
    """What happened since the last log line, over all ranks."""

    means: dict[str, float]
    """Means over the steps that were taken; `skipped`, `broken`: sums; `loss_scale`: the last; `grad_norm_max`: the largest."""
    losses: list[float]
    """Loss of each step; NaN where it was not finite."""
    shares: dict[str, float]
    """Share of the main rank's time by phase."""
    images_per_s: float


class Meter:
    """One window."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self.started = time.perf_counter()
        self.images = 0
        self.outputs: list[StepOutput] = []
        self.broken: list[str] = []

    def read(self, device: torch.device) -> Window:
        """Close the window: the one point where the host waits for the device."""
        names = sorted({name for output in self.outputs for name in output.metrics} - {"skipped"})
        skipped = torch.stack([output.metrics["skipped"] for output in self.outputs])
        losses = torch.stack([output.loss.float() for output in self.outputs])
        means = [_mean_of_taken(losses, skipped)]
        for name in names:
            steps = [i for i, output in enumerate(self.outputs) if name in output.metrics]
            values = torch.stack([self.outputs[i].metrics[name].float() for i in steps])
            means.append(values[-1] if name == "loss_scale" else _mean_of_taken(values, skipped[steps]))
        norms = torch.stack([output.metrics["grad_norm"].float() for output in self.outputs])
        means.append(torch.where(skipped > 0, 0.0, norms).max())
        row = torch.stack([*means, skipped.sum(), losses.new_tensor(float(len(self.broken)))])
        total = all_reduce_sum(torch.cat([row, losses]).to(device, torch.float64)).tolist()
        world = world_size()
        result = {name: value / world for name, value in zip(["loss", *names, "grad_norm_max", "skipped"], total, strict=False)}
        result["broken"] = total[len(row) - 1]
        elapsed = time.perf_counter() - self.started
        shares = {name: seconds / elapsed for name, seconds in self._stopwatch.take().items()}
        return Window(result, [value / world for value in total[len(row):]], shares, self.images / elapsed)


def _mean_of_taken(values: Tensor, skipped: Tensor) -> Tensor:
    """A skipped step has no finite values; they would hide those of the others."""
    taken = skipped == 0
    total = torch.where(taken, values, 0.0).sum() / taken.sum().clamp(min=1)
    return torch.where(taken.any(), total, float("nan"))
