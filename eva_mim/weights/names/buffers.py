"""Buffers that only the original code stores, computed from sizes: rotary tables and indices of relative positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError


@dataclass(frozen=True)
class Rope:
    """The parameters of rotary tables besides the grid."""

    head_width: int
    """Channels of one attention head; a multiple of 4."""
    reference: int | None = None
    """Grid side to which positions are scaled (`intp_freq` with `pt_hw_seq_len`; 16 in released classifiers and CLIP towers,
    timm's `ref_feat_shape`). None: plain indices, as in every masked model."""


def rope_tables(rope: Rope, grid: Grid) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of rotary positions, [N, head_width] each, fp32 (facts on EVA-02/asuka/rope.py).

    The first half of the channels turns with the row, the second with the column; frequency k of a half with h channels is
    10000^(-2k/h), once for each of the two channels of a pair.
    """
    half = rope.head_width // 2
    if rope.head_width < 4 or rope.head_width % 4:
        raise UserError(f"head_width: {rope.head_width} is not a multiple of 4; rotary positions need one")
    frequencies = (10000 ** -(torch.arange(0, half, 2) / half)).repeat_interleave(2)
    rows, columns = (
        (torch.arange(size) / size * (rope.reference or size))[:, None] * frequencies for size in grid
    )
    angles = torch.cat([rows[:, None].expand(*grid, half), columns[None].expand(*grid, half)], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def read_rope(cos: Tensor, sin: Tensor) -> tuple[Rope, Grid]:
    """Returns the settings and the grid of stored rotary tables, [N, head_width] each.

    The grid follows from the first patch whose row angle is not 0, the scale from the angle of the first step. Raises UserError
    for tables that `rope_tables` does not reproduce.
    """
    tokens, head_width = cos.shape
    half = head_width // 2
    if cos.shape == sin.shape and bool(cos.isfinite().all() and sin.isfinite().all()):
        row_angle, column_angle = (torch.atan2(sin[:, c].double(), cos[:, c].double()) for c in (0, half))
        moved = (row_angle.abs() > 1e-2).nonzero()
        columns = int(moved[0]) if len(moved) else tokens
        grid = (tokens // max(columns, 1), columns)
        step, side = (column_angle[1].item(), columns) if columns > 1 else (row_angle[1 % tokens].item(), grid[0])
        tolerance = 5e-2 if cos.dtype == torch.bfloat16 else 5e-3 if cos.dtype == torch.float16 else 1e-4
        for turns in range(3):  # the angle of a step beyond half a turn is off by 2 pi
            found = round((step + 2 * math.pi * turns) * side)
            for reference in (None, found) if found == side else (found,):
                rope = Rope(head_width, reference)
                if found > 0 and tokens == grid[0] * grid[1] and _same(rope_tables(rope, grid), (cos, sin), tolerance):
                    return rope, grid
    raise UserError(
        f"rope.freqs_cos {list(cos.shape)}: not EVA-02's rotary table of any grid; it cannot be computed again, so the "
        "checkpoint is not understood"
    )


def _same(made: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], tolerance: float) -> bool:
    return all(bool((mine - theirs.float().cpu()).abs().max() < tolerance) for mine, theirs in zip(made, stored, strict=True))


def relative_position_index(grid: Grid) -> Tensor:
    """Returns the row of the relative position table for each pair of tokens, [N + 1, N + 1] int64, class token first.

    Rows are ordered by (row difference, column difference) from the most negative; the last three are class to patch, patch to
    class, and class to itself (BEiT).
    """
    rows, columns = grid
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    difference = place[:, None] - place[None]
    pairs = (difference[..., 0] + rows - 1) * (2 * columns - 1) + difference[..., 1] + columns - 1
    last = (2 * rows - 1) * (2 * columns - 1) + 2
    index = torch.full((len(place) + 1, len(place) + 1), last)
    index[0, 1:], index[1:, 0], index[1:, 1:] = last - 2, last - 1, pairs
    return index
