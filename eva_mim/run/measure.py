"""Held-out figures of a student, and of its average where one is kept: in a training run, and of a checkpoint alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from eva_mim.core.contracts import Evaluator
from eva_mim.core.timing import Stopwatch, measuring
from eva_mim.engine import RunSettings

EMA = "ema"
"""Part of a checkpoint, prefix of figures ("ema_top1") and folder of a run for the average of the weights."""


def average_of(module: nn.Module, run: RunSettings) -> Any:
    """The exponential moving average that a run keeps of its student; None without `run.ema_decay`."""
    return None if run.ema_decay is None else ModelEmaV3(module, decay=run.ema_decay, use_warmup=run.ema_warmup)


@torch.no_grad()
def measure(evaluator: Evaluator, student: nn.Module, average: Any, autocast: Callable[[], Any]) -> dict[str, float]:
    """Figures of the student, and with the prefix "ema_" of its average. Every rank must call, with a full module."""
    figures: dict[str, float] = {}
    with measuring(Stopwatch()):  # its teacher and student passes are none of a step's
        for prefix, module in (("", student), (f"{EMA}_", average and average.module)):
            if module is not None:
                module.eval()
                figures |= {prefix + name: value for name, value in evaluator(module, autocast).items()}
                module.train()
    return figures
