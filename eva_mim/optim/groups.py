"""Parameter groups of a student: weight decay, layer-wise and tower-wise learning rates."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple

from eva_mim.core.errors import UserError
from eva_mim.optim import HeadsSettings, OptimSettings, TowerSettings
from eva_mim.trunks import Tower

if TYPE_CHECKING:
    from torch import nn

TOP = ("norm.", "rel_pos_bias.")
"""Prefixes of trunk parameters in EVA's top layer (EVA-01/eva/optim_factory.py); in timm they are in the last block and stem."""


class _Rule(NamedTuple):
    lr_scale: float
    decays: float
    head: bool = False


def parameter_groups(student: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Returns optimizer groups of the trained parameters, with `params`, `weight_decay`, `decays`, `lr_scale` and `head`, by
    BEiT's rule as in EVA-01/eva/optim_factory.py and EVA-CLIP/rei/training/optim.py.

    `lr_scale` and `decays` are factors on the rates of a step. Weight decay is off for vectors, biases and the parameters that
    timm lists in `no_weight_decay` (positions, class token), as does the student for what is outside its trunk; it is on for
    relative position tables, although timm lists them, and for a mask token. A student without `towers()` has one tower, its
    trunk. Outside the towers, `student.stem_parameters` are in layer 0 and all other parameters in the top layer, where
    `student.lr_scales` may give a factor to a parameter by its name (the layers of a probe). With `optim.heads`, `head` is True
    for parameters whose names begin as `student.head_parts`. Raises UserError if rates shall differ by layer and the layers of
    the architecture are not known."""
    rules: dict[int, _Rule] = {}
    towers = _towers(student)
    for name in ("image", "text"):
        if name not in towers and getattr(settings, name) != TowerSettings():
            raise UserError(f"optim.{name}: this student has no {name} tower; leave it out")
    for name, tower in towers.items():
        rules |= _rules(name, tower, settings)
    lowest = min((rule.lr_scale for rule in rules.values()), default=1.0)
    scales = dict.fromkeys(getattr(student, "stem_parameters", ()), lowest) | getattr(student, "lr_scales", {})
    parts = getattr(student, "head_parts", ())
    if settings.heads != HeadsSettings() and not parts:
        raise UserError("optim.heads: this student has no heads for teachers' features; leave it out")
    spared: Any = student.no_weight_decay() if hasattr(student, "no_weight_decay") else ()  # type: ignore[operator]
    own_lr = 1.0 if settings.heads.lr is None else settings.heads.lr / settings.lr
    groups: dict[_Rule, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        own = rules.get(id(parameter))
        head = settings.heads != HeadsSettings() and name.startswith(parts)
        decays = _is_matrix(name, parameter) and name not in spared
        rule = own or _Rule(own_lr if head else scales.get(name, 1.0), float(decays), head)
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
    """Returns the rule of each parameter of a tower, by the parameter's `id()`."""
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
        inner = inside.get(id(parameter), "")  # "" for a parameter outside the layers
        spared = any(fnmatch(inner, pattern) for pattern in exempt) or not _is_matrix(outer, parameter)
        rules[id(parameter)] = _Rule(peak * scales.get(inner, 1.0), 0.0 if spared else decays)
    return rules


def _lr_scales(tower: Tower, layer_decay: float, setting: str) -> dict[str, float]:
    """Returns the learning rate scale of each parameter of `tower.layered` below the top layer, by name."""
    from timm.models._manipulate import group_with_matcher

    if layer_decay == 1:
        return {}
    if tower.layers is None:
        raise UserError(f"{setting}={layer_decay}: {type(tower.layered).__name__} does not say its layers; set it to 1")
    # No matcher matches the name "top", so timm gives it the layer id above all layers.
    names = [name for name, _ in tower.layered.named_parameters() if not name.startswith(TOP)] + ["top"]
    layers = group_with_matcher(((name, None) for name in names), tower.layers, reverse=True)
    return {name: layer_decay ** (layers["top"] - layer) for name, layer in layers.items() if name != "top"}
