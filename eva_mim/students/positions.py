"""Positions from windows of a large table (CPE): the table that a masked student's trunk reads, and how it is read."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings

POSITION_TABLE = "position_table"
"""Name of a whole table among the tensors outside the trunk."""
SCALE, ASPECT = math.sqrt(0.1), (3 / 4, 4 / 3)
"""Smallest side of a window, as a share of the table's, and limits of its aspect ratio (AM-RADIO, appendix on CPE)."""


def cropped(trunk: Any, grid: Grid, settings: MaskedSettings) -> None:
    """Gives the trunk a table of `position_grid` x `position_grid` places, of which each image in training gets the positions of
    a random window, and held-out images those of the table scaled down (CPE, AM-RADIO). Raises UserError for a trunk whose
    positions are read in another way."""
    if not isinstance(trunk, VisionTransformer) or trunk.pos_embed is None:
        raise UserError(f"student.positions=cropped: {settings.name} is no plain ViT with a table of positions; set it to "
                        "learned")
    side, extra = settings.position_grid, trunk.pos_embed.shape[1] - grid[0] * grid[1]
    trunk.pos_embed = nn.Parameter(torch.empty(1, extra + side * side, trunk.pos_embed.shape[2]))
    nn.init.trunc_normal_(trunk.pos_embed, std=0.02)
    read_cropped(trunk, side)


def read_cropped(trunk: Any, side: int) -> None:
    """Makes the trunk read its positions from a table of `side` x `side` places."""
    trunk.position_grid = side, side
    trunk._pos_embed = partial(_with_positions, trunk)


def _with_positions(trunk: Any, patches: Tensor) -> Tensor:
    """Returns the tokens [B, prefix + N, D] with positions, from patches [B, N, D] or [B, h, w, D]; it stands in the place of
    timm's `_pos_embed`, whose order of tokens it keeps."""
    grid = (patches.shape[1], patches.shape[2]) if patches.ndim == 4 else trunk.patch_embed.grid_size
    patches = patches.reshape(len(patches), -1, patches.shape[-1])
    extra = trunk.pos_embed.shape[1] - trunk.position_grid[0] * trunk.position_grid[1]
    table = trunk.pos_embed[:, extra:].unflatten(1, trunk.position_grid).permute(0, 3, 1, 2)
    places = window(table, grid, len(patches)) if trunk.training else top_left(table, grid)
    patches = patches + places.flatten(2).transpose(1, 2).to(patches.dtype)
    tokens = [token.expand(len(patches), -1, -1) for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    if extra:
        tokens = [torch.cat(tokens, dim=1) + trunk.pos_embed[:, :extra]]
    found: Tensor = trunk.pos_drop(torch.cat([*tokens, patches], dim=1))
    return found


def window(table: Tensor, grid: Grid, images: int) -> Tensor:
    """Returns positions [B, D, rows, columns] from the table [1, D, G, G]: a random window for each image, bilinear between the
    corners' centres. Its sides are s a and s / a of the table's, at most 1, with s uniform from sqrt(0.1) to 1 and log a uniform
    between those of 3/4 and 4/3."""
    device = table.device
    scale = SCALE + (1 - SCALE) * torch.rand(images, device=device)
    low, high = (math.log(value) for value in ASPECT)
    aspect = (low + (high - low) * torch.rand(images, device=device)).exp()
    sides = torch.stack([scale * aspect, scale / aspect], dim=1).clamp(max=1.0)  # x, y
    start = torch.rand(images, 2, device=device) * (1 - sides)
    rows, columns = (torch.linspace(0, 1, count, device=device) if count > 1 else torch.full((1,), 0.5, device=device)
                     for count in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([x, y], dim=-1)[None] * sides[:, None, None] + start[:, None, None]
    return F.grid_sample(table.float().expand(images, -1, -1, -1), places * 2 - 1, mode="bilinear", align_corners=True)


def top_left(table: Tensor, grid: Grid) -> Tensor:
    """Returns positions [1, D, rows, columns] for held-out images: the table [1, D, G, G] is scaled to a square with the longer
    side of the grid, whose top left part is taken, so that the aspect ratio is kept."""
    side = max(grid)
    return F.interpolate(table.float(), (side, side), mode="bilinear", align_corners=False)[:, :, : grid[0], : grid[1]]


def table_for(trunk: Any, table: Tensor, grid: Grid) -> Tensor:
    """Returns timm's table [1, prefix + N, D] for one grid, from a whole one [1, prefix + G * G, D]."""
    side = trunk.position_grid
    extra = table.shape[1] - side[0] * side[1]
    square = table[:, extra:].reshape(1, *side, -1).permute(0, 3, 1, 2)
    places = top_left(square, grid).flatten(2).transpose(1, 2)
    return torch.cat([table[:, :extra], places.to(table.dtype)], dim=1)
