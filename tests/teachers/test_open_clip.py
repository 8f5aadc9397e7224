"""Patch features of CLIP towers: the original code's, any block by hand, and what a timm tower does to its pooled vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

import eva_mim.trunks.small  # noqa: F401  (registers the small architectures)
from eva_mim.core.contracts import Features
from eva_mim.core.errors import UserError
from eva_mim.teachers import TeacherSettings
from eva_mim.teachers.frozen import FrozenTeacher
from eva_mim.teachers.open_clip import read_tower

default_cfgs = generate_default_cfgs({"golden_clip_eva01_g": {"input_size": (3, 84, 84), "first_conv": "", "classifier": "head"}})


@register_model
def golden_clip_eva01_g(pretrained: bool = False, **options: Any) -> Eva:
    """EVA01-CLIP-g of the fixture."""
    shape = {"img_size": 84, "patch_size": 14, "embed_dim": 88, "depth": 2, "num_heads": 4, "mlp_ratio": 384 / 88}
    return build_model_with_cfg(Eva, "golden_clip_eva01_g", pretrained, **(shape | options))


def read(tower: nn.Module, images: Tensor, **settings: Any) -> Features:
    """Features of normalised pixels."""
    return read_tower(tower, TeacherSettings(name="tower", **settings)).features(images)


def openai_tower(golden: dict[str, Tensor], grid: tuple[int, int], positions: Tensor) -> VisionTransformer:
    """open_clip's tower with the fixture's constructor and weights."""
    tower = VisionTransformer(
        image_size=(grid[0] * 14, grid[1] * 14),  # type: ignore[arg-type]
        patch_size=14, width=80, layers=2, heads=5, mlp_ratio=4.0, output_dim=48, act_layer=QuickGELU,
    )
    prefix = "state_dict/visual."
    state = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    tower.load_state_dict(state | {"positional_embedding": positions})
    return tower.eval()


@pytest.mark.parametrize(("name", "grid"), [("", (8, 8)), ("large_", (12, 12)), ("rect_", (8, 12))])
@torch.no_grad()
def test_an_openai_tower_gives_the_original_codes_features(shared: Path, name: str, grid: tuple[int, int]) -> None:
    """Other sizes: positions resized by hand as the fixture says (bicubic, no antialias, class row kept)."""
    golden = load_file(shared / "golden" / "openai_visual.safetensors")
    positions = golden["state_dict/visual.positional_embedding"]
    if grid != (8, 8):
        cells = positions[1:].T.reshape(1, 80, 8, 8)
        cells = F.interpolate(cells, scale_factor=(grid[0] / 8, grid[1] / 8), mode="bicubic")
        positions = torch.cat([positions[:1], cells.reshape(80, -1).T])
    if name == "large_":
        assert torch.allclose(positions, golden["out/large_pos_embed"], atol=1e-5)
    tower = openai_tower(golden, grid, positions)
    images = golden[f"in/{name}image"]
    summary = tower(images)
    features = read(tower, images)
    assert features.grid == grid
    assert (features.spatial - golden[f"out/{name}dense_features"]).abs().max() < 2e-5
    assert torch.allclose(features.summary, summary, atol=1e-6)  # the tower's own answer


@pytest.mark.parametrize("project", [None, True, False])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("layer", [0, 1, -1, -2])
@torch.no_grad()
def test_an_openai_towers_blocks_by_hand(shared: Path, layer: int, final_norm: bool, project: bool | None) -> None:
    """Patch by patch and block by block, with the fixture's weights."""
    golden = load_file(shared / "golden" / "openai_visual.safetensors")
    state = {key.removeprefix("state_dict/visual."): value for key, value in golden.items()}
    tower = openai_tower(golden, (8, 8), state["positional_embedding"])
    summary = tower(golden["in/image"])
    cells = F.unfold(golden["in/image"], 14, stride=14).transpose(1, 2) @ state["conv1.weight"].flatten(1).T
    tokens = torch.cat([state["class_embedding"].expand(2, 1, 80), cells], 1) + state["positional_embedding"]
    tokens = F.layer_norm(tokens, (80,), state["ln_pre.weight"], state["ln_pre.bias"])
    for number in range(layer % 2 + 1):
        tokens = block_by_hand(tokens, {key.removeprefix(f"transformer.resblocks.{number}."): v for key, v in state.items()})
    expected = tokens[:, 1:]
    if final_norm:
        expected = F.layer_norm(expected, (80,), state["ln_post.weight"], state["ln_post.bias"])
    if project is not False:
        expected = expected @ state["proj"]
    features = read(tower, golden["in/image"], layer=layer, final_norm=final_norm, project=project)
    assert (features.spatial - expected).abs().max() < 2e-5
    if layer == -1 and final_norm and project is not False:
        assert (expected - golden["out/dense_features"]).abs().max() < 2e-5
    assert torch.allclose(features.summary, summary, atol=1e-5)  # whatever the patches are, the summary is the tower's


