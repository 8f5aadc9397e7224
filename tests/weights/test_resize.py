"""Resizing against the original code's numbers, timm's functions and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.weights.resize import _ratio, resize_patch_kernel, resize_positions, resize_relative, resize_trunk


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def test_every_interpolation_is_the_original_one(shared: Path) -> None:
    golden = load_file(shared / "golden" / "interpolation.safetensors")
    for old, new in ((13, 20), (16, 24)):
        made = resize_relative(golden[f"in/rel_table_w{old}"], (old, old), (new, new))
        assert apart(made, golden[f"out/rel_table_w{new}"]) < 1e-5
    kernel = resize_patch_kernel(golden["in/patch_kernel_14"], (16, 16), "bicubic")
    assert apart(kernel, golden["out/patch_kernel_16"]) < 1e-5
    positions = resize_positions(golden["in/pos_embed_16x16"], (16, 16), (14, 14), prefix=1, rule="original")
    assert apart(positions, golden["out/pos_embed_14x14"]) < 1e-5


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_timms_rule_is_timms_function_on_grids_of_any_shape(prefix: int) -> None:
    table = drawn(1, prefix + 24, 6)
    made = resize_positions(table, (4, 6), (7, 5), prefix=prefix, rule="timm")
    theirs = resample_abs_pos_embed(table, new_size=[7, 5], old_size=[4, 6], num_prefix_tokens=prefix)
    assert apart(made, theirs) < 1e-6
    assert torch.equal(made[:, :prefix], table[:, :prefix])
    other = resize_positions(table, (4, 6), (7, 5), prefix=prefix, rule="original")
    assert apart(made, other) > 1e-2  # the two rules differ, even where the grid grows
    turned = resize_positions(table, (6, 4), (7, 5), prefix=prefix, rule="timm")
    assert apart(made, turned) > 1e-2  # the grid is not guessed


def test_positions_without_a_batch_axis_and_in_half_precision() -> None:
    table = drawn(1 + 16, 8)
    made = resize_positions(table, (4, 4), (6, 6), prefix=1, rule="original")
    assert apart(made, resize_positions(table[None], (4, 4), (6, 6), prefix=1, rule="original")[0]) == 0
    half = resize_positions(table.bfloat16(), (4, 4), (6, 6), prefix=1, rule="original")
    assert half.dtype == torch.bfloat16
    assert apart(half.float(), made) < 2e-2
    assert torch.equal(resize_positions(table, (4, 4), (4, 4), prefix=1, rule="timm"), table)


def test_the_wrong_grid_is_named() -> None:
    with pytest.raises(UserError, match=r"17 rows are not 1 \+ 5 x 5"):
        resize_positions(drawn(1, 17, 4), (5, 5), (6, 6), prefix=1, rule="timm")
    with pytest.raises(UserError, match=r"28 rows are not the 81 \+ 3 of a grid of 5 x 5"):
        resize_relative(drawn(28, 2), (5, 5), (6, 6))
    with pytest.raises(UserError, match="at least 3 patches"):
        resize_relative(drawn(12, 2), (2, 2), (4, 4))


def test_the_pseudo_inverse_keeps_what_a_kernel_answers() -> None:
    """A patch enlarged with timm's interpolation gives the same product; plain bicubic grows it with the area instead."""
    kernel, patch = drawn(5, 3, 14, 14), drawn(1, 3, 14, 14, seed=1)
    larger = F.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    answer = (kernel * patch).sum((1, 2, 3))
    kept = resize_patch_kernel(kernel, (16, 16), "pseudo-inverse")
    assert apart((kept * larger).sum((1, 2, 3)), answer) < 1e-3
    plain = resize_patch_kernel(torch.ones(1, 1, 14, 14), (16, 16), "bicubic")
    assert apart(plain, torch.ones(1, 1, 16, 16)) < 1e-6  # so that its sum is (16 / 14)^2 times the old one's
    assert torch.equal(resize_patch_kernel(kernel, (14, 14), "pseudo-inverse"), kernel)


def cubic(x: Tensor) -> Tensor:
    return 0.5 - x + 0.3 * x**2 - 0.02 * x**3


def laid_out(q: float, side: int) -> Tensor:
    """0, 1, 1 + q, ... and the same below 0, added up one by one."""
    places = [0.0]
    for power in range(side - 1):
        places.append(places[-1] + q**power)
    return torch.tensor([-place for place in reversed(places[1:])] + places, dtype=torch.float64)


@pytest.mark.parametrize("new", [6, 7, 9])
def test_a_cubic_comes_back_as_itself(new: int) -> None:
    """A spline through a cubic is the cubic; the outermost differences may be held, a little inside."""
    body = cubic(laid_out(_ratio(5, new), 5))[:, None].expand(9, 9)
    made = resize_relative(torch.cat([body.reshape(81, 1), torch.tensor([[7.0], [8.0], [9.0]])]), (5, 5), (new, new))
    wanted = cubic(torch.arange(1 - new, new).double())[1:-1, None].expand(2 * new - 3, 2 * new - 1)
    assert apart(made[:-3].reshape(2 * new - 1, 2 * new - 1)[1:-1], wanted) < 1e-9 * new**4
    assert made[-3:, 0].tolist() == [7.0, 8.0, 9.0]


