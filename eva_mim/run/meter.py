"""Figures between two log lines. Tensors stay on the device until the log line is due."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eva_mim.core.distributed import all_reduce_sum, world_size
from eva_mim.core.losses import StepOutput
from eva_mim.core.timing import Stopwatch

Row = dict[str, float]
"""Figures of a step by name."""


@dataclass(frozen=True)
class Window:
    """Figures since the last log line, over all ranks."""

    figures: dict[str, float]
    """Means over the steps that were not skipped; `skipped` and `broken` are sums, `loss_scale` is the last value,
    `grad_norm_max` the largest `grad_norm`."""
    losses: list[float]
    """Loss of each step, which may be NaN or infinite in a skipped step."""
    shares: dict[str, float]
    """Share of the main rank's time by phase."""
    images_per_s: float


class Meter:
    """Collects the figures of one window. `earlier` are the rows of a window that a stopped run had begun."""

    def __init__(self, stopwatch: Stopwatch, earlier: Sequence[Row] = ()) -> None:
        self._stopwatch, self._earlier = stopwatch, earlier
        self.started = time.perf_counter()
        self.images = 0
        self.outputs: list[StepOutput] = []
        self.broken: list[str] = []

    def rows(self, device: torch.device) -> list[Row]:
        """Returns loss and metrics of each step, means over ranks. It waits for the device; every rank must call."""
        steps = [{"loss": output.loss} | output.metrics for output in self.outputs]
        if not steps:
            return list(self._earlier)
        local = torch.stack([value.float() for step in steps for value in step.values()])
        values = iter((all_reduce_sum(local.to(device, torch.float64)) / world_size()).tolist())
        return [*self._earlier, *({name: next(values) for name in step} for step in steps)]

    def broken_everywhere(self, device: torch.device) -> int:
        """Returns the number of broken images of the window over all ranks. Every rank must call."""
        return int(all_reduce_sum(torch.tensor(len(self.broken), device=device)))

    def read(self, device: torch.device) -> Window:
        """Returns the figures of the window. Here the host waits for the device; every rank must call."""
        rows = self.rows(device)
        # Skipped steps are left out, since their values are not finite.
        taken = [row for row in rows if not row["skipped"]]
        figures = {}
        for name in sorted({name for row in rows for name in row} - {"skipped"}):
            values = [row[name] for row in taken if name in row]
            figures[name] = sum(values) / len(values) if values else math.nan
        if "loss_scale" in figures:
            figures["loss_scale"] = rows[-1]["loss_scale"]
        figures["grad_norm_max"] = max((row["grad_norm"] for row in taken), default=0.0)
        figures["skipped"] = float(len(rows) - len(taken))
        figures["broken"] = float(self.broken_everywhere(device))
        elapsed = time.perf_counter() - self.started
        shares = {name: seconds / elapsed for name, seconds in self._stopwatch.take().items()}
        return Window(figures, [row["loss"] for row in rows], shares, self.images / elapsed)
