"""Block-wise masks: rectangles are placed until a ceiling of masked patches is reached or placing fails."""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt

from eva_mim.config import UserError
from eva_mim.contracts import Grid
from eva_mim.data import MaskSettings

ATTEMPTS = 10
"""Tries to place one block before the mask is taken as it is (BEiT, masking_generator.py)."""


class BlockMask:
    """Draws [N] bool masks, True = masked.

    A block has area ~ U(min_block, budget) and log aspect ~ U(ln a, -ln a), its sides are shorter than the grid's, and it
    is accepted when it newly masks between 1 and `budget` patches, budget = ceiling - masked so far. So a mask never
    exceeds the ceiling, and may stay below it. The grid is one Python integer, a bit a patch: counting is one operation.
    """

    def __init__(self, grid: Grid, settings: MaskSettings):
        self.grid = grid
        self.cells = grid[0] * grid[1]
        self.ceiling = max(1, round(settings.ratio * self.cells))
        self.min_block = settings.min_block or min(self.ceiling, max(1, self.cells // 16))
        if self.min_block > self.ceiling:
            raise UserError(f"mask.min_block={self.min_block} is above the ceiling of {self.ceiling} patches")
        self.log_aspect = math.log(settings.min_aspect)

    def __call__(self, rng: random.Random) -> npt.NDArray[np.bool_]:
        """[N] bool from the generator's next numbers."""
        mask = 0
        while (budget := self.ceiling - mask.bit_count()) > 0:
            block = self._block(rng, mask, budget)
            if block is None:
                break
            mask |= block
        mask = mask or 1 << rng.randrange(self.cells)  # the loss needs one patch, however small the grid
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
