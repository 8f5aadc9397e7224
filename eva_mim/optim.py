"""Parameter groups, and the learning rate and weight decay of each step."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from eva_mim.config import Settings, UserError
from eva_mim.contracts import Rates

if TYPE_CHECKING:
    from torch import nn

TOP = ("norm.", "rel_pos_bias.")
"""Trunk parameters at the top layer for EVA (EVA-01/eva/optim_factory.py); timm counts them to the last block and the stem."""


class OptimSettings(Settings):
    """AdamW with warm-up and decay."""

    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate at this run's global batch (never rescaled)."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate that the schedule ends at."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 1.0
    """Linear rise from 0 to `lr`."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of the rise, in place of `warmup_epochs`."""
    warmup: Literal["linear", "inclusive"] = "linear"
    """Update `step` of W warm-up steps has "linear": (step + 1) / W of the peak (EVA-CLIP); "inclusive": step / (W - 1), so
    that the first changes nothing and both step W - 1 and step W have the peak (EVA-01 and EVA-02, utils.py)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """From `lr` to `min_lr` after warm-up. A cosine reaches `min_lr` one step after the last, a line at the last."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    weight_decay_end: Annotated[float, Field(ge=0.0)] | None = None
    """Weight decay that a cosine over all steps ends at; default constant."""
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


def rates_at(step: int, settings: OptimSettings, *, steps_per_epoch: int, epochs: float) -> Rates:
    """Learning rate and weight decay of update `step` (from 0)."""
    lr = lr_at(step, settings, steps_per_epoch=steps_per_epoch, epochs=epochs)
    if settings.weight_decay_end is None:
        return Rates(lr, settings.weight_decay)
    return Rates(lr, _cosine(settings.weight_decay, settings.weight_decay_end, step, round(epochs * steps_per_epoch)))


def lr_at(step: int, settings: OptimSettings, *, steps_per_epoch: int, epochs: float) -> float:
    """Learning rate of update `step` (from 0): warm-up, then the schedule over the steps that are left."""
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


def parameter_groups(student: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """AdamW groups with `params`, `weight_decay`, `decays` and `lr_scale`, by BEiT's rule as in EVA-01/eva/optim_factory.py.

    Vectors, biases and the trunk's own list (positions, class token) do not decay; relative position tables do, though timm
    lists them, and so does a mask token. Outside the trunk, `student.stem_parameters` are at its layer 0 and all else is at
    the top. Raises UserError when layers shall differ and the architecture does not say its layers.
    """
    trunk: Any = student.trunk
    inside = {id(parameter): name for name, parameter in trunk.named_parameters()}
    listed = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()
    exempt = [pattern for pattern in listed if not pattern.endswith("relative_position_bias_table")]
    scales = _lr_scales(trunk, settings.layer_decay)
    stem = getattr(student, "stem_parameters", ())
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        own = inside.get(id(parameter))  # the trunk's name for it; None outside
        decays = parameter.ndim > 1 and not name.endswith(".bias")
        decays = decays and not (own and any(fnmatch(own, pattern) for pattern in exempt))
        scale = scales.get(own, 1.0) if own else min(scales.values(), default=1.0) if name in stem else 1.0
        weight_decay = settings.weight_decay if decays else 0.0
        group = {"params": [], "weight_decay": weight_decay, "decays": decays, "lr_scale": scale}
        groups.setdefault((scale, decays), group)["params"].append(parameter)
    return list(groups.values())


def _lr_scales(trunk: Any, layer_decay: float) -> dict[str, float]:
    """Scale of each of the trunk's parameters that lies below the top."""
    from timm.models._manipulate import group_with_matcher

    if layer_decay == 1:
        return {}
    if not hasattr(trunk, "group_matcher"):
        raise UserError(f"optim.layer_decay={layer_decay}: {type(trunk).__name__} does not say its layers; set it to 1")
    # No matcher knows the name "top", so it shows which layer id timm gives to what stands above all layers.
    names = [name for name, _ in trunk.named_parameters() if not name.startswith(TOP)] + ["top"]
    layers = group_with_matcher(((name, None) for name in names), trunk.group_matcher(coarse=False), reverse=True)
    return {name: layer_decay ** (layers["top"] - layer) for name, layer in layers.items() if name != "top"}
