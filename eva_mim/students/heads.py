"""Heads of a student: one for each target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.core.registry import HEADS, lookup

TargetWidths = int | Mapping[str, int]
"""C of the one target, or of several by the target's name."""


def build_head(kind: str, width: int, targets: TargetWidths) -> nn.Module:
    """A head of a kind of `HEADS` from the student's width to the target's, or a ModuleDict with one for each of several targets.
    Raises UserError for an unknown kind, and for the name of a target that torch does not allow."""
    build: Callable[[int, int], nn.Module] = lookup(HEADS, kind, "student.head")
    if isinstance(targets, int):
        return build(width, targets)
    for name in targets:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise UserError(f"teachers.{name}: torch does not allow this name; choose another")
    return nn.ModuleDict({name: build(width, target) for name, target in targets.items()})


def draw_linear(*modules: nn.Module) -> None:
    """Weights of the linear layers in these modules cut normal (std 0.02), biases 0, in place."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


def predict(head: nn.Module, patches: Tensor) -> Tensor | dict[str, Tensor]:
    """[M, C] predictions from [M, D] patches; of several heads by the target's name."""
    if isinstance(head, nn.ModuleDict):
        return {name: one(patches) for name, one in head.items()}
    prediction: Tensor = head(patches)
    return prediction