def test_rows_and_columns_of_relative_positions_are_not_confused() -> None:
    """Grid 4 x 6 to 7 x 5, against the same with the axes exchanged; and a table of rows alone has equal columns."""
    table = drawn(7 * 11 + 3, 2)
    made = resize_relative(table, (4, 6), (7, 5))
    body = table[:-3].reshape(7, 11, 2).transpose(0, 1).reshape(77, 2)
    turned = resize_relative(torch.cat([body, table[-3:]]), (6, 4), (5, 7))
    assert apart(made[:-3].reshape(13, 9, 2), turned[:-3].reshape(9, 13, 2).transpose(0, 1)) < 1e-6
    assert torch.equal(made[-3:], table[-3:])
    rows = torch.cat([drawn(7, 1).expand(7, 11).reshape(77, 1), torch.zeros(3, 1)])
    columns = resize_relative(rows, (4, 6), (7, 5))[:-3].reshape(13, 9)
    assert apart(columns, columns[:, :1].expand(13, 9)) < 1e-5
    assert columns[:, 0].std() > 0.1
    assert torch.equal(resize_relative(table, (4, 6), (4, 6)), table)


def test_a_whole_trunk_is_resized_and_accounted_for() -> None:
    weights = {
        "v.cls_token": drawn(1, 1, 4), "v.reg_token": drawn(1, 2, 4), "v.pos_embed": drawn(1, 3 + 12, 4),
        "v.patch_embed.proj.weight": drawn(4, 3, 14, 14), "v.norm.weight": drawn(4),
        "v.blocks.0.attn.relative_position_bias_table": drawn(5 * 7 + 3, 2), "text.pos_embed": drawn(1, 9, 4),
    }
    before = {name: value.clone() for name, value in weights.items()}
    made, report = resize_trunk(
        weights, (3, 4), (4, 5), positions="original", kernel="bicubic", patch=(16, 16), prefix="v."
    )
    assert report.resized == ["v.pos_embed", "v.patch_embed.proj.weight", "v.blocks.0.attn.relative_position_bias_table"]
    assert report.reasons["v.patch_embed.proj.weight"] == "[4, 3, 14, 14] to [4, 3, 16, 16], rule bicubic"
    assert report.loaded == ["v.cls_token", "v.reg_token", "v.norm.weight", "text.pos_embed"]
    assert torch.equal(
        made["v.pos_embed"], resize_positions(weights["v.pos_embed"], (3, 4), (4, 5), prefix=3, rule="original")
    )
    assert torch.equal(
        made["v.blocks.0.attn.relative_position_bias_table"],
        resize_relative(weights["v.blocks.0.attn.relative_position_bias_table"], (3, 4), (4, 5)),
    )
    assert made["v.patch_embed.proj.weight"].shape == (4, 3, 16, 16)
    bare = {"pos_embed": weights["v.pos_embed"][:, 3:], "cls_token": weights["v.cls_token"]}  # no row for the class token
    alone, _ = resize_trunk(bare, (3, 4), (4, 5), positions="original", kernel="bicubic")
    assert torch.equal(alone["pos_embed"], made["v.pos_embed"][:, 3:])
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_an_openai_tower_is_resized_by_eva_clips_rule_and_its_text_tower_left_alone() -> None:
    """Aligned corners: the corner cells of a larger grid are the old ones."""
    weights = {
        "visual.class_embedding": drawn(6), "visual.positional_embedding": drawn(10, 6, seed=1),
        "visual.conv1.weight": drawn(6, 3, 4, 4, seed=2), "positional_embedding": drawn(10, 6, seed=3),
    }
    made, report = resize_trunk(
        weights, (3, 3), (5, 5), positions="eva-clip", kernel="bicubic", patch=(8, 8), prefix="visual."
    )
    old, new = weights["visual.positional_embedding"], made["visual.positional_embedding"]
    cells = old[1:].reshape(1, 3, 3, 6).permute(0, 3, 1, 2)
    resized = F.interpolate(cells, (5, 5), mode="bicubic", align_corners=True).permute(0, 2, 3, 1).reshape(25, 6)
    assert torch.allclose(new, torch.cat([old[:1], resized]), atol=1e-6)
    assert torch.allclose(new[[1, 5, 21, 25]], old[[1, 3, 7, 9]], atol=1e-6)
    assert sorted(report.resized) == ["visual.conv1.weight", "visual.positional_embedding"]
    assert made["positional_embedding"] is weights["positional_embedding"]
    assert made["visual.conv1.weight"].shape == (6, 3, 8, 8)
