"""Learning rate and weight decay of each step."""

from __future__ import annotations

import math

from eva_mim.core.contracts import Rates
from eva_mim.optim import OptimSettings


def rates_at(step: int, settings: OptimSettings, *, steps_per_epoch: int, epochs: float) -> Rates:
    """Returns the rates of update `step` (from 0)."""
    lr, decay = lr_at(step, settings, steps_per_epoch=steps_per_epoch, epochs=epochs), settings.weight_decay
    if settings.weight_decay_end is not None:
        decay = _cosine(decay, settings.weight_decay_end, step, round(epochs * steps_per_epoch))
    return Rates(lr, decay, heads_alone=step < settings.heads.alone)


def lr_at(step: int, settings: OptimSettings, *, steps_per_epoch: int, epochs: float) -> float:
    """Returns the learning rate of update `step` (from 0): warm-up, then the schedule over the remaining steps."""
    given = settings.warmup_steps
    warmup = round(settings.warmup_epochs * steps_per_epoch) if given is None else given
    if step < warmup:
        risen = (step + 1) / warmup if settings.warmup == "linear" else step / max(1, warmup - 1)
        return settings.lr * risen
    done, steps = step - warmup, round(epochs * steps_per_epoch) - warmup
    if settings.schedule == "linear":
        return settings.lr + (settings.min_lr - settings.lr) * min(1.0, done / max(1, steps - 1))
    return _cosine(settings.lr, settings.min_lr, done, steps)


def _cosine(start: float, end: float, done: int, steps: int) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(1.0, done / max(1, steps))))
