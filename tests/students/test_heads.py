"""Heads against their formulas in float64, and which tokens they read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.students import HeadSettings, MaskedSettings
from eva_mim.students.heads import AttentionHead, HeadPlan, Patches, ResidualMlp, build_heads, last_layer, mlp, predict
from eva_mim.students.masked import MaskedStudent
from eva_mim.tasks.grids import cells_of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def test_mlp_is_linear_norm_gelu_linear() -> None:
    made, rows = mlp(6, 5, HeadSettings(kind="mlp", width=9)).double(), drawn(4, 6)
    first, last = made[0], made[3]  # type: ignore[index]
    hidden = gelu(normed(rows @ first.weight.T + first.bias))
    assert (made(rows) - (hidden @ last.weight.T + last.bias)).abs().max() < 1e-12
    assert last_layer(made) is last


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_mlp_v2_has_residual_blocks(blocks: int) -> None:
    made, rows = ResidualMlp(6, 5, HeadSettings(kind="mlp_v2", width=9, blocks=blocks)).double(), drawn(4, 6)
    x = rows @ made.first.weight.T + made.first.bias
    for block in made.blocks:
        x = x + gelu(normed(x)) @ block[2].weight.T + block[2].bias  # type: ignore[index]
    assert len(made.blocks) == blocks
    assert (made(rows) - (gelu(normed(x)) @ made.last[2].weight.T + made.last[2].bias)).abs().max() < 1e-12  # type: ignore[operator]


def test_an_attention_head_mixes_all_tokens_before_rows_are_chosen() -> None:
    made = AttentionHead(32, 5, HeadSettings(kind="attention", width=8)).eval()
    for block in made.mixing:
        nn.init.constant_(block.ls1.gamma, 1.0)  # type: ignore[arg-type]
    heads = build_heads(32, 32, {"a": HeadPlan(5)}, HeadSettings())
    heads.spatial["a"] = made  # type: ignore[index]
    tokens = drawn(2, 9, 32).float()
    index = torch.tensor([0, 5])
    found = predict(heads.spatial, heads.cells, Patches(tokens, 1, (2, 4), index))["a"]  # type: ignore[index]
    other = tokens.clone()
    other[0, 7] += drawn(32, seed=1).float()  # neither row 0 nor row 5, but of the same image as both
    assert (predict(heads.spatial, heads.cells, Patches(other, 1, (2, 4), index))["a"] - found).abs().max() > 1e-4  # type: ignore[index]
    other = tokens.clone()
    other[1] += drawn(9, 32, seed=2).float()
    assert torch.equal(predict(heads.spatial, heads.cells, Patches(other, 1, (2, 4), index))["a"], found)  # type: ignore[index]


def test_hidden_layers_are_as_wide_as_the_widest_teacher() -> None:
    plans = {"a": HeadPlan(5, 40, HeadSettings(kind="mlp")), "b": HeadPlan(24, 0, HeadSettings(kind="mlp", width=7))}
    spatial, summary, _ = build_heads(6, 6, plans, HeadSettings())
    assert spatial["a"][0].out_features == summary["a"][0].out_features == 40  # type: ignore[index]
    assert spatial["b"][0].out_features == 7  # type: ignore[index]
    assert "b" not in summary


def test_the_cells_of_a_patch_come_together_row_by_row() -> None:
    """Against a grid of numbers cut into blocks."""
    fine = torch.arange(2 * 6 * 4).view(2, 6, 4)
    blocks = fine.unfold(1, 2, 2).unfold(2, 2, 2).reshape(2 * 3 * 2, 4)
    index = torch.tensor([0, 3, 5, 6, 11])
    assert torch.equal(fine.flatten()[cells_of(index, (3, 2), 2)].view(5, 4), blocks[index])
    assert cells_of(index, (3, 2), 1) is index


def student(targets: dict[str, HeadPlan], **settings: Any) -> MaskedStudent:
    torch.manual_seed(0)
    name = {"name": "vit_nano_patch4_32", "patch_size": 8}
    return MaskedStudent(MaskedSettings.model_validate(name | settings), targets).eval()


BOTH = {"clip": HeadPlan(10, 12), "sam": HeadPlan(6), "dino": HeadPlan(8, 7)}


@torch.no_grad()
def test_each_teacher_has_a_class_token_of_its_own() -> None:
    made = student(BOTH, class_tokens="per_teacher", registers=9)
    images, index = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    assert (made.prefix, made.class_tokens) == (10, {"clip": 0, "dino": 1})
    found: Any = made(images, None, index)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "clip": (4, 10), "sam": (4, 6), "dino": (4, 8), "clip_summary": (2, 12), "dino_summary": (2, 7)}
    tokens = made.tokens(images)
    assert torch.equal(found["dino_summary"], made.summary_head["dino"](tokens[:, 1]))
    assert torch.equal(found["clip_summary"], made.summary_head["clip"](tokens[:, 0]))
    assert torch.equal(made.features(images)[1], tokens[:, :2].flatten(1))  # type: ignore[arg-type]


@torch.no_grad()
def test_one_token_or_the_mean_of_the_patches_serves_all() -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    shared, mean = student(BOTH), student(BOTH, class_tokens="none")
    tokens = shared.tokens(images)
    found: Any = shared(images, None, torch.arange(1))
    assert torch.equal(found["dino_summary"], shared.summary_head["dino"](tokens[:, 0]))
    found = mean(images, None, torch.arange(1))
    assert torch.equal(found["dino_summary"], mean.summary_head["dino"](mean.tokens(images)[:, 1:].mean(1)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"class_tokens": "per_teacher"}, r"clip, dino need 2 class tokens, and vit_nano.* has 1.*set student\.registers=1"),
        ({"name": "vit_base_patch16_siglip_224", "patch_size": 16, "image_size": 32}, "has no class token; set it to none"),
        ({"name": "resnet18", "patch_size": None, "registers": 2}, r"student\.registers: resnet18 has no register tokens"),
    ],
)
def test_tokens_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        student(BOTH, **settings)


def test_attention_that_cannot_be_divided_is_refused() -> None:
    plan = HeadPlan(5, settings=HeadSettings(kind="attention"), path="teachers.a.head")
    with pytest.raises(UserError, match=r"teachers\.a\.head\.kind: .*16 attention heads.* 40, the student's width"):
        build_heads(40, 40, {"a": plan}, HeadSettings())
