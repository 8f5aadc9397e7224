"""Parameter groups and the learning rate of each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from eva_mim.config import Settings

if TYPE_CHECKING:
    from torch import nn


class OptimSettings(Settings):
    """AdamW with warm-up and cosine decay."""

    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate at this run's global batch (never rescaled)."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate that the cosine ends at."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    """Linear rise from 0 to `lr`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0.0)] = 1e-6
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Factor on the learning rate per layer below the head: layer id of D + 1 gets layer_decay^(D + 1 - id)."""
    clip_grad: Annotated[float, Field(gt=0.0)] | None = 3.0
    """Largest global gradient norm; null for none."""

    @model_validator(mode="after")
    def _ends_below(self) -> OptimSettings:
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}")
        return self


def lr_at(step: int, settings: OptimSettings, *, steps_per_epoch: int, epochs: float) -> float:
    """Learning rate of update `step` (from 0): (step + 1) / W of the peak during W warm-up steps, then a half cosine
    that reaches `min_lr` after the last step."""
    total, warmup = round(epochs * steps_per_epoch), round(settings.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return settings.min_lr + 0.5 * (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(student: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """AdamW groups with `weight_decay` and `lr_scale`.

    The trunk's groups are timm's (BEiT's rule: no decay for vectors and for the model's own list, EVA-01/eva/optim_factory.py);
    every other parameter of the student is at the top (scale 1) and follows the same decay rule.
    """
    from timm.optim import param_groups_layer_decay

    trunk: Any = student.trunk
    exempt = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else set()
    groups: list[dict[str, Any]] = [
        {"params": list(group["params"]), "weight_decay": group["weight_decay"], "lr_scale": group["lr_scale"]}
        for group in param_groups_layer_decay(
            trunk,
            weight_decay=settings.weight_decay,
            no_weight_decay_list=exempt,
            layer_decay=settings.layer_decay,
        )
    ]
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [p for p in student.parameters() if p.requires_grad and id(p) not in taken]
    for decay, params in (
        (settings.weight_decay, [p for p in rest if p.ndim > 1]),
        (0.0, [p for p in rest if p.ndim <= 1]),
    ):
        groups.append({"params": params, "weight_decay": decay, "lr_scale": 1.0})
    return [group for group in groups if group["params"]]
