"""Masks of patches: rectangular blocks by BeiT's law, and single random patches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.data.view_settings import MaskSettings

ATTEMPTS = 10
"""Attempts to place a block before the mask is finished without it (BeiT, masking_generator.py)."""

Mask = Callable[[random.Random], npt.NDArray[np.bool_]]
"""Function that draws a [N] bool mask, True = masked, from a random generator."""


def make_mask(grid: Grid, settings: MaskSettings) -> Mask | None:
    """Returns the mask of a grid; None if no patch is masked. Raises UserError if `mask.min_block` exceeds the number of masked
    patches."""
    if settings.ratio == 0:
        return None
    return BlockMask(grid, settings) if settings.kind == "block" else RandomMask(grid, settings)


class BlockMask:
    """Block mask: rectangles are placed until the maximum number of masked patches is reached or placing fails.

    A block has area ~ U(min_block, budget) and log aspect ~ U(ln a, -ln a), where budget = maximum - patches masked so far.
    Its sides are shorter than the grid's, and it is accepted if it newly masks between 1 and `budget` patches. A mask
    therefore never exceeds the maximum, and may stay below it; with `exact` it is then extended at its border, one random
    patch at a time. The mask is one Python integer with one bit a patch, so that counting is one operation.
    """

    def __init__(self, grid: Grid, settings: MaskSettings):
        rows, columns = self.grid = grid
        self.cells = rows * columns
        self.ceiling = settings.masked_patches(self.cells)
        self.min_block = settings.min_block or min(self.ceiling, max(1, self.cells // 16))
        if self.min_block > self.ceiling:
            raise UserError(f"mask.min_block={self.min_block} is above the ceiling of {self.ceiling} patches; lower it")
        self.log_aspect = math.log(settings.min_aspect)
        self.exact = settings.exact
        self.everything = (1 << self.cells) - 1
        self.first_column = self.everything // ((1 << columns) - 1)  # a bit at the start of each row

    def __call__(self, rng: random.Random) -> npt.NDArray[np.bool_]:
        """Returns a [N] bool mask, drawn from `rng`."""
        mask = 0
        while (budget := self.ceiling - mask.bit_count()) > 0:
            block = self._block(rng, mask, budget)
            if block is None:
                break
            mask |= block
        mask = mask or 1 << rng.randrange(self.cells)  # the loss needs one patch, however small the grid
        while self.exact and mask.bit_count() < self.ceiling:
            mask |= self._bordering(rng, mask)
        octets = mask.to_bytes((self.cells + 7) // 8, "little")
        bits = np.unpackbits(np.frombuffer(octets, dtype=np.uint8), bitorder="little", count=self.cells)
        return bits.astype(bool)

    def _block(self, rng: random.Random, mask: int, budget: int) -> int | None:
        rows, columns = self.grid
        for _ in range(ATTEMPTS):
            area = rng.uniform(self.min_block, budget)
            aspect = math.exp(rng.uniform(self.log_aspect, -self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            row = ((1 << width) - 1) << left
            block = sum(row << (line * columns) for line in range(top, top + height))
            if 0 < (block & ~mask).bit_count() <= budget:
                return block
        return None

    def _bordering(self, rng: random.Random, mask: int) -> int:
        """Returns the bit of a random visible patch beside, above or below a masked one, all equally likely."""
        columns = self.grid[1]
        right = (mask << 1) & ~self.first_column
        left = (mask & ~self.first_column) >> 1
        border = (right | left | mask << columns | mask >> columns) & self.everything & ~mask
        for _ in range(rng.randrange(border.bit_count())):
            border &= border - 1  # clears the lowest bit
        return border & -border


class RandomMask:
    """Random mask: every image has the same number of masked patches, and all choices are equally likely (MAE, section 3)."""

    def __init__(self, grid: Grid, settings: MaskSettings):
        self.cells = grid[0] * grid[1]
        self.visible = self.cells - settings.masked_patches(self.cells)

    def __call__(self, rng: random.Random) -> npt.NDArray[np.bool_]:
        """Returns a [N] bool mask, drawn from `rng`."""
        mask = np.ones(self.cells, dtype=bool)
        mask[rng.sample(range(self.cells), self.visible)] = False
        return mask
