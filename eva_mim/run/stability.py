"""Stability of a run: counting skipped steps, leaving out the data of failed steps, and detecting spikes of the loss."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import TrainData
from eva_mim.core.distributed import run_on_main
from eva_mim.core.files import write_json
from eva_mim.core.run_folder import RunFolder

SPIKE_SIGMAS = 6.0
"""Number of standard deviations above the running mean from which a loss is a spike."""
SPIKE_MEMORY = 0.98
"""Decay of the running mean and variance of the loss: about the last 50 steps."""
SPIKE_PATIENCE = 50
"""Number of first steps without spike detection, while the loss of a new student falls fast."""


class SkipCounter:
    """Counts consecutive skipped steps. The flag of a step is read after the next step has been queued: the device has computed
    it by then, so the host does not wait, and on every device the count changes after the same step."""

    def __init__(self) -> None:
        self.length = 0
        self._waiting: deque[tuple[Tensor, Any]] = deque()

    def note(self, skipped: Tensor) -> None:
        """Adds the flag (scalar, 1 for skipped) of the step just queued, and reads all earlier flags."""
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
        """Reads all flags and returns the number of consecutive skipped steps (waits for the device)."""
        while self._waiting:
            self._read()
        return self.length

    def clean(self) -> bool:
        """Returns True if the newest step was not skipped (waits for the device)."""
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
    """Data steps that are left out after rewinds. They are stored in the run's folder, from which a resumed run reads them.

    A data step is the position of a global batch in the endless order of samples; the optimizer's step is the number of
    updates. Both are equal until the first detour.
    """

    def __init__(self, out: Path, main: bool):
        self._file, self._main = RunFolder(out).skipped_data, main
        self.rewinds = 0
        self.left_out: list[tuple[int, int]] = []
        """First and last data step of each detour, rising."""

    def load(self) -> None:
        """Loads the data steps that an earlier process of the run left out. The main rank reads them and tells the others, whose
        hosts may not see a new file of a network disk yet. Every rank must call."""
        record = run_on_main(lambda: json.loads(self._file.read_text()) if self._file.is_file() else None)
        if record is not None:
            self.rewinds, self.left_out = record["rewinds"], [(first, last) for first, last in record["left_out"]]

    def forget(self) -> None:
        """Removes the file of an earlier run in this folder."""
        if self._main:
            self._file.unlink(missing_ok=True)

    def add(self, first: int, last: int) -> None:
        """Adds a detour: data steps first .. last are left out from now on."""
        self.rewinds += 1
        self.left_out = sorted([*self.left_out, (first, last)])
        if self._main:
            write_json(self._file, {"rewinds": self.rewinds, "left_out": self.left_out})

    def position(self, step: int) -> int:
        """Returns the data step of an optimizer step."""
        for first, last in self.left_out:
            if step >= first:
                step += last - first + 1
        return step

    def stream(self, train: TrainData, first: int, last: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yields (data step, micro-batches) of optimizer steps first .. last - 1."""
        step = first
        while step < last:
            start = self.position(step)
            barrier = min((a for a, _ in self.left_out if a > start), default=start + last - step)
            end = min(barrier, start + last - step)
            for offset, batches in enumerate(train.steps(start, end)):
                yield start + offset, batches
            step += end - start


class SpikeAlarm:
    """Detects spikes of the loss by its running mean and variance, which are updated at each log line."""

    def __init__(self) -> None:
        self.mean, self.variance, self.seen, self.spikes = 0.0, 0.0, 0, 0

    def state(self) -> list[float]:
        """Returns the state for a checkpoint: mean, variance, number of steps, number of spikes."""
        return [self.mean, self.variance, self.seen, self.spikes]

    def restore(self, state: list[Any]) -> None:
        """Restores a state that `state` returned."""
        self.mean, self.variance, self.seen, self.spikes = state

    def feed(self, losses: list[float]) -> list[float]:
        """Updates mean and variance with the losses of the next steps; returns those that are spikes. Losses that are not finite
        are ignored."""
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