def block_by_hand(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """OpenAI's residual block: 5 heads, QuickGELU."""
    def normed(name: str) -> Tensor:
        return F.layer_norm(x, (80,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(value: Tensor, name: str) -> Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    inputs = F.linear(normed("ln_1"), state["attn.in_proj_weight"], state["attn.in_proj_bias"])
    query, key, value = (part.reshape(*x.shape[:2], 5, 16).transpose(1, 2) for part in inputs.chunk(3, dim=-1))
    mixed = (query @ key.transpose(-1, -2) / 4).softmax(-1) @ value
    x = x + linear(mixed.transpose(1, 2).flatten(2), "attn.out_proj")
    hidden = linear(normed("ln_2"), "mlp.c_fc")
    return x + linear(hidden * torch.sigmoid(1.702 * hidden), "mlp.c_proj")


@torch.no_grad()
def test_an_eva_clip_tower_gives_the_original_codes_features(shared: Path) -> None:
    """EVA-02's teacher: final norm, then the head with its bias on every patch."""
    golden = load_file(shared / "golden" / "clip_eva01_g.safetensors")
    state = {key.removeprefix("state_dict/"): value for key, value in golden.items() if key.startswith("state_dict/visual.")}
    tower = TimmModel("golden_clip_eva01_g", 56, image_size=84, pool="token", proj="").eval()
    tower.trunk.load_state_dict(checkpoint_filter_fn(state, tower.trunk))
    images, last = golden["in/image"], golden["out/vision_last_block_tokens"][:, 1:]
    features = read(tower, images)
    assert features.grid == (6, 6)
    assert (features.spatial - golden["out/dense_teacher_features"]).abs().max() < 2e-5
    assert (features.summary - golden["out/image_embed_unnormalised"]).abs().max() < 1e-5
    raw = read(tower, images, final_norm=False, project=False)
    assert (raw.spatial - last).abs().max() < 2e-5
    normed = F.layer_norm(last, (88,), state["visual.norm.weight"], state["visual.norm.bias"], 1e-6)
    bare = read(tower, images, project=False)
    assert (bare.spatial - normed).abs().max() < 2e-5
    assert (bare.summary - golden["out/image_embed_unnormalised"]).abs().max() < 1e-5
    straight = read(tower, images, final_norm=False)
    assert (straight.spatial - F.linear(last, state["visual.head.weight"], state["visual.head.bias"])).abs().max() < 2e-5
    earlier = read(tower, images, layer=0, final_norm=False, project=False).spatial
    after = tower.trunk.blocks[1](torch.cat([class_token_after(tower, images), earlier], dim=1))  # block 1 on block 0's output
    assert (after[:, 1:] - last).abs().max() < 2e-5


def class_token_after(tower: TimmModel, images: Tensor) -> Tensor:
    """[B, 1, 88] class token after block 0, as timm's own forward pass sees it."""
    seen: list[Tensor] = []
    handle = tower.trunk.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output[:, :1]))
    tower(images)
    handle.remove()
    return seen[0]


def timm_tower(name: str, size: int, pool: str = "avg", proj: str = "linear") -> TimmModel:
    """A random tower whose norms are not the identity."""
    torch.manual_seed(0)
    tower = TimmModel(name, 24, image_size=size, pool=pool, proj=proj)
    generator = torch.Generator().manual_seed(1)
    for module in tower.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) and module.weight is not None:
            module.weight.data.add_(0.3 * torch.randn(module.weight.shape, generator=generator))
            module.bias.data.add_(0.3 * torch.randn(module.bias.shape, generator=generator))
    return tower.eval()


def one_patch_at_a_time(features: Tensor, prefix: int, head: Callable[[Tensor], Tensor]) -> Tensor:
    """The model's own pooling and head, given a map (or tokens) of a single patch: what "per patch" means."""
    if features.ndim == 4:
        parts = [features[:, :, r : r + 1, c : c + 1] for r in range(features.shape[2]) for c in range(features.shape[3])]
    else:
        parts = [torch.cat([features[:, :prefix], features[:, k : k + 1]], 1) for k in range(prefix, features.shape[1])]
    return torch.stack([head(part) for part in parts], dim=1)


TOWERS = [("convnet_nano_32", 32), ("test_resnet", 64), ("vit_nano_patch4_32", 32), ("test_vit2", 160), ("test_convnext", 64)]


