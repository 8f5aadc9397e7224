"""Parameter groups of a student: weight decay, layer-wise and tower-wise learning rates."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple

from eva_mim.core.errors import UserError
from eva_mim.optim import OptimSettings, TowerSettings
from eva_mim.trunks import Tower

if TYPE_CHECKING:
    from torch import nn

TOP = ("norm.", "rel_pos_bias.")
"""Trunk parameters at the top layer for EVA (EVA-01/eva/optim_factory.py); timm counts them to the last block and the stem."""


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
