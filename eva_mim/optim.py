"""Parameter groups, and the learning rate and weight decay of each step."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from eva_mim.config import Settings, UserError
from eva_mim.contracts import Rates
from eva_mim.students import Tower

if TYPE_CHECKING:
    from torch import nn

TOP = ("norm.", "rel_pos_bias.")
"""Trunk parameters at the top layer for EVA (EVA-01/eva/optim_factory.py); timm counts them to the last block and the stem."""


class TowerSettings(Settings):
    """What one tower of a CLIP student has of its own; null: the general value."""

    lr: Annotated[float, Field(gt=0.0)] | None = None
    """Peak; the schedule has the same form for all, and ends at the same share of the peak."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None


class LambSettings(Settings):
    """LAMB (You et al. 2020): a step of Adam, made as long as the tensor's norm (times the learning rate).

    Defaults are those of DeepSpeed's LAMB, which EVA-CLIP uses. It differs in one place: DeepSpeed corrects the bias of the
    moments on the whole step, so that its first steps are shorter; here it is corrected on the moments, as in the paper and in
    timm. timm's limits nothing and leaves tensors alone that do not decay (`trust: null`, `adapt: decayed`).
    """

    trust: tuple[Annotated[float, Field(ge=0.0)], Annotated[float, Field(gt=0.0)]] | None = (0.01, 10.0)
    """Limits of norm of the tensor / norm of its update; null for none."""
    adapt: Literal["all", "decayed"] = "all"
    """Tensors whose step gets this length; the others take Adam's."""


class LarsSettings(Settings):
    """LARS (You et al. 2017) in the form of MoCo v3 and MAE, as in EVA's linear probe: momentum over a gradient that is made as
    long as the tensor's norm, times `trust`. Vectors and biases take the gradient as it is. Batch sizes scale nothing."""

    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    trust: Annotated[float, Field(gt=0.0)] = 0.001
    """Length of a matrix's gradient over the length of the matrix."""


class OptimSettings(Settings):
    """Optimizer, with warm-up and decay."""

    optimizer: Literal["adamw", "lamb", "lars"] = "adamw"
    """LAMB and LARS compare whole tensors, so they need run.zero_stage=0: higher stages cut them up. (EVA-CLIP's released runs
    used LAMB with stage 1, so that one ratio held for whatever of a parameter group lay on a rank.) LARS is for linear probes; it
    has no use for `betas` and `eps`."""
    lamb: LambSettings = LambSettings()
    lars: LarsSettings = LarsSettings()
    lr: Annotated[float, Field(gt=0.0)]
    """Peak learning rate at this run's global batch (never rescaled)."""
    image: TowerSettings = TowerSettings()
    """The image tower of a CLIP student, with its projection into the shared space."""
    text: TowerSettings = TowerSettings()
    """The text tower, with its projection. The logit scale and bias are in neither and have the general values."""
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
        if self.lamb.trust and self.lamb.trust[0] > self.lamb.trust[1]:
            raise ValueError(f"optim.lamb.trust={list(self.lamb.trust)}: the first is the lower limit")
        for tower in ("image", "text"):
            own = getattr(self, tower).weight_decay
            if own and not self.weight_decay:
                raise ValueError(f"optim.{tower}.weight_decay={own} follows the schedule of optim.weight_decay, which is 0")
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


def check_sharding(settings: OptimSettings, zero_stage: int) -> None:
    """Raises UserError where the optimizer would see pieces of tensors."""
    if settings.optimizer != "adamw" and zero_stage:
        raise UserError(
            f"optim.optimizer={settings.optimizer} compares the norms of whole tensors, which run.zero_stage={zero_stage} "
            "cuts up; set run.zero_stage=0 or optim.optimizer=adamw"
        )


class _Rule(NamedTuple):
    lr_scale: float
    decays: float


