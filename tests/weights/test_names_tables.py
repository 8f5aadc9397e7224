"""The original code's buffers by their definitions; against its own numbers they are tested in test_names.py."""

from __future__ import annotations

import pytest
import torch

from eva_mim.weights.names.buffers import Rope, read_rope, relative_position_index, rope_tables


@pytest.mark.parametrize("grid", [(3, 5), (16, 16), (6, 4)])
@pytest.mark.parametrize("reference", [None, 16, 7, 4])
def test_rotary_tables_say_what_they_were_made_with(grid: tuple[int, int], reference: int | None) -> None:
    """Each entry by its formula, from the definition; and read back, also in half precision."""
    cos, sin = rope_tables(Rope(12, reference), grid)
    row, column = grid[0] - 1, grid[1] - 2
    for channel in range(12):
        place, size = (row, grid[0]) if channel < 6 else (column, grid[1])
        angle = torch.tensor(place / size * (reference or size) * 10000 ** (-2 * (channel % 6 // 2) / 6))
        assert cos[row * grid[1] + column, channel] == pytest.approx(angle.cos().item(), abs=2e-6)
        assert sin[row * grid[1] + column, channel] == pytest.approx(angle.sin().item(), abs=2e-6)
    expected = (Rope(12, None if reference == grid[1] and grid[0] == grid[1] else reference), grid)
    assert read_rope(cos, sin) == expected
    assert read_rope(cos.half(), sin.half()) == expected


def test_relative_indices_by_a_loop() -> None:
    index = relative_position_index((2, 3))
    for one in range(6):
        for other in range(6):
            rows, columns = one // 3 - other // 3 + 1, one % 3 - other % 3 + 2
            assert index[1 + one, 1 + other] == rows * 5 + columns
    assert index[0, 1:].eq(15).all()
    assert index[1:, 0].eq(16).all()
    assert index[0, 0] == 17
