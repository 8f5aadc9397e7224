"""Positions from windows of a large table (CPE), against the formula number by number, and in a run of several sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor

import eva_mim
from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.students.heads import HeadPlan
from eva_mim.students.masked import MaskedStudent
from eva_mim.students.positions import top_left, window
from tests.tiny import MIM, records, run, same_weights, teacher_file, write_recipe


def table(side: int, width: int = 3) -> Tensor:
    """Channel 0 is the column, channel 1 the row, from 0 to side - 1: what a window reads tells where it lies."""
    row, column = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    return torch.stack([column, row, torch.randn(side, side, generator=torch.Generator().manual_seed(0))])[None, :width]


def test_windows_have_the_sides_of_the_law() -> None:
    torch.manual_seed(0)
    found = window(table(101), (5, 7), 4000)
    width = (found[:, 0, 0, -1] - found[:, 0, 0, 0]) / 100
    height = (found[:, 1, -1, 0] - found[:, 1, 0, 0]) / 100
    assert width.max() <= 1 + 1e-6
    assert height.max() <= 1 + 1e-6
    assert found[:, :2].min() >= -1e-4
    assert found[:, :2].max() <= 100 + 1e-4
    free = (width < 0.999) & (height < 0.999)
    scale, aspect = (width * height).sqrt()[free], (width / height)[free].sqrt()
    assert scale.min().item() == pytest.approx(math.sqrt(0.1), abs=0.01)
    assert aspect.min().item() == pytest.approx(3 / 4, abs=0.01)
    assert aspect.max().item() == pytest.approx(4 / 3, abs=0.01)
    assert aspect.log().mean().abs() < 0.01  # log-uniform
    narrow = scale[scale < 0.7]  # where nothing is cut off, the law is uniform
    assert narrow.mean().item() == pytest.approx((math.sqrt(0.1) + 0.7) / 2, abs=0.01)
    # Places lie evenly between the window's edges.
    steps = found[:, 0, 0].diff(dim=1)
    assert (steps - steps.mean(1, keepdim=True)).abs().max() < 1e-3
    left = found[:, 0, 0, 0][free] / (100 * (1 - width[free]))  # uniform over all places
    assert left.mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_window_reads_the_table_bilinearly() -> None:
    torch.manual_seed(1)
    whole = table(9)
    found = window(whole, (3, 4), 20)
    for image in range(20):
        for row in range(3):
            for column in range(4):
                x, y = found[image, 0, row, column].item(), found[image, 1, row, column].item()
                x0, y0 = min(7, int(x)), min(7, int(y))
                dx, dy = x - x0, y - y0
                corners = whole[0, 2, y0 : y0 + 2, x0 : x0 + 2]
                wanted = torch.tensor([[1 - dy], [dy]]) * torch.tensor([[1 - dx, dx]]) * corners
                assert found[image, 2, row, column].item() == pytest.approx(wanted.sum().item(), abs=1e-4)


@pytest.mark.parametrize("grid", [(8, 8), (4, 4), (3, 6), (16, 16)])
@torch.no_grad()
def test_held_out_images_get_the_positions_of_timms_radio(grid: tuple[int, int]) -> None:
    """timm's NaFlexViT has RADIO's rule: aspect ratio kept, bilinear without antialias."""
    config = NaFlexVitCfg(embed_dim=8, depth=1, num_heads=2, pos_embed_grid_size=(16, 16), pos_embed_interp_mode="bilinear",
                          pos_embed_ar_preserving=True, pos_embed_antialias=False)
    model = NaFlexVit(config)
    embeds: Any = model.embeds
    embeds.pos_embed.copy_(torch.randn(1, 16, 16, 8, generator=torch.Generator().manual_seed(0)))
    nothing = torch.zeros(1, grid[0] * grid[1], 8)
    embeds._apply_learned_pos_embed(nothing, grid_size=list(grid))
    ours = top_left(embeds.pos_embed.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
    assert (ours - nothing).abs().max() < 1e-5


def student(**settings: Any) -> MaskedStudent:
    torch.manual_seed(0)
    tree = {"name": "vit_nano_patch4_32", "patch_size": 8, "positions": "cropped", "position_grid": 12} | settings
    return MaskedStudent(MaskedSettings.model_validate(tree), {"a": HeadPlan(5)}, None, [48])


@torch.no_grad()
def test_training_draws_windows_and_evaluation_does_not() -> None:
    made, images = student(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    made.eval()
    assert torch.equal(made.tokens(images), made.tokens(images))
    made.train()
    assert not torch.equal(made.tokens(images), made.tokens(images))
    one = made.tokens(images[:1].expand(2, -1, -1, -1))
    assert not torch.equal(one[0], one[1])  # a window for each image
    assert made.trunk.pos_embed.shape == (1, 1 + 144, 96)


def test_other_trunks_are_refused() -> None:
    with pytest.raises(UserError, match="vit_base_patch16_rope_224 is no plain ViT with a table of positions"):
        student(name="vit_base_patch16_rope_224", patch_size=16, image_size=32)


@pytest.mark.slow
@torch.no_grad()
def test_a_student_of_three_sizes_is_opened_by_timm_and_at_any_size_by_us(tmp_path: Path) -> None:
    teachers = {"vit": {"kind": "timm", "name": "vit_nano_patch4_32", "image_size": 16, "weights": str(teacher_file(tmp_path)),
                        "interpolate": "student"}}
    tree = {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teachers": teachers, "mask": {"ratio": 0.0}, "groups": {"all": {"batch": 24, "image_size": [32, 48, 24]}},
        "student": MIM["student"] | {"positions": "cropped", "position_grid": 16, "registers": 2},
    }
    recipe = write_recipe(tmp_path, tree)
    out = tmp_path / "run"
    run("mim", recipe, out)
    found = records(out)
    assert found[-1]["loss"] < found[0]["loss"]
    model, trunk = eva_mim.load(out), timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in (model.mean, model.std))
    ours: Any = model(images)
    assert torch.allclose(ours.spatial, trunk.forward_features((images - mean) / std)[:, 3:], atol=1e-5)
    whole = load_file(out / "head.safetensors")["position_table"]
    assert whole.shape == (1, 3 + 256, 96)
    wide: Any = model(torch.rand(1, 3, 24, 64))
    assert wide.spatial.shape == (1, 24, 96)
    # The next stage takes the whole table over.
    run("mim", recipe, tmp_path / "next", f"init_from={out}", "optim.lr=1e-30", "run.epochs=1")
    assert torch.equal(load_file(tmp_path / "next" / "head.safetensors")["position_table"], whole)
    same_weights(tmp_path / "next" / "model.safetensors", out / "model.safetensors")