def parameter_groups(student: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Optimizer groups with `params`, `weight_decay`, `decays` and `lr_scale`: of what trains, by BEiT's rule as in
    EVA-01/eva/optim_factory.py and EVA-CLIP/rei/training/optim.py.

    `lr_scale` and `decays` are factors on the rates of a step. Vectors, biases and the towers' own lists (positions, class
    token) do not decay; relative position tables do, though timm lists them, and so does a mask token. A student without
    `towers()` has one, its trunk. Outside the towers, `student.stem_parameters` are at layer 0 and all else is at the top, where
    `student.lr_scales` may give a parameter a factor by its name (the layers of a probe).
    Raises UserError when layers shall differ and the architecture does not say its layers.
    """
    rules: dict[int, _Rule] = {}
    towers = _towers(student)
    for name in ("image", "text"):
        if name not in towers and getattr(settings, name) != TowerSettings():
            raise UserError(f"optim.{name}: this student has no {name} tower; leave it out")
    for name, tower in towers.items():
        rules |= _rules(name, tower, settings)
    lowest = min((rule.lr_scale for rule in rules.values()), default=1.0)
    scales = dict.fromkeys(getattr(student, "stem_parameters", ()), lowest) | getattr(student, "lr_scales", {})
    groups: dict[_Rule, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        own = rules.get(id(parameter))
        rule = own or _Rule(scales.get(name, 1.0), float(_is_matrix(name, parameter)))
        group = {"params": [], "weight_decay": settings.weight_decay * rule.decays, **rule._asdict()}
        groups.setdefault(rule, group)["params"].append(parameter)
    return list(groups.values())


def _is_matrix(name: str, parameter: Any) -> bool:
    return bool(parameter.ndim > 1 and not f".{name}".endswith(".bias"))


def _towers(student: Any) -> dict[str, Tower]:
    if hasattr(student, "towers"):
        towers: dict[str, Tower] = student.towers()
        return towers
    return {"trunk": Tower.of_timm(student.trunk)}


def _rules(name: str, tower: Tower, settings: OptimSettings) -> dict[int, _Rule]:
    """The rule of each of a tower's parameters, by its id."""
    own: TowerSettings = getattr(settings, name, TowerSettings())
    peak = 1.0 if own.lr is None else own.lr / settings.lr
    decays = 1.0 if own.weight_decay is None or not settings.weight_decay else own.weight_decay / settings.weight_decay
    setting, layer_decay = "optim.layer_decay", settings.layer_decay
    if own.layer_decay is not None:
        setting, layer_decay = f"optim.{name}.layer_decay", own.layer_decay
    scales = _lr_scales(tower, layer_decay, setting)
    layered: Any = tower.layered
    inside = {id(parameter): inner for inner, parameter in layered.named_parameters()}
    listed = layered.no_weight_decay() if hasattr(layered, "no_weight_decay") else ()
    exempt = [pattern for pattern in listed if not pattern.endswith("relative_position_bias_table")]
    rules = {}
    for outer, parameter in tower.module.named_parameters():
        inner = inside.get(id(parameter), "")  # "" outside its layers
        spared = any(fnmatch(inner, pattern) for pattern in exempt) or not _is_matrix(outer, parameter)
        rules[id(parameter)] = _Rule(peak * scales.get(inner, 1.0), 0.0 if spared else decays)
    return rules


def _lr_scales(tower: Tower, layer_decay: float, setting: str) -> dict[str, float]:
    """Scale of each of the layered part's parameters that lies below the top."""
    from timm.models._manipulate import group_with_matcher

    if layer_decay == 1:
        return {}
    if tower.layers is None:
        raise UserError(f"{setting}={layer_decay}: {type(tower.layered).__name__} does not say its layers; set it to 1")
    # No matcher knows the name "top", so it shows which layer id timm gives to what stands above all layers.
    names = [name for name, _ in tower.layered.named_parameters() if not name.startswith(TOP)] + ["top"]
    layers = group_with_matcher(((name, None) for name in names), tower.layers, reverse=True)
    return {name: layer_decay ** (layers["top"] - layer) for name, layer in layers.items() if name != "top"}
