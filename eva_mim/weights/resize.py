"""Resizing weights to another grid or patch size. Both grids are arguments, because the number of tokens does not determine
rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from timm.layers import resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport

PositionRule = Literal["timm", "original", "eva-clip"]
KernelRule = Literal["bicubic", "pseudo-inverse"]

CLASS_ROWS = 3
"""Number of last rows of a relative position table for the class token: class to patch, patch to class, class to itself."""


def resize_positions(table: Tensor, old: Grid, new: Grid, *, prefix: int, rule: PositionRule) -> Tensor:
    """Resizes a position table [..., prefix + N, D] to [..., prefix + N', D], bicubically over the grid; the `prefix` rows of
    class and registers stay.

    `timm`: with antialias, which changes the result even when enlarging (open_clip's rule, too). `original`: without
    (EVA-01/eva/run_class_finetuning.py). `eva-clip`: without, and with aligned corners (EVA-CLIP's loader, for tables under
    OpenAI's names). Raises UserError if the table is not of the grid `old`.
    """
    if table.shape[-2] != prefix + old[0] * old[1]:
        raise UserError(
            f"pos_embed: {table.shape[-2]} rows are not {prefix} + {old[0]} x {old[1]}; name the grid that the table was made for"
        )
    if old == new:
        return table
    first, patches = table[..., :prefix, :], table[..., prefix:, :]
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=rule == "eva-clip", antialias=rule == "timm")
    resized = image.permute(0, 2, 3, 1).reshape(*table.shape[:-2], new[0] * new[1], -1)
    return torch.cat([first, resized.to(table.dtype)], dim=-2)


def resize_patch_kernel(kernel: Tensor, size: tuple[int, int], rule: KernelRule) -> Tensor:
    """Resizes a patch kernel [D, channels, h, w] to [D, channels, h', w'].

    `bicubic`: plain interpolation of each kernel, without a correction of the gain, which grows with the area (the original's 14
    to 16). `pseudo-inverse`: the kernel whose response to a resized patch equals the old kernel's to the patch (FlexiViT, timm).
    """
    if tuple(kernel.shape[-2:]) == tuple(size):
        return kernel
    if rule == "pseudo-inverse":
        resampled: Tensor = resample_patch_embed(kernel, list(size))
        return resampled
    return F.interpolate(kernel.float(), size=size, mode="bicubic", align_corners=False).to(kernel.dtype)


def adapt_kernel(kernel: Tensor, channels: int) -> Tensor:
    """Adapts a patch kernel [D, 3, h, w] to [D, channels, h, w] by timm's rule. One channel gets the sum of the three, whose
    response to a grey image is the same; more channels repeat the three in order, scaled by 3 / channels. Raises UserError for
    a kernel of other channels."""
    if kernel.shape[1] == channels:
        return kernel
    if kernel.shape[1] != 3:
        raise UserError(f"the patch kernel is for images of {kernel.shape[1]} channels and cannot be made one for {channels}, as "
                        "one of RGB can; set data.channels, student.mean and student.std as it was trained with")
    adapted: Tensor = adapt_input_conv(channels, kernel)
    return adapted


def resize_relative(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resizes a relative position table [(2r-1)(2c-1) + 3, heads] to [(2r'-1)(2c'-1) + 3, heads], by the original's geometric
    rule.

    The old differences are placed at growing distances (see `_ratio`), so that they reach as far as the new ones; a cubic spline
    through them, along rows and along columns, is sampled at integers. The outermost sample may lie 1e-4 beyond the last point
    and takes its value. The three rows of the class token stay. The original code has square grids alone, where both axes agree.
    Raises UserError if the table is not of the grid `old`.
    """
    _expect(table, (2 * old[0] - 1) * (2 * old[1] - 1), f"{old[0]} x {old[1]}")
    if old == new:
        return table
    rows, columns = (
        _spline(_distances(_ratio(a, b), a), torch.arange(1 - b, b)) for a, b in zip(old, new, strict=True)
    )
    source = table[:-CLASS_ROWS].double().reshape(2 * old[0] - 1, 2 * old[1] - 1, -1)
    resized = torch.einsum("ry,yxh,cx->rch", rows, source, columns).flatten(0, 1)
    return torch.cat([resized.to(table.dtype), table[-CLASS_ROWS:]])


def resize_trunk(
    weights: Mapping[str, Tensor],
    old: Grid,
    new: Grid,
    *,
    positions: PositionRule,
    kernel: KernelRule,
    patch: tuple[int, int] | None = None,
    prefix: str = "",
) -> tuple[dict[str, Tensor], KeyReport]:
    """Returns a trunk for the grid `new` and, if given, another patch size, and the report of the changes. The trunk is timm's
    (below `prefix` in a CLIP model) or OpenAI's tower below `visual.`.

    `old` is the grid of the weights. The number of class and register rows follows from the position table. Raises UserError if
    the table is not of that grid.
    """
    result, report = {}, KeyReport()
    for name, value in weights.items():
        leaf = name.removeprefix(prefix) if name.startswith(prefix) else ""
        made, rule = value, ""
        if leaf in ("pos_embed", "positional_embedding"):
            names = [prefix + token for token in ("cls_token", "reg_token", "class_embedding")]
            tokens = [weights[token] for token in names if token in weights]
            extra = sum(token.shape[1] if token.ndim == 3 else 1 for token in tokens)
            rows = 0 if value.shape[-2] == old[0] * old[1] else extra
            made, rule = resize_positions(value, old, new, prefix=rows, rule=positions), positions
        elif leaf in ("patch_embed.proj.weight", "conv1.weight") and patch is not None:
            made, rule = resize_patch_kernel(value, patch, kernel), kernel
        elif leaf.endswith("relative_position_bias_table"):
            made, rule = resize_relative(value, old, new), "geometric"
        result[name] = made
        if made is value:
            report.loaded.append(name)
        else:
            report.resized.append(name)
            report.reasons[name] = f"{list(value.shape)} to {list(made.shape)}, rule {rule}"
    return result, report


def _expect(table: Tensor, rows: int, grid: str) -> None:
    if len(table) != rows + CLASS_ROWS:
        raise UserError(
            f"relative positions: {len(table)} rows are not the {rows} + {CLASS_ROWS} of a grid of {grid}; "
            "name the grid that the table was made for"
        )


def _ratio(old: int, new: int) -> float:
    """Returns q for which 1 + q + ... + q^(old-2) comes nearest to the largest new difference, new - 1; the original's
    bisection."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    return q


def _distances(q: float, side: int) -> Tensor:
    """Returns the positions of the differences of a grid side, [2 side - 1]: 0, 1, 1 + q, 1 + q + q^2, ... and the same below
    0."""
    positive = torch.cumsum(q ** torch.arange(side - 1, dtype=torch.float64), 0)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def _spline(x: Tensor, at: Tensor) -> Tensor:
    """Returns the matrix [T, S] float64 whose product with y, [S], is the cubic spline through (x, y) at the points `at`, [T].

    Not-a-knot: the first two pieces are one cubic, and so are the last two (FITPACK's interpolating spline, scipy's `interp2d`
    and `interp1d` with kind cubic). The second derivatives solve a linear system. Beyond `x` the end values are held.
    """
    count, h = len(x), x.diff()
    if count < 4:
        raise UserError("relative positions: a cubic spline needs a grid of at least 3 patches a side")
    slopes = torch.diff(torch.eye(count, dtype=torch.float64), dim=0) / h[:, None]
    system, right = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    for i in range(1, count - 1):
        system[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        right[i] = 6 * (slopes[i] - slopes[i - 1])
    for row, i in ((0, 0), (-1, count - 3)):  # equal third derivatives on both sides of the second and the last but one point
        system[row, i : i + 3] = torch.stack([-1 / h[i], 1 / h[i] + 1 / h[i + 1], -1 / h[i + 1]])
    curvature = torch.linalg.solve(system, right)
    at = at.double().clamp(x[0], x[-1])
    piece = (torch.searchsorted(x, at, right=True) - 1).clamp(0, count - 2)
    width, left = h[piece][:, None], (at - x[piece])[:, None]
    rest = width - left
    unit = torch.eye(count, dtype=torch.float64)
    lines = (unit[piece] * rest + unit[piece + 1] * left) / width
    bends = curvature[piece] * (rest**3 / width - width * rest) + curvature[piece + 1] * (left**3 / width - width * left)
    values: Tensor = lines + bends / 6
    return values
