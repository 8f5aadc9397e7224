"""The student with mask tokens sees nothing of what is masked, and is timm's model with one seam."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import MaskedSettings
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks.meta import meta_device
from eva_mim.trunks.positions import sincos_table
from tests.students.golden import PIXELS

FAMILIES = [
    ("vit_nano_patch4_32", None), ("deit3_small_patch16_224", 64), ("eva02_tiny_patch14_224", 56),
    ("golden_eva01_relpos", None), ("vit_small_patch16_dinov3", 64), ("vit_small_patch14_reg4_dinov2", 56),
    ("dynamic_vit", None), ("test_vit2", None),
]
"""timm's VisionTransformer, Eva and Beit; LayerScale, rotary and relative positions; registers; no class token; dynamic size."""

default_cfgs = generate_default_cfgs({"dynamic_vit": PIXELS | {"input_size": (3, 32, 32)}})


@register_model
def dynamic_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT that takes images of any size: its patch embedding leaves [B, h, w, D]."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "dynamic_img_size": True}
    return build_model_with_cfg(VisionTransformer, "dynamic_vit", pretrained, **sizes | options)


def randomise(made: MaskedStudent) -> MaskedStudent:
    """Every parameter but fixed tables random (timm starts biases at 0), so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad or "patch_embed" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def student(name: str = "vit_nano_patch4_32", image_size: int | None = None, **options: Any) -> Any:
    """A random student with 10 targets."""
    torch.manual_seed(0)
    return randomise(MaskedStudent(MaskedSettings(name=name, image_size=image_size, **options), 10).eval())


def images_and_mask(made: MaskedStudent, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 pictures, [B, N] masks of about 40 %, and their flat indices."""
    generator = torch.Generator().manual_seed(1)
    size = made.image_size
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    masked = torch.rand(count, made.grid[0] * made.grid[1], generator=generator) < 0.4
    return images, masked, masked.flatten().nonzero()[:, 0]


def normalised(made: MaskedStudent, images: Tensor) -> Tensor:
    """Channel by channel, as each network's description says."""
    return torch.stack([(images[:, c].float() / 255 - made.mean[c]) / made.std[c] for c in range(3)], dim=1)


def pixel_mask(made: MaskedStudent, masked: Tensor) -> Tensor:
    """[B, 1, H, W] True where a pixel lies in a masked patch."""
    rows, columns = made.grid
    side = made.image_size // rows
    return masked.reshape(-1, 1, rows, columns).repeat_interleave(side, 2).repeat_interleave(side, 3)


@pytest.mark.parametrize(("name", "size"), FAMILIES)
@torch.no_grad()
def test_no_masked_pixel_reaches_the_output(name: str, size: int | None) -> None:
    """Other pixels behind the mask: every token is the same, bit for bit. One visible pixel: the predictions move."""
    made = student(name, size)
    images, masked, index = images_and_mask(made)
    hidden = pixel_mask(made, masked)
    other = torch.where(hidden, 255 - images, images)
    assert (other != images).float().mean() > 0.3
    assert torch.equal(made(images, masked, index), made(other, masked, index))
    assert torch.equal(made.tokens(images, masked), made.tokens(other, masked))
    row, column = (~hidden[0, 0]).nonzero()[17].tolist()
    seen = images.clone()
    seen[0, :, row, column] = 255 - seen[0, :, row, column]
    change = (made(images, masked, index) - made(seen, masked, index)).abs().amax(-1)
    first = masked[0].sum()
    assert (change[:first] > 0).all()
    assert (change[first:] == 0).all()
    assert not torch.equal(made.tokens(images), made.tokens(other))  # without a mask everything is seen


