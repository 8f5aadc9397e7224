"""Masks against set-based references and closed forms, and against masks that the original code drew."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from eva_mim.core.errors import UserError
from eva_mim.data.masking import BlockMask, RandomMask, make_mask
from eva_mim.data.view_settings import MaskSettings

Cell = tuple[int, int]


def reference_mask(rows: int, columns: int, ceiling: int, min_block: int, rng: random.Random) -> set[Cell]:
    """The definition with sets of cells: ten tries a block, a block's new cells must fit under the ceiling."""
    masked: set[Cell] = set()
    while len(masked) < ceiling:
        room = ceiling - len(masked)
        for _ in range(10):
            area = rng.uniform(min_block, room)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns or height < 1 or width < 1:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            block = {(row, column) for row in range(top, top + height) for column in range(left, left + width)}
            if 0 < len(block - masked) <= room:
                masked |= block
                break
        else:
            break
    return masked


@pytest.mark.parametrize(
    ("grid", "ratio", "min_block", "ceiling"),
    [((16, 16), 105 / 256, 16, 105), ((8, 8), 0.41, 4, 26), ((7, 11), 0.5, 5, 38), ((12, 5), 0.3, 3, 18)],
)
def test_every_cell_is_that_of_the_definition(grid: Cell, ratio: float, min_block: int, ceiling: int) -> None:
    mask = BlockMask(grid, MaskSettings(ratio=ratio, min_block=min_block))
    for seed in range(150):
        drawn = mask(random.Random(seed)).reshape(grid)
        expected = reference_mask(*grid, ceiling, min_block, random.Random(seed))
        assert {(int(row), int(column)) for row, column in np.argwhere(drawn)} == expected, seed


def test_defaults_are_evas_share_and_smallest_block() -> None:
    given, default = MaskSettings(ratio=105 / 256, min_block=16), MaskSettings()
    for seed in range(50):
        drawn = [BlockMask((16, 16), settings)(random.Random(seed)) for settings in (given, default)]
        assert np.array_equal(*drawn)


@pytest.mark.parametrize(("size", "ceiling"), [(16, 105), (14, 75)])
def test_masks_are_the_original_codes_masks(shared: Path, size: int, ceiling: int) -> None:
    """One generator with the fixture's seed gives the fixture's masks, all of them, cell by cell."""
    name = f"{size}x{size}"
    golden = load_file(shared / "golden" / "masks.safetensors")[f"out/masks_{name}"]
    facts = json.loads((shared / "golden" / "masks.json").read_text())[f"stats_{name}"]
    expected = np.unpackbits(golden, axis=1)[:, : size * size].astype(bool)
    rng = random.Random(facts["seed"])
    mask = BlockMask((size, size), MaskSettings(ratio=ceiling / size**2, min_block=16))
    drawn = np.stack([mask(rng) for _ in range(facts["n"])])
    assert np.array_equal(drawn, expected)


def test_statistics_of_other_seeds_are_the_original_ones(shared: Path) -> None:
    """2000 masks from per-sample seeds, as training draws them: within 3 standard errors of the fixture's figures."""
    facts = json.loads((shared / "golden" / "masks.json").read_text())["stats_16x16"]
    mask = BlockMask((16, 16), MaskSettings())
    drawn = np.stack([mask(random.Random(seed)) for seed in range(2000)])
    counts = drawn.sum(axis=1)
    assert counts.mean() == pytest.approx(facts["mean"], abs=3 * 1.1 * math.sqrt(2 / 2000))
    assert counts.std() == pytest.approx(facts["sd"], abs=0.2)
    assert (counts == 105).mean() == pytest.approx(facts["fraction_at_ceiling"], abs=3 * math.sqrt(2 * 0.23 / 2000))
    assert np.abs(drawn.mean(axis=0).reshape(16, 16) - np.array(facts["per_cell_frequency"])).max() < 0.08
    pairs = drawn.reshape(-1, 16, 16)
    assert (pairs[:, :, 1:] == pairs[:, :, :-1]).mean() == pytest.approx(facts["same_as_right_neighbour"], abs=0.003)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 9), (4, 4), (8, 8), (16, 16)])
def test_counts_are_between_one_and_the_ceiling(grid: Cell) -> None:
    for ratio in (0.01, 0.41, 0.9):
        mask = BlockMask(grid, MaskSettings(ratio=ratio))
        counts = [int(mask(random.Random(seed)).sum()) for seed in range(100)]
        assert min(counts) >= 1
        assert max(counts) <= max(1, round(ratio * grid[0] * grid[1]))


def test_a_smallest_block_above_the_ceiling_is_refused() -> None:
    """No block could be placed: every mask would be the single emergency patch, and nobody would be told."""
    with pytest.raises(UserError, match="min_block"):
        BlockMask((8, 8), MaskSettings(ratio=0.1, min_block=60))


