"""Dense features: the original code's for an OpenAI tower, and per patch what a timm tower does to its pooled vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import eva_mim.students.small  # noqa: F401  (registers the small architectures)
from eva_mim.config import UserError
from eva_mim.teachers import TeacherSettings, build_teacher
from eva_mim.teachers.open_clip import dense_features


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
    features = dense_features(tower)(images)
    assert features.grid == grid
    assert (features.spatial - golden[f"out/{name}dense_features"]).abs().max() < 2e-5
    assert torch.allclose(features.summary, summary, atol=1e-6)  # the tower's own answer


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
    features = dense_features(tower)(images)
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
    features = dense_features(tower)(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2)))
    assert torch.allclose(features.spatial.mean(1), features.summary, atol=1e-5)
    assert features.summary.abs().max() > 1e-2


def test_attention_pooled_towers_are_refused() -> None:
    common = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 2.0, "output_dim": 16}
    for options in ({"attentional_pool": True}, {"final_ln_after_pool": True}):
        with pytest.raises(UserError, match="no projected patch features"):
            dense_features(VisionTransformer(**common, **options))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no projected patch features"):
        dense_features(TimmModel("convnet_nano_32", 24, image_size=32, pool="rot_attn", proj=""))
    with pytest.raises(UserError, match="Linear"):
        dense_features(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_nano_patch4_32", None), ("convnet_nano_32", None), ("test_vit2", None), ("eva02_tiny_patch14_224", 28),
     ("test_convnext", None)],
)
def test_a_timm_teachers_patches_are_after_its_final_norm(name: str, size: int | None) -> None:
    """`Features.spatial` by the contract: the norm that timm applies after pooling belongs to every patch as well."""
    torch.manual_seed(0)
    teacher = build_teacher(TeacherSettings(kind="timm", name=name, image_size=size))
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
