"""Held-out figures of a student, and of the average of its weights if there is one: in a training run or from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from eva_mim.core.contracts import Autocast, Evaluator
from eva_mim.core.timing import Stopwatch, measuring
from eva_mim.engine import RunSettings

EMA = "ema"
"""Name of the average of the weights: of its state group in a checkpoint, folder in a run, and prefix of figures ("ema_top1")."""
EXACT = "fp32"
"""Precision of the final figures, in which other programs measure the exported weights."""


def average_of(module: nn.Module, run: RunSettings) -> Any:
    """Returns the exponential moving average of a student's weights for a run; None without `run.ema_decay`."""
    return None if run.ema_decay is None else ModelEmaV3(module, decay=run.ema_decay, use_warmup=run.ema_warmup)


@torch.no_grad()
def measure(evaluator: Evaluator, student: nn.Module, average: Any, autocast: Autocast) -> dict[str, float]:
    """Returns the figures of the student, and with the prefix "ema_" those of its average. Every rank must call, with unsharded
    modules."""
    figures: dict[str, float] = {}
    with measuring(Stopwatch()):  # teacher and student passes here do not count as phases of a step
        for prefix, module in (("", student), (f"{EMA}_", average and average.module)):
            if module is not None:
                module.eval()
                figures |= {prefix + name: value for name, value in evaluator(module, autocast).items()}
                module.train()
    return figures
