"""timm trunks as teachers: any block of the plain transformers against hooks on timm's own pass; the others at their end."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.teachers import TeacherSettings, build_teacher, matched
from eva_mim.teachers.frozen import FrozenTeacher
from eva_mim.teachers.trunk import read_trunk
from tests.teachers.test_open_clip import one_patch_at_a_time

TRUNKS = {
    "vit_small_patch14_dinov2": 56,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_small_patch16_dinov3": 64,
    "vit_base_patch16_siglip_224": 64,
    "vit_base_patch16_siglip_gap_224": 64,
    "vit_base_patch16_radio_v3": 64,
    "naflexvit_base_patch16_radio_v3": 64,
    "aimv2_large_patch14_224": 56,
    "eva02_tiny_patch14_224": 56,
    "beit_base_patch16_224": 64,
    "vit_pe_core_base_patch16_224": 64,
}
"""Families that people distil, by timm's name, and an image size for 4 x 4 patches."""
NORM_BEHIND_POOLING = {"eva02_tiny_patch14_224", "beit_base_patch16_224"}
WITHOUT_NORM = {"vit_base_patch16_radio_v3", "naflexvit_base_patch16_radio_v3"}


def small(name: str) -> Any:
    """The architecture with three narrow blocks, all parameters random."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    fixed = {"img_size": TRUNKS[name]} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    torch.manual_seed(0)
    trunk = timm.create_model(name, num_classes=0, depth=3, embed_dim=64, num_heads=4, **fixed).eval()
    for parameter in trunk.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return trunk


def norm_by_hand(tokens: Tensor, norm: nn.Module) -> Tensor:
    """LayerNorm, or RMSNorm where the layer has no bias."""
    weight, eps = norm.weight, norm.eps
    if getattr(norm, "bias", None) is None:
        return tokens / (tokens.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return F.layer_norm(tokens, (64,), weight, norm.bias, eps)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_every_block_of_a_plain_transformer(name: str) -> None:
    """The patches of a block are what timm's own pass leaves there; the summary is timm's whatever the block."""
    trunk = small(name)
    images = torch.randn(2, 3, TRUNKS[name], TRUNKS[name])
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in trunk.blocks]
    summary = trunk.forward_head(trunk.forward_features(images), pre_logits=True)
    for handle in handles:
        handle.remove()
    for layer in (0, 1, 2, -1, -3):
        for final_norm in (True, False):
            reading = read_trunk(trunk, TeacherSettings(kind="timm", name=name, layer=layer, final_norm=final_norm))
            assert (reading.layer, reading.blocks, reading.project) == (layer % 3, 3, False)
            assert reading.final_norm == (final_norm and name not in WITHOUT_NORM)
            features = reading.features(images)
            expected = seen[layer][:, seen[layer].shape[1] - 16 :]
            if reading.final_norm:
                expected = norm_by_hand(expected, trunk.fc_norm if name in NORM_BEHIND_POOLING else trunk.norm)
            assert features.grid == (4, 4)
            assert (features.spatial - expected).abs().max() < 1e-5
            assert torch.allclose(features.summary, summary, atol=1e-6)


@pytest.mark.parametrize("name", TRUNKS)
@torch.no_grad()
def test_patches_are_the_trunks_last_tokens(name: str) -> None:
    """Without settings: what `forward_features` gives, less the other tokens, with the norm that timm puts behind pooling."""
    trunk = small(name)
    images = torch.randn(2, 3, TRUNKS[name], TRUNKS[name])
    expected = trunk.forward_features(images)[:, trunk.num_prefix_tokens :]
    if name in NORM_BEHIND_POOLING:
        expected = norm_by_hand(expected, trunk.fc_norm)
    found = read_trunk(trunk, TeacherSettings(kind="timm", name=name)).features(images).spatial
    assert (found - expected).abs().max() < 1e-5
    assert expected.std(1).mean() > 1e-2


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_nano_patch4_32", None), ("vit_nano_patch4_32", 48), ("convnet_nano_32", 48), ("test_vit2", None),
     ("eva02_tiny_patch14_224", 28), ("test_convnext", 64)],
)
def test_a_timm_teachers_patches_are_after_its_final_norm(name: str, size: int | None) -> None:
    """`Features.spatial` by the contract: the norm that timm applies after pooling belongs to every patch as well."""
    torch.manual_seed(0)
    teacher = build_teacher(TeacherSettings(kind="timm", name=name, image_size=size))
    assert teacher.image_size == (size or teacher.image_size)
    images = torch.randint(0, 256, (2, 3, teacher.image_size, teacher.image_size), dtype=torch.uint8)
    (trunk,) = (value for value in vars(teacher).values() if isinstance(value, nn.Module))
    with torch.no_grad():
        pixels = torch.stack([(images[:, c].float() / 255 - teacher.mean[c]) / teacher.std[c] for c in range(3)], dim=1)
        inner = trunk.forward_features(pixels)  # type: ignore[operator]
        if getattr(trunk, "global_pool", "") == "token":
            expected = inner[:, trunk.num_prefix_tokens :]
        else:
            prefix = getattr(trunk, "num_prefix_tokens", 0)
            expected = one_patch_at_a_time(inner, prefix, lambda part: trunk.forward_head(part, pre_logits=True))  # type: ignore[operator]
    assert (teacher(images).spatial - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def test_a_trunk_that_is_read_at_its_end_alone_says_so() -> None:
    for settings in ({"layer": 1}, {"final_norm": False}):
        with pytest.raises(UserError, match="convnet_nano_32 has no row of equal blocks and is read at its end alone"):
            build_teacher(TeacherSettings(kind="timm", name="convnet_nano_32", **settings))
    facts = build_teacher(TeacherSettings(kind="timm", name="convnet_nano_32")).facts()
    assert (facts["network"], facts["layer"], facts["blocks"], facts["project"]) == ("ByobNet", None, None, False)


def test_a_timm_teacher_refuses_what_it_cannot_do() -> None:
    def build(**settings: Any) -> FrozenTeacher:
        made = build_teacher(TeacherSettings(kind="timm", **{"name": "vit_nano_patch4_32", **settings}))
        assert isinstance(made, FrozenTeacher)
        return made

    with pytest.raises(UserError, match="vit_nano_patch4_32 has 4 blocks, 0 to 3"):
        build(layer=4)
    with pytest.raises(UserError, match=r"teacher\.project: vit_nano_patch4_32 has no projection"):
        build(project=True)
    with pytest.raises(UserError, match=r"teacher\.weights: /nonexistent does not exist"):
        build(weights="/nonexistent")
    with pytest.raises(UserError, match="vit_nanno"):
        build(name="vit_nanno")
    with pytest.raises(UserError, match=r"teacher\.image_size: 34 px are not a whole number for each of the 8 patches"):
        build(image_size=34)
    assert build(image_size=40, layer=-3).facts() | {"mean": 0, "std": 0, "parameters": 0} == {
        "network": "VisionTransformer", "parameters": 0, "image_size": 40, "grid": [10, 10], "width": 96, "mean": 0, "std": 0,
        "layer": 1, "blocks": 4, "final_norm": True, "project": False,
        "summary": "pooled",
    }


@pytest.mark.parametrize(("name", "own"), [("vit_nano_patch4_32", 32), ("convnet_nano_32", 32)])
@torch.no_grad()
def test_a_teacher_that_follows_is_at_each_size_the_one_built_for_it(name: str, own: int) -> None:
    settings = TeacherSettings(kind="timm", name=name, image_size="match")
    torch.manual_seed(0)
    alone = build_teacher(settings.model_copy(update={"image_size": None}))
    stride = own // alone.grid[0]
    grids = [(3, 3), (5, 5), (8, 8)]
    torch.manual_seed(0)
    following = build_teacher(matched(settings, grids))
    assert (following.image_size, following.grid) == (own, alone.grid)
    assert following.facts()["follows"] == [3 * stride, 5 * stride, 8 * stride]
    assert following.seen((7, 7)) == (own, alone.grid)
    weights = alone.network.state_dict()  # type: ignore[attr-defined]
    for grid in grids:
        side, there = following.seen(grid)
        assert there == grid
        fixed = build_teacher(matched(settings, [grid]))
        assert (fixed.image_size, fixed.grid) == (side, grid)
        resized = dict(weights)
        if "pos_embed" in weights:
            rows = fixed.network.state_dict()["pos_embed"].shape[1]  # type: ignore[attr-defined]
            resized["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], list(grid), num_prefix_tokens=rows - grid[0] ** 2)
        fixed.network.load_state_dict(resized)  # type: ignore[attr-defined]
        images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
        found, wanted = following(images), fixed(images)
        assert found.grid == grid
        assert (found.spatial - wanted.spatial).abs().max() < 1e-5
        assert (found.summary - wanted.summary).abs().max() < 1e-5
