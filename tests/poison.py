"""Starts `eva-mim` with poisoned samples: python -m tests.poison 3,17 mim recipe.yaml ... (under torchrun as well).

A micro-batch with one of these samples (or any, for "all") has a NaN loss in mim and clip, and NaN pixels in classify, on
whichever rank it lies. POISON_SCALE sets the first loss scale of fp16, POISON_WINDOW the good steps after which it doubles, and
POISON_DISK the seconds that a flush to the disk takes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from eva_mim.cli import main as eva_mim
from eva_mim.core.batches import Batch
from eva_mim.core.losses import StepOutput
from eva_mim.engine import loss_scale as step
from eva_mim.run.program import leave
from eva_mim.tasks.contrastive import ImageText
from eva_mim.tasks.labels import Labels
from eva_mim.tasks.masked import MaskedFeatures


def main(argv: Sequence[str]) -> int:
    """Poison the task, run the command, and take the poison out again."""
    bad = argv[0]
    samples = {int(text) for text in bad.split(",")} if bad not in ("all", "none") else set()
    healthy: dict[type[Any], Callable[..., StepOutput]] = {kind: kind.loss for kind in (MaskedFeatures, ImageText, Labels)}

    def ill(batch: Batch) -> bool:
        return bad == "all" or not samples.isdisjoint(batch.index.tolist())

    def loss(self: Any, student: Callable[..., Any], batch: Batch) -> StepOutput:
        output = healthy[type(self)](self, student, batch)
        poisoned = {name: term._replace(mean=term.mean * float("nan")) for name, term in output.terms.items()}
        return output._replace(terms=poisoned) if ill(batch) else output

    def labels_loss(self: Labels, student: Callable[..., Any], batch: Batch) -> StepOutput:
        images = batch.images.float() * float("nan") if ill(batch) else batch.images
        return healthy[Labels](self, student, replace(batch, images=images))

    fsync, seconds = os.fsync, float(os.environ.get("POISON_DISK", 0.0))
    with ExitStack() as poison:
        for owner, name, value in (
            (MaskedFeatures, "loss", loss), (ImageText, "loss", loss), (Labels, "loss", labels_loss),
            (step, "SCALE_START", float(os.environ.get("POISON_SCALE", step.SCALE_START))),
            (step, "SCALE_WINDOW", int(os.environ.get("POISON_WINDOW", step.SCALE_WINDOW))),
            (os, "fsync", lambda number: (time.sleep(seconds), fsync(number))[1]),
        ):  # fmt: skip
            poison.enter_context(patch.object(owner, name, value))
        return eva_mim(list(argv[1:]))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
