"""When masked pretraining spikes: count skipped steps, find the way around bad samples, and notice jumps of the loss."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eva_mim.core.contracts import Batch, TrainData
from eva_mim.core.files import write_json
from eva_mim.core.run_folder import RunFolder

SPIKE_SIGMAS = 6.0
"""A step whose loss lies so many standard deviations above its running mean is called a spike."""
SPIKE_MEMORY = 0.98
"""Decay of the running mean and variance of the loss: about the last 50 steps."""
SPIKE_PATIENCE = 50
"""Steps before the alarm listens: the loss of a fresh student falls fast."""


class SkipCounter:
    """Skipped steps in a row. A flag is read when the next step has been queued: the device has it ready by then, so
    nothing waits, and on every device the answer comes after the same step."""

    def __init__(self) -> None:
        self.length = 0
        self._waiting: deque[tuple[Tensor, Any]] = deque()

    def note(self, skipped: Tensor) -> None:
        """The flag of the step just queued."""
        if skipped.device.type != "cuda":
            self._waiting.append((skipped, None))
        else:
            host = torch.empty(skipped.shape, dtype=skipped.dtype, pin_memory=True)
            host.copy_(skipped, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._waiting.append((host, event))
        while len(self._waiting) > 1:
            self._read()

    def settle(self) -> int:
        """The streak with every flag read (waits for the device)."""
        while self._waiting:
            self._read()
        return self.length

    def clean(self) -> bool:
        """The newest step was not skipped (waits for the device)."""
        if not self._waiting:
            return self.length == 0
        flag, event = self._waiting[-1]
        if event is not None:
            event.synchronize()
        return not bool(flag)

    def _read(self) -> None:
        flag, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        self.length = self.length + 1 if bool(flag) else 0


class SkippedData:
    """Data steps that are left out after rewinds. Kept beside the checkpoints, so that a resumed run knows them.

    A data step is a global batch by its position in the endless order of samples; the optimizer's step is the number of
    updates. They are equal until the first detour.
    """

    def __init__(self, out: Path, main: bool):
        self._file, self._main = RunFolder(out).skipped_data, main
        self.rewinds = 0
        self.left_out: list[tuple[int, int]] = []
        """First and last data step of each detour, rising."""

    def load(self) -> None:
        """Read the data steps that an earlier process of the run left out."""
        if self._file.is_file():
            record = json.loads(self._file.read_text())
            self.rewinds, self.left_out = record["rewinds"], [(first, last) for first, last in record["left_out"]]

    def forget(self) -> None:
        """The run starts from the beginning."""
        if self._main:
            self._file.unlink(missing_ok=True)

    def add(self, first: int, last: int) -> None:
        """Leave data steps first .. last out from now on."""
        self.rewinds += 1
        self.left_out = sorted([*self.left_out, (first, last)])
        if self._main:
            write_json(self._file, {"rewinds": self.rewinds, "left_out": self.left_out})

    def position(self, step: int) -> int:
        """The data step of an optimizer step."""
        for first, last in self.left_out:
            if step >= first:
                step += last - first + 1
        return step

    def stream(self, train: TrainData, first: int, last: int) -> Iterator[tuple[int, list[Batch]]]:
        """(data step, micro-batches) of optimizer steps first .. last - 1."""
        step = first
        while step < last:
            start = self.position(step)
            barrier = min((a for a, _ in self.left_out if a > start), default=start + last - step)
            end = min(barrier, start + last - step)
            for offset, batches in enumerate(train.steps(start, end)):
                yield start + offset, batches
            step += end - start


class SpikeAlarm:
    """Running mean and variance of the loss, step by step; fed when a log line is due."""

    def __init__(self) -> None:
        self.mean, self.variance, self.seen, self.spikes = 0.0, 0.0, 0, 0

    def state(self) -> list[float]:
        """For a checkpoint."""
        return [self.mean, self.variance, self.seen, self.spikes]

    def restore(self, state: list[Any]) -> None:
        """Put back a state that `state` returned."""
        self.mean, self.variance, self.seen, self.spikes = state

    def feed(self, losses: list[float]) -> list[float]:
        """The losses among these that are spikes; steps that were not finite count as none."""
        found = []
        for loss in losses:
            if not math.isfinite(loss):
                continue
            deviation = loss - self.mean
            if self.seen >= SPIKE_PATIENCE and deviation > SPIKE_SIGMAS * math.sqrt(self.variance):
                found.append(loss)
            keep = min(SPIKE_MEMORY, self.seen / (self.seen + 1))
            self.mean += (1 - keep) * deviation
            self.variance = keep * (self.variance + (1 - keep) * deviation**2)
            self.seen += 1
        self.spikes += len(found)
        return found