@pytest.mark.parametrize(("name", "size"), FAMILIES)
@torch.no_grad()
def test_without_a_mask_the_student_is_timms_model(name: str, size: int | None) -> None:
    """The same keys and tokens; where nothing is hidden, every patch has its prediction; mean and class token for k-NN."""
    made = student(name, size)
    options = {"img_size": size} if size else {}
    plain: Any = timm.create_model(name, num_classes=0, global_pool="", **options).eval()
    assert list(made.trunk.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(made.trunk.state_dict())
    images, masked, _ = images_and_mask(made)
    tokens = plain.forward_features(normalised(made, images))
    made.tokens(images, masked)
    assert torch.equal(made.trunk.forward_features(normalised(made, images)), tokens)  # a masked pass leaves nothing behind
    assert torch.allclose(made.tokens(images), tokens, atol=1e-5)
    rows, columns = made.grid
    patches = tokens[:, tokens.shape[1] - rows * columns :]
    mean, class_token = made.features(images)
    assert torch.allclose(mean, patches.mean(1), atol=1e-5)
    assert torch.equal(made.summary(images), mean)
    if plain.cls_token is not None:
        assert torch.allclose(class_token, tokens[:, 0], atol=1e-5)
    else:
        assert class_token is None
    everything = made(images, None, torch.arange(3 * rows * columns))
    assert torch.allclose(everything, patches.reshape(-1, patches.shape[-1]) @ made.head.weight.T + made.head.bias, atol=1e-5)


def test_what_is_not_the_trunk_is_named() -> None:
    made = student()
    assert {name for name in made.state_dict() if not name.startswith("trunk.")} == {"mask_token", "head.weight", "head.bias"}
    assert made.stem_parameters == ("mask_token",)


@pytest.mark.parametrize(
    "name", ["convnet_nano_32", "swin_tiny_patch4_window7_224", "no_such_model", "vit_tiny_r_s16_p8_224", "samvit_base_patch16"]
)
def test_what_cannot_be_masked_is_refused(name: str) -> None:
    """Without patch tokens, unknown, with a stem that looks across patches, with a neck after the tokens."""
    with meta_device(), pytest.raises(UserError, match=f"student.name: .*{name}"):
        MaskedStudent(MaskedSettings(name=name), 10)


@torch.no_grad()
def test_the_forward_pass_is_timms_pieces_by_hand() -> None:
    made = student()
    trunk: Any = made.trunk
    images, masked, index = images_and_mask(made)
    rows = []
    for picture, mask in zip(normalised(made, images), masked, strict=True):
        patches = [
            trunk.patch_embed.proj(picture[None, :, r : r + 4, c : c + 4]).flatten()
            for r in range(0, 32, 4) for c in range(0, 32, 4)
        ]
        patches = [made.mask_token.flatten() if hide else patch for patch, hide in zip(patches, mask.tolist(), strict=True)]
        tokens = torch.cat([trunk.cls_token[0], torch.stack(patches)])[None] + trunk.pos_embed
        for block in trunk.blocks:
            tokens = tokens + block.attn(block.norm1(tokens))
            tokens = tokens + block.mlp(block.norm2(tokens))
        tokens = trunk.norm(tokens)[0, 1:]
        rows += [tokens[place] @ made.head.weight.T + made.head.bias for place in range(64) if mask[place]]
    assert torch.allclose(made(images, masked, index), torch.stack(rows), atol=2e-5)


def test_a_failed_pass_leaves_no_mask_behind() -> None:
    made = student()
    images, masked, _ = images_and_mask(made)
    x = normalised(made, images)
    with torch.no_grad():
        before = made.trunk.forward_features(x)
        with pytest.raises(RuntimeError):
            made.tokens(images, masked[:, :7])
        assert torch.equal(made.trunk.forward_features(x), before)


@pytest.mark.parametrize("form", ["mask_tokens", "visible"])
def test_plain_distillation_has_no_parameter_without_gradient(form: Any) -> None:
    """With ratio 0 the mask token has no use: it is not trained."""
    made = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32", form=form), 10, MaskSettings(ratio=0))
    images, _, _ = images_and_mask(made)
    made(images, None, torch.arange(3 * 64)).square().sum().backward()
    assert {name for name, p in made.named_parameters() if p.grad is None} == {"mask_token"}
    assert [name for name, p in made.named_parameters() if not p.requires_grad] == ["mask_token"]
    masking = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32", form=form), 10, MaskSettings(exact=True))
    assert all(parameter.requires_grad for parameter in masking.parameters())


@pytest.mark.parametrize(("name", "size"), [("golden_eva01_relpos", None), ("vit_small_patch16_dinov3", 64)])
def test_fixed_positions_need_a_table(name: str, size: int | None) -> None:
    with pytest.raises(UserError, match=r"student\.positions=sincos: .*learned"):
        student(name, size, positions="sincos")


def test_fixed_positions_leave_registers_out() -> None:
    """A table without rows for class and register tokens (DINOv2) holds the patches alone."""
    made = student("vit_small_patch14_reg4_dinov2", 56, positions="sincos")
    assert torch.equal(made.trunk.pos_embed, sincos_table((4, 4), 384, 0))
    made = student("vit_nano_patch4_32", positions="sincos")
    assert torch.equal(made.trunk.pos_embed, sincos_table((8, 8), 96, 1))


def test_the_table_is_that_of_the_definition() -> None:
    """On a grid that is not square, entry by entry."""
    table = sincos_table((3, 5), 8, 2)
    assert table.shape == (1, 17, 8)
    assert (table[0, :2] == 0).all()
    for row in range(3):
        for column in range(5):
            expected = [
                wave(torch.tensor(place / 10000 ** (k / 2), dtype=torch.float64)).item()
                for place in (column, row) for wave in (torch.sin, torch.cos) for k in (0, 1)
            ]
            assert table[0, 2 + row * 5 + column].tolist() == pytest.approx(expected, abs=1e-7)
