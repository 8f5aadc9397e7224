"""Grids of patches: a student's beside its teachers'."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_mim.core.contracts import Grid, Teacher
from eva_mim.core.errors import UserError


def fine(grid: Grid, factor: int) -> Grid:
    """Returns a grid that is `factor` times as fine."""
    return grid[0] * factor, grid[1] * factor


def cells_of(index: Tensor, grid: Grid, factor: int) -> Tensor:
    """Returns the positions [M * factor^2] of the cells of patches in flattened grids that are `factor` times as fine, those of a
    patch together and row by row. `index`: [M] positions of patches in the flattened [B * N] of `grid`."""
    if factor == 1:
        return index
    rows, columns = grid
    image, row, column = index // (rows * columns), index // columns % rows, index % columns
    within = torch.arange(factor, device=index.device)
    down = (image * rows + row)[:, None, None] * factor + within[:, None]
    return (down * (columns * factor) + (column[:, None, None] * factor + within)).flatten()


def check_grids(grid: Grid, image_size: int, teacher: Teacher, path: str = "teacher", factor: int = 1) -> None:
    """Raises UserError, with the ways out, if a teacher's grid is not `factor` times the student's. `path`: path of the teacher's
    settings in the recipe."""
    wanted = fine(grid, factor)
    if wanted == teacher.seen(wanted)[1]:
        return
    times = f", {factor} times as fine," if factor > 1 else ""
    ways = [f"set student.image_size={image_size // grid[0] * teacher.grid[0] // factor}",
            f"or set {path}.image_size={round(teacher.image_size / teacher.grid[0] * wanted[0])} where the teacher allows it"]
    whole = teacher.grid[0] // grid[0]
    if whole > 1 and fine(grid, whole) == teacher.grid:
        ways.append(f"or set {path}.head.upsample={whole}")
    raise UserError(
        f"student grid {grid[0]}x{grid[1]} ({image_size} px){times} does not match {path} grid "
        f"{teacher.grid[0]}x{teacher.grid[1]} ({teacher.image_size} px); {', '.join(ways)}, or set {path}.interpolate=student"
    )
