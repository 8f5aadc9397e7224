"""Windowed attention (ViTDet): against a loop over windows, and in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eva_mim
from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.students.heads import HeadPlan
from eva_mim.students.masked import MaskedStudent
from eva_mim.students.windows import sides_of
from tests.tiny import MIM, losses, records, run, run_until, same_weights, write_recipe


def student(**settings: Any) -> MaskedStudent:
    torch.manual_seed(0)
    tree = {"name": "vit_nano_patch4_32", "registers": 1, "windows": {"sides": [2, 4], "global_blocks": 2}} | settings
    return MaskedStudent(MaskedSettings.model_validate(tree), {"a": HeadPlan(5)}).eval()


def by_hand(made: Any, images: Tensor, side: int) -> Tensor:
    """Blocks 1 and 3 of 0 to 3 see everything; 0 and 2 each window alone, without class and register tokens."""
    trunk = made.trunk
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (made.mean, made.std))
    x = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed((images / 255 - mean) / std))))
    for number, block in enumerate(trunk.blocks):
        hooks = block._forward_pre_hooks.copy(), block._forward_hooks.copy()
        block._forward_pre_hooks.clear()
        block._forward_hooks.clear()
        if number % 2:
            x = block(x)
        else:
            grid, found = x[:, 2:].unflatten(1, (8, 8)), torch.zeros(len(x), 8, 8, x.shape[-1])
            for top in range(0, 8, side):
                for left in range(0, 8, side):
                    part = grid[:, top : top + side, left : left + side]
                    found[:, top : top + side, left : left + side] = block(part.flatten(1, 2)).unflatten(1, (side, side))
            x = torch.cat([x[:, :2], found.flatten(1, 2)], 1)
        block._forward_pre_hooks.update(hooks[0])
        block._forward_hooks.update(hooks[1])
    return trunk.norm(x)


@pytest.mark.parametrize("side", [2, 4, 8])
@torch.no_grad()
def test_windows_are_those_of_a_loop(side: int) -> None:
    made, images = student(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert (made.tokens(images, window=side) - by_hand(made, images, side)).abs().max() < 1e-5
    whole = made.tokens(images)
    assert (made.tokens(images, window=side) - whole).abs().max() > 1e-3
    assert torch.equal(made.tokens(images), whole)


def test_only_sides_that_divide_the_grid_are_drawn() -> None:
    assert sides_of((12, 8), (2, 3, 4, 6)) == [2, 4]
    for settings, said in (
        ({"windows": {"sides": [3]}}, r"student\.windows\.sides=\[3\]: none divides the grid 8x8"),
        ({"windows": {"sides": [2], "global_blocks": 3}}, r"student\.windows\.global_blocks=3 must divide the 4 blocks"),
        ({"form": "visible"}, "they are for a plain ViT of student.form=mask_tokens"),
    ):
        with pytest.raises(UserError, match=said):
            student(**settings)  # type: ignore[arg-type]


@pytest.mark.slow
@torch.no_grad()
def test_a_run_draws_a_side_for_each_step_and_goes_on_exactly(tmp_path: Path) -> None:
    tree = MIM | {"student": MIM["student"] | {"windows": {"sides": [2, 4], "global_blocks": 2}}}
    recipe = write_recipe(tmp_path, tree)
    run("mim", recipe, tmp_path / "one")
    assert records(tmp_path / "one")[-1]["loss"] < records(tmp_path / "one")[0]["loss"]
    run("mim", recipe, tmp_path / "two", "run.engine=deepspeed", "run.micro_batch=6", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=5e-5)  # a side is drawn for all processes
    run_until(3, "mim", recipe, tmp_path / "killed")
    run("mim", recipe, tmp_path / "killed")
    same_weights(tmp_path / "killed" / "model.safetensors", tmp_path / "one" / "model.safetensors")

    model, images = eva_mim.load(tmp_path / "one"), torch.rand(1, 3, 32, 48)
    whole: Any = model(images)
    model.window = 2
    cut: Any = model(images)
    assert (cut.spatial - whole.spatial).abs().max() > 1e-3
    model.window = 3
    with pytest.raises(UserError, match="window=3, images of 32 x 48 px: windows do not divide the grid"):
        model(images)