# ---- exact block masks


def cells(mask: npt.NDArray[np.bool_], grid: Cell) -> set[Cell]:
    return {(int(row), int(column)) for row, column in np.argwhere(mask.reshape(grid))}


def beside(cell: Cell) -> set[Cell]:
    row, column = cell
    return {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)}


@pytest.mark.parametrize(
    ("grid", "ratio"), [((16, 16), 105 / 256), ((14, 14), 0.75), ((7, 11), 0.5), ((2, 9), 0.9), ((1, 1), 0.4)]
)
def test_exact_masks_are_the_laws_masks_grown_to_the_ceiling(grid: Cell, ratio: float) -> None:
    """Where the law reaches the ceiling nothing changes; else each added patch hangs on the mask through its neighbours."""
    count, grown = max(1, round(ratio * grid[0] * grid[1])), 0
    for seed in range(200):
        loose, exact = (
            cells(BlockMask(grid, MaskSettings(ratio=ratio, exact=exact))(random.Random(seed)), grid) for exact in (False, True)
        )
        assert len(exact) == count
        assert loose <= exact
        added, reached = exact - loose, set(loose)
        grown += bool(added)
        while near := {cell for cell in added - reached if beside(cell) & reached}:
            reached |= near
        assert reached == exact
    assert grown > 5 or grid == (1, 1)


def test_growing_chooses_among_all_neighbours_alike() -> None:
    """On 2x3 every block of 3 patches and aspect 1 is too high: one random patch grows to 3. Odds from the tree of choices."""
    grid, settings = (2, 3), MaskSettings(ratio=0.5, min_block=3, min_aspect=1, exact=True)
    every = {(row, column) for row in range(2) for column in range(3)}
    odds: defaultdict[frozenset[Cell], float] = defaultdict(float)
    for first in every:
        near = beside(first) & every
        for second in near:
            border = (beside(first) | beside(second)) & every - {first, second}
            for third in border:
                odds[frozenset((first, second, third))] += 1 / 6 / len(near) / len(border)
    draws = 6000
    drawn = Counter(frozenset(cells(BlockMask(grid, settings)(random.Random(seed)), grid)) for seed in range(draws))
    assert drawn.keys() == odds.keys()
    for mask, share in odds.items():
        assert abs(drawn[mask] / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)


# ---- random masks


@pytest.mark.parametrize(
    ("grid", "ratio", "count"),
    [((16, 16), 0.75, 192), ((14, 14), 0.75, 147), ((16, 16), 0.4, 103), ((8, 8), 0.9, 58), ((3, 3), 0.01, 1), ((2, 2), 0.99, 4)],
)
def test_random_masks_have_maes_count(grid: Cell, ratio: float, count: int) -> None:
    """int(N * (1 - ratio)) patches stay visible."""
    mask = RandomMask(grid, MaskSettings(kind="random", ratio=ratio))
    assert {int(mask(random.Random(seed)).sum()) for seed in range(100)} == {count}


def test_random_masks_are_uniform() -> None:
    """Each patch alone and each pair as often as by the closed form of drawing without replacement."""
    mask, draws = RandomMask((3, 4), MaskSettings(kind="random", ratio=0.75)), 4000
    drawn = np.stack([mask(random.Random(seed)) for seed in range(draws)]).astype(float)
    together = drawn.T @ drawn / draws
    single, pair = 9 / 12, 9 / 12 * 8 / 11
    off = ~np.eye(12, dtype=bool)
    assert np.abs(together[~off] - single).max() < 4 * math.sqrt(single * (1 - single) / draws)
    assert np.abs(together[off] - pair).max() < 4.5 * math.sqrt(pair * (1 - pair) / draws)


# ---- which mask


def test_the_settings_choose_the_mask() -> None:
    assert make_mask((8, 8), MaskSettings(ratio=0)) is None
    assert make_mask((8, 8), MaskSettings(ratio=0, kind="random")) is None
    for settings, kind in ((MaskSettings(), BlockMask), (MaskSettings(kind="random"), RandomMask)):
        made = make_mask((8, 8), settings)
        assert isinstance(made, kind)
        assert np.array_equal(made(random.Random(5)), kind((8, 8), settings)(random.Random(5)))


def test_settings_know_how_many_patches_a_mask_hides() -> None:
    for settings in (
        MaskSettings(exact=True), MaskSettings(kind="random", ratio=0.75), MaskSettings(kind="random", ratio=0.3), MaskSettings(),
    ):
        made = make_mask((8, 8), settings)
        assert made is not None
        counts = {int(made(random.Random(seed)).sum()) for seed in range(100)}
        assert max(counts) == settings.masked_patches(64)
        assert (len(counts) > 1) is settings.varies
    assert MaskSettings(ratio=0).masked_patches(64) == 0
    assert not MaskSettings(ratio=0).varies
