"""Prefixes that training code puts before the names of a model: of torch.compile, DistributedDataParallel, Lightning, ..."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from eva_mim.core.errors import UserError
from eva_mim.weights.names.families import detect

V = TypeVar("V")
OUTER = re.compile(r"(?:(?:module|_orig_mod|model|network|net|backbone|encoder|student|teacher)\.)+")
"""Names of the attributes in which training code keeps a model."""


def unwrapped(weights: Mapping[str, V]) -> tuple[dict[str, V], str, list[str]]:
    """Returns the tensors of the model inside, under its own names; the prefix that was removed ("" for none); and the names of
    the tensors that do not have it, such as those of a head beside `backbone.`.

    Nothing is removed from a checkpoint that is recognised as it is, nor from one in which no such prefix leads to a model.
    Raises UserError if several do, as `student.` and `teacher.` of self-distillation.
    """
    if _known(weights):
        return dict(weights), "", []
    prefixes = sorted({match[0] for name in weights if (match := OUTER.match(name))})
    inside = {prefix: _below(weights, prefix) for prefix in prefixes}
    found = [prefix for prefix in prefixes if _known(inside[prefix])]
    if len(found) > 1:
        raise UserError(f"checkpoint: a model below each of {', '.join(map(repr, found))}; choose one by its container "
                        f"(hand_over.container={found[0].rstrip('.')})")
    # The family of a convolutional network is not known, with or without a prefix.
    found = found or [prefix for prefix in prefixes if len(inside[prefix]) == len(weights) or prefix.endswith("backbone.")]
    if len(found) != 1:
        return dict(weights), "", []
    return inside[found[0]], found[0], [name for name in weights if not name.startswith(found[0])]


def _below(weights: Mapping[str, V], prefix: str) -> dict[str, V]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _known(weights: Mapping[str, Any]) -> bool:
    try:
        detect(weights)
    except UserError:
        return False
    return True