@pytest.mark.parametrize("proj", ["linear", "mlp", ""])
@pytest.mark.parametrize(("name", "size"), TOWERS)
@torch.no_grad()
def test_a_timm_towers_patches_go_through_its_own_head(name: str, size: int, proj: str) -> None:
    tower = timm_tower(name, size, proj=proj)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    features = read(tower, images)
    inner = tower.trunk.forward_features(images)
    expected = one_patch_at_a_time(
        inner, getattr(tower.trunk, "num_prefix_tokens", 0), lambda part: tower.head(tower.trunk.forward_head(part))
    )
    assert (features.spatial - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert torch.allclose(features.summary, tower(images), atol=1e-6)
    assert expected.std(1).mean() > 1e-3


@pytest.mark.parametrize(("name", "size"), [("convnet_nano_32", 32), ("test_resnet", 64), ("vit_nano_patch4_32", 32)])
@torch.no_grad()
def test_the_mean_of_the_patches_is_the_summary(name: str, size: int) -> None:
    """Where nothing but a linear layer follows the pooling."""
    tower = timm_tower(name, size)
    features = read(tower, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2)))
    assert torch.allclose(features.spatial.mean(1), features.summary, atol=1e-5)
    assert features.summary.abs().max() > 1e-2


@pytest.mark.parametrize("name", ["convnet_nano_32", "vit_nano_patch4_32"])
@pytest.mark.parametrize("proj", ["linear", ""])
@torch.no_grad()
def test_a_timm_tower_without_its_projection(name: str, proj: str) -> None:
    """Patches are as wide as the trunk; the summary is the tower's answer."""
    tower = timm_tower(name, 32, proj=proj)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    features = read(tower, images, project=False)
    assert features.spatial.shape[-1] == tower.trunk.num_features
    assert torch.allclose(features.summary, tower(images), atol=1e-6)
    if name == "convnet_nano_32" or proj:  # no norm between the pooling and the projection
        projection = tower.head.proj if proj else tower.trunk.get_classifier()
        assert torch.allclose(projection(features.spatial.mean(1)), features.summary, atol=1e-5)


@torch.no_grad()
def test_an_attention_pooled_timm_tower_gives_the_patches_before_the_pooling() -> None:
    """SigLIP: its pooling is its projection, and makes one vector of an image."""
    tower = timm_tower("test_vit3", 160, pool="map", proj="none")
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(2))
    reading = read_tower(tower, TeacherSettings(name="tower"))
    features = reading.features(images)
    assert (features.spatial - tower.trunk.forward_features(images)[:, 1:]).abs().max() < 1e-5
    assert torch.allclose(features.summary, tower(images), atol=1e-6)
    assert not reading.project
    with pytest.raises(UserError, match=r"teacher\.project: tower has no projection for patches"):
        read(tower, images, project=True)


def test_towers_without_patch_features_are_refused() -> None:
    common = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16}
    for options in ({"attentional_pool": True}, {"final_ln_after_pool": True}):
        with pytest.raises(UserError, match="tower has its last norm behind the pooling"):
            read(VisionTransformer(**common, **options), torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tower ends in attention pooling"):
        read(TimmModel("convnet_nano_32", 24, image_size=32, pool="rot_attn", proj=""), torch.zeros(1))
    with pytest.raises(UserError, match="tower is a Linear"):
        read(nn.Linear(2, 2), torch.zeros(1))


def test_a_block_or_a_projection_that_does_not_exist_is_refused() -> None:
    common = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16}
    for layer in (3, -4):
        with pytest.raises(UserError, match=rf"teacher\.layer: {layer} does not exist; tower has 3 blocks, 0 to 2"):
            read(VisionTransformer(**common), torch.zeros(1), layer=layer)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"teacher\.layer: {layer * 2} does not exist; tower has 4 blocks"):
            read(timm_tower("vit_nano_patch4_32", 32), torch.zeros(1), layer=layer * 2)
    bare = VisionTransformer(**common)  # type: ignore[arg-type]
    bare.proj = None
    with pytest.raises(UserError, match=r"teacher\.project: tower has no projection"):
        read(bare, torch.zeros(1), project=True)
    assert not read_tower(bare, TeacherSettings(name="tower")).project


def test_a_teacher_records_what_it_reads() -> None:
    """`facts`: the settings as resolved for this network."""
    tower = VisionTransformer(32, 8, 32, 3, 2, 2.0, output_dim=16)
    parameters = sum(value.numel() for value in tower.state_dict().values())
    settings = TeacherSettings(name="tower", layer=-2, final_norm=False)
    reading = read_tower(tower, settings)
    teacher = FrozenTeacher(tower, reading, settings, image_size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    assert teacher.facts() == {
        "network": "VisionTransformer", "parameters": parameters, "image_size": 32, "grid": [4, 4], "width": 16,
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "layer": 1, "blocks": 3, "final_norm": False, "project": True,
        "summary": "image embedding in the shared space",
    }
