"""Windowed attention in the manner of ViTDet (Li et al. 2022): most blocks of a plain ViT see windows of the grid alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError

_windows: ContextVar[tuple[Grid, int] | None] = ContextVar("windows", default=None)


@contextmanager
def windowed(grid: Grid, side: int | None) -> Iterator[None]:
    """Makes the windowed blocks of a trunk that is called within it see windows of `side` x `side` patches of `grid`; None: they
    see all."""
    before = _windows.set(None if side is None else (grid, side))
    try:
        yield
    finally:
        _windows.reset(before)


def add_windows(trunk: Any, global_blocks: int) -> None:
    """Prepares a plain ViT for windows: `global_blocks` of its blocks, evenly spread and the last among them, always see all
    patches. Raises UserError for a trunk without so many blocks."""
    depth = len(trunk.blocks)
    if not 1 <= global_blocks <= depth or depth % global_blocks:
        raise UserError(f"student.windows.global_blocks={global_blocks} must divide the {depth} blocks")
    period = depth // global_blocks
    for number, block in enumerate(trunk.blocks):
        if (number + 1) % period:
            block.register_forward_pre_hook(partial(_cut, trunk), with_kwargs=True)
            block.register_forward_hook(partial(_join, trunk))


def sides_of(grid: Grid, sides: tuple[int, ...]) -> list[int]:
    """Returns those sides of windows that divide a grid."""
    return [side for side in sides if not grid[0] % side and not grid[1] % side]


def _cut(trunk: Any, block: Any, inputs: Any, options: Any) -> Any:
    """Gives a block windows [B * windows, side^2, D] in place of tokens [B, prefix + N, D]; class and register tokens stand
    aside."""
    found = _windows.get()
    if found is None:
        return None
    (rows, columns), side = found
    tokens, *more = inputs
    prefix = trunk.num_prefix_tokens
    block._aside = tokens[:, :prefix]
    batch, _, width = tokens.shape
    cells = tokens[:, prefix:].reshape(batch, rows // side, side, columns // side, side, width)
    return (cells.transpose(2, 3).reshape(-1, side * side, width), *more), options


def _join(trunk: Any, block: Any, inputs: Any, output: Tensor) -> Tensor | None:
    found = _windows.get()
    if found is None:
        return None
    (rows, columns), side = found
    aside, block._aside = block._aside, None
    batch, width = len(aside), output.shape[-1]
    cells = output.reshape(batch, rows // side, columns // side, side, side, width).transpose(2, 3)
    return torch.cat([aside, cells.reshape(batch, rows * columns, width)], dim=1)
