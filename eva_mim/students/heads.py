"""Heads of a masked student: one for each target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.core.registry import HEADS, lookup

TargetWidths = int | Mapping[str, int]
"""Target width C: of the only target, or of several targets by name."""


def build_head(kind: str, width: int, targets: TargetWidths) -> nn.Module:
    """Returns a head of a kind in `HEADS`, from the student's width to the target's; for several targets a ModuleDict with one
    head each. Raises UserError for an unknown kind, and for a target's name that torch does not allow."""
    build: Callable[[int, int], nn.Module] = lookup(HEADS, kind, "student.head")
    if isinstance(targets, int):
        return build(width, targets)
    for name in targets:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise UserError(f"teachers.{name}: torch does not allow this name; choose another")
    return nn.ModuleDict({name: build(width, target) for name, target in targets.items()})


def draw_linear(*modules: nn.Module) -> None:
    """Initialises the linear layers in these modules in place: weights truncated normal (std 0.02), biases 0."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


def predict(head: nn.Module, patches: Tensor) -> Tensor | dict[str, Tensor]:
    """Returns [M, C] predictions from [M, D] patches; for several heads by the target's name."""
    if isinstance(head, nn.ModuleDict):
        return {name: one(patches) for name, one in head.items()}
    prediction: Tensor = head(patches)
    return prediction
