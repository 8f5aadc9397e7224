"""Starts `eva-mim` with poisoned samples: python -m tests.poison 3,17 mim recipe.yaml ... (under torchrun as well).

A micro-batch with one of these samples (or any, for "all") has a NaN loss in mim and clip, and NaN pixels in classify, on
whichever rank it lies. POISON_SCALE sets the first loss scale of fp16, POISON_WINDOW the good steps after which it doubles, and
POISON_DISK the seconds that a flush to the disk takes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from eva_mim.cli import main as eva_mim
from eva_mim.core.contracts import Batch, StepOutput
from eva_mim.engine import base as step
from eva_mim.run.program import leave
from eva_mim.tasks.contrastive import ImageText
from eva_mim.tasks.labels import Labels
from eva_mim.tasks.masked import MaskedFeatures


def main() -> int:
    """Poison the task, then run the command."""
    bad = sys.argv[1]
    samples = {int(text) for text in bad.split(",")} if bad not in ("all", "none") else set()
    healthy: dict[type[Any], Callable[..., StepOutput]] = {kind: kind.loss for kind in (MaskedFeatures, ImageText)}

    def ill(batch: Batch) -> bool:
        return bad == "all" or not samples.isdisjoint(batch.index.tolist())

    def loss(self: Any, student: Callable[..., Any], batch: Batch) -> StepOutput:
        output = healthy[type(self)](self, student, batch)
        return StepOutput(output.loss * float("nan"), output.metrics) if ill(batch) else output

    read = Labels.loss

    def labels_loss(self: Labels, student: Callable[..., Any], batch: Batch) -> StepOutput:
        return read(self, student, replace(batch, images=batch.images.float() * float("nan")) if ill(batch) else batch)

    MaskedFeatures.loss = ImageText.loss = loss  # type: ignore[method-assign]
    Labels.loss = labels_loss  # type: ignore[method-assign]
    step.SCALE_START = float(os.environ.get("POISON_SCALE", step.SCALE_START))
    step.SCALE_WINDOW = int(os.environ.get("POISON_WINDOW", step.SCALE_WINDOW))
    fsync, seconds = os.fsync, float(os.environ.get("POISON_DISK", 0.0))
    os.fsync = lambda number: (time.sleep(seconds), fsync(number))[1]
    return eva_mim(sys.argv[2:])


if __name__ == "__main__":
    leave(main())
