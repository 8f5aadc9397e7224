"""Fixed sine-cosine position tables."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_mim.core.contracts import Grid


def sincos_table(grid: Grid, width: int, prefix: int) -> Tensor:
    """Returns [1, prefix + N, width] fixed positions: a quarter of the channels each for sine and cosine of the column, then of
    the row, at wavelengths from 2 pi up to 10000 * 2 pi patches; zeros for the `prefix` class and register tokens (MAE,
    appendix A.1)."""
    assert width % 4 == 0, width
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (column, row)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(prefix, width), patches.float()])[None]
