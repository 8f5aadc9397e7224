"""Positions of a student: initialisation of the table that its trunk adds to the patches, and whether it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.trunks.positions import sincos_table


def learned(trunk: Any, grid: Grid, settings: MaskedSettings) -> None:
    """Keeps timm's position table, which is trained."""


def sincos(trunk: Any, grid: Grid, settings: MaskedSettings) -> None:
    """Sets the trunk's table to fixed sines and cosines, and freezes it. Raises UserError for a trunk without a table."""
    table: Any = trunk.pos_embed
    if table is None:
        raise UserError(f"student.positions=sincos: {settings.name} has no absolute positions; set it to learned")
    extra = table.shape[1] - grid[0] * grid[1]  # class and register tokens with positions; 0 in some models
    table.data.copy_(sincos_table(grid, table.shape[2], extra))
    table.requires_grad_(False)


POSITIONS: dict[str, Callable[[Any, Grid, MaskedSettings], None]] = {"learned": learned, "sincos": sincos}
"""Functions by `student.positions`; each changes the trunk in place."""
