"""Logs of a run: lines on the terminal, `metrics.jsonl` (the authoritative record) and TensorBoard scalars."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from eva_mim.core.distributed import is_main
from eva_mim.core.files import write_text
from eva_mim.core.run_folder import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

SAY_EVERY = 10.0
"""Seconds between progress lines."""


def say(text: str = "", file: TextIO | None = None) -> None:
    """Writes one line to the terminal, on the main rank only."""
    if is_main():
        (file or sys.stderr).write(text + "\n")
        (file or sys.stderr).flush()


def duration(seconds: float) -> str:
    """Returns a duration as text: `42s`, `3m05s` or `2h07m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """Prints progress lines of a long task. `total` is its number of items, None if unknown; `done` of them were done before."""

    def __init__(self, what: str, total: int | None = None, done: int = 0):
        self._what, self._total, self._done, self._first = what, total, done, done
        self._began = self._told = time.monotonic()

    def advance(self, more: int = 1) -> None:
        """Adds to the number of finished items."""
        self._done += more
        if (now := time.monotonic()) - self._told < SAY_EVERY:
            return
        self._told, speed = now, (self._done - self._first) / (now - self._began)
        if self._total is None:
            say(f"  {self._what}: {self._done} so far, {speed:.1f}/s")
        else:
            left = duration((self._total - self._done) / speed) if speed else "unknown"
            say(f"  {self._what}: {self._done} of {self._total}, {speed:.1f}/s  left {left}")


class RunLog:
    """Metrics of one run. On resume, records after `step` are removed, in TensorBoard too, so that curves never overlap."""

    def __init__(self, folder: Path, step: int):
        run = RunFolder(folder)
        self.path = run.metrics
        self._file: TextIO | None = None
        self._board: Any = None
        if not is_main():
            return
        kept = [line for line in run.log_lines() if json.loads(line)["step"] <= step] if step else []
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def write(self, kind: str, step: int, samples: int, values: dict[str, float]) -> None:
        """Appends one record; `kind` is "start" (of a process), "train", "eval", "final" (in fp32) or "rewind".

        NaN and infinity are written as null.
        """
        if self._file is None:
            return
        record: dict[str, Any] = {"kind": kind, "step": step, "samples": samples, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def draw(self, name: str, step: int, picture: Image) -> None:
        """Adds a picture to TensorBoard."""
        if self._board is not None:
            import numpy as np

            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def flush(self) -> None:
        """Flushes both logs to disk, so that no checkpoint is newer than they are."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Closes both logs."""
        if self._file is not None:
            self._file.close()
            self._board.close()
