"""`eva-mim bench resume`: what a checkpoint costs a run, and how long it takes to go on from one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel

from eva_mim.commands import program_of
from eva_mim.core.errors import REQUEUE, UserError
from eva_mim.core.files import write_text
from eva_mim.core.log import say
from eva_mim.core.run_folder import RunFolder

SAVES, EVERY = 3, 2
"""Checkpoints of the first run, and steps between them."""
OFTEN = 0.05
"""Share of a run's time that its checkpoints should not exceed."""


class ResumeSpeed(BaseModel, extra="forbid", frozen=True):
    """Figures of saving and going on, of one process on one machine."""

    recipe: str
    program: str
    overrides: list[str]
    bytes_saved: int
    """Size of a checkpoint."""
    step: float
    """Seconds of a step, the median."""
    held: float
    """Seconds for which a save holds training, the median."""
    first_step: float
    """Seconds from the start of the program to the end of its first step from a checkpoint."""

    def report(self) -> str:
        """Returns the figures as text of 80 columns."""
        steps = self.held / OFTEN / self.step
        return (f"a checkpoint: {self.bytes_saved / 1e6:.4g} MB, training held for {self.held:.3g} s, "
                f"{self.held / self.step:.2g} steps\n"
                f"from the start of the program to the end of its first step: {self.first_step:.3g} s\n\n"
                f"With run.checkpoint_every={max(1, round(steps))} and more, saving takes less than {OFTEN:.0%} of the time.\n")


def measure_resume(program: str | None, path: str, overrides: Sequence[str], folder: Path | None, to: Path | None) -> None:
    """Trains a recipe for a few steps in a temporary folder, stops it, and goes on. Raises UserError if that fails."""
    program = program_of(path, program)
    home = Path(tempfile.mkdtemp(prefix="eva-mim-bench-", dir=folder))
    line = [sys.executable, "-m", "eva_mim.cli", program, path, *overrides, "run.log_every=1", f"run.checkpoint_every={EVERY}",
            "run.keep_last=1", "--out", str(home / "run")]
    say(f"  {SAVES * EVERY} steps with checkpoints in {home}, then from the last of them")
    try:
        _until(line, home, SAVES * EVERY + 1)
        rows = _rows(home)
        first_step = _until(line, home, len(rows) + 1)
        found = RunFolder(home / "run").latest()
        assert found is not None
        size = sum(file.stat().st_size for file in found[1].iterdir())
    finally:
        shutil.rmtree(home, ignore_errors=True)
    seconds = [row["samples"] / row["step"] / row["images_per_s"] for row in rows]
    shares = [row.get("time_checkpoint", 0.0) for row in rows]
    held = [share * spent for share, spent in zip(shares, seconds, strict=True) if share]
    plain = [spent for share, spent in zip(shares[1:], seconds[1:], strict=True) if not share]
    result = ResumeSpeed(recipe=path, program=program, overrides=list(overrides), bytes_saved=size, step=median(plain),
                         held=median(held), first_step=first_step)
    sys.stdout.write(result.report())
    if to is not None:
        write_text(to, result.model_dump_json(indent=1) + "\n")


def _until(line: list[str], home: Path, count: int) -> float:
    """Starts a run, stops it by SIGTERM when it has logged so many steps; returns the seconds until then. Raises UserError, with
    its last lines, if it ends before."""
    began = time.monotonic()
    with (home / "said").open("w") as said:
        process = subprocess.Popen(line, stdout=said, stderr=said)
        try:
            while len(_rows(home)) < count and process.poll() is None:
                time.sleep(0.01)
            took = time.monotonic() - began
            process.send_signal(signal.SIGTERM)
            code = process.wait()
        finally:
            process.kill()
    if code == 0:
        raise UserError(f"the run ends after {len(_rows(home))} steps, and more than {count} are measured; raise run.epochs")
    if code != REQUEUE:
        last = (home / "said").read_text().strip().splitlines()[-5:]
        raise UserError(f"the run ended with exit code {code}:\n  " + "\n  ".join(last))
    return took


def _rows(home: Path) -> list[dict[str, Any]]:
    """Returns the log lines of all steps."""
    return [row for row in map(json.loads, RunFolder(home / "run").log_lines()) if row["kind"] == "train"]
