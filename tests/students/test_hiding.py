"""Every way to hide patches, over the table: nothing of a hidden patch reaches a prediction, and ways compose."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eva_mim.core.errors import UserError
from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import DecoderSettings, MaskedSettings
from eva_mim.students.heads import HeadPlan
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks.pixels import normalise
from tests.students.test_masked import images_and_mask, pixel_mask, randomise

MASK = MaskSettings(kind="random", ratio=0.5)


PLAIN = ("mask_tokens", "visible", "pixel_fill")
FAMILIES = {"convnext_atto": 96, "coatnet_nano_rw_224": 96, "fastvit_t8": 96, "tf_efficientnet_lite0": 96, "convnet_nano_32": 32,
            "swin_tiny_patch4_window7_224": 224, "maxvit_pico_rw_256": 256, "hgnetv2_b0": 96}  # fmt: skip
"""A small trunk with a last map of each family, and an image size."""
TABLE = [
    *((form, "vit_nano_patch4_32", None) for form in PLAIN), *((form, "vit_small_patch14_reg4_dinov2", 56) for form in PLAIN),
    *((form, name, size) for form in ("pixel_fill", "masked_conv")
      for name, size in (("vitamin_nano_32", None), ("vitamin_small_224", 64))),
    ("pixel_fill", "vit_tiny_r_s16_p8_224", 64),
    *(("pixel_fill", name, size) for name, size in FAMILIES.items()),
]
"""Plain, with registers; hybrids whose convolutions look across patches; trunks whose every layer does."""


def student(form: str, name: str = "vit_nano_patch4_32", size: int | None = None, targets: Any = 10) -> Any:
    """A random student of any form."""
    settings = MaskedSettings(name=name, image_size=size, decoder=DecoderSettings(width=32, depth=1, heads=2))
    torch.manual_seed(0)
    return randomise(MaskedStudent(settings.model_copy(update={"form": form}), targets, MASK).eval())


def halves(made: MaskedStudent) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, masks of half the patches, and all flat indices: also visible patches must not know of hidden ones."""
    images, _, _ = images_and_mask(made)
    places = torch.rand(3, made.patches, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return images, places < made.patches // 2, torch.arange(3 * made.patches)


@pytest.mark.parametrize(("form", "name", "size"), TABLE)
@torch.no_grad()
def test_no_hidden_pixel_changes_any_prediction(form: str, name: str, size: int | None) -> None:
    made = student(form, name, size)
    images, masked, index = halves(made)
    other = torch.where(pixel_mask(made, masked), 255 - images, images)
    assert torch.equal(made(images, masked, index), made(other, masked, index))
    assert not torch.equal(made(images, None, index), made(other, None, index))
    seen = torch.where(pixel_mask(made, masked), images, 255 - images)
    assert not torch.equal(made(images, masked, index), made(seen, masked, index))


@pytest.mark.parametrize(("form", "name"), [
    ("mask_tokens", "vit_nano_patch4_32"), ("pixel_fill", "vitamin_nano_32"), ("masked_conv", "vitamin_nano_32"),
    ("pixel_fill", "convnet_nano_32"),
])
@torch.no_grad()
def test_nor_at_another_of_its_sizes(form: str, name: str) -> None:
    """A student of 32 and 48 px sees 48, with registers where its trunk has a place for them."""
    registers = None if name == "convnet_nano_32" else 2
    settings = MaskedSettings(name=name, form=form, registers=registers)  # type: ignore[arg-type]
    torch.manual_seed(0)
    made: Any = randomise(MaskedStudent(settings, 10, MASK, sizes=[48]).eval())
    assert made.prefix == {"vit_nano_patch4_32": 3, "vitamin_nano_32": 2, "convnet_nano_32": 0}[name]
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (3, 3, 48, 48), dtype=torch.uint8, generator=generator)
    masked = torch.rand(3, 144, generator=generator).argsort(dim=1) < 72
    pixels = masked.view(3, 1, 12, 12).repeat_interleave(4, 2).repeat_interleave(4, 3)
    index = torch.arange(3 * 144)
    assert torch.equal(made(images, masked, index), made(torch.where(pixels, 255 - images, images), masked, index))
    assert not torch.equal(made(images, masked, index), made(torch.where(pixels, images, 255 - images), masked, index))


def test_a_stem_that_looks_across_patches_needs_its_pixels_hidden() -> None:
    with pytest.raises(UserError, match="stem looks across patches"):
        student("mask_tokens", "vit_tiny_r_s16_p8_224", 64)
    with pytest.raises(UserError, match=r"vit_tiny_r_s16_p8_224 has no stem and stages of convolutions .* set it to pixel_fill"):
        student("masked_conv", "vit_tiny_r_s16_p8_224", 64)
    with pytest.raises(UserError, match=r"convnext_atto is not a plain ViT .*: its pixels must be hidden"):
        student("mask_tokens", "convnext_atto", 96)


@pytest.mark.parametrize("form", ["mask_tokens", "pixel_fill"])
def test_a_trunk_without_positions_cannot_tell_masked_patches_apart(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViTamin-XL has none; what would come of it is measured on a small trunk without its table."""
    name = "vit_nano_patch4_32" if form == "mask_tokens" else "vitamin_nano_32"
    made = student(form, name)
    images, masked, index = halves(made)

    def spread() -> float:
        said = made(images, masked, index).unflatten(0, (3, -1))
        return max(float(rows[hidden].std(0).max()) for rows, hidden in zip(said, masked, strict=True))

    with torch.no_grad():
        assert spread() > 1e-2
        made.trunk.pos_embed = None
        assert spread() < 1e-5
    monkeypatch.setattr("eva_mim.students.masked.build_trunk", lambda *_, **__: made.trunk)
    with pytest.raises(UserError, match=f"{name} has no positions, so that it would predict the same for every masked patch"):
        student(form, name)


@torch.no_grad()
def test_naive_mask_tokens_let_a_hybrid_read_what_is_hidden() -> None:
    """Colours of a masked patch from its four neighbours, by ridge regression on new images: of independent patches nothing can
    be known but what convolutions carry across the edge."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (1200, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
    made = student("pixel_fill", "vitamin_nano_32")
    masked = torch.zeros(len(images), 64, dtype=torch.bool)
    masked[:, 3 * 8 + 4] = True
    wanted = colours[:, :, 3, 4].double() / 255
    found = {}
    for way in ("naive", "filled"):
        pixels = normalise(images, made.mean, made.std)
        if way == "filled":
            pixels = made._hidings[0].pixels(made, pixels, masked)
        tokens = made.trunk.patch_embed(pixels)
        near = tokens[:, [2 * 8 + 4, 4 * 8 + 4, 3 * 8 + 3, 3 * 8 + 5]].flatten(1).double()
        near = torch.cat([(near - near.mean(0)) / near.std(0), torch.ones(len(near), 1)], 1)
        fit, test = slice(0, 900), slice(900, None)
        penalty = 10.0 * torch.eye(near.shape[1]).double()
        weights = torch.linalg.solve(near[fit].T @ near[fit] + penalty, near[fit].T @ wanted[fit])
        error = (near[test] @ weights - wanted[test]).square().sum()
        found[way] = 1 - float(error / (wanted[test] - wanted[fit].mean(0)).square().sum())
    assert found["naive"] > 0.5, found
    assert found["filled"] < 0.0, found


@pytest.mark.parametrize(("form", "name"), [
    ("mask_tokens", "vit_nano_patch4_32"), ("visible", "vit_nano_patch4_32"), ("pixel_fill", "vitamin_nano_32"),
    ("masked_conv", "vitamin_nano_32"),
])
@pytest.mark.parametrize("blocks", [True, False])
def test_recomputed_activations_have_the_same_mask(form: str, name: str, blocks: bool) -> None:
    """timm's checkpointing of blocks, and the whole student recomputed in the backward pass, after a call with another mask."""
    made = student(form, name)
    images, masked, index = halves(made)
    gradients = []
    for recompute in (False, True):
        made.zero_grad()
        made.trunk.set_grad_checkpointing(recompute and blocks)
        given = (images, masked, index)
        found = checkpoint(made, *given, use_reentrant=False) if recompute and not blocks else made(*given)
        made.tokens(images, ~masked)
        found.square().sum().backward()
        gradients.append({name: value.grad for name, value in made.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-4) for name in gradients[0])


@pytest.mark.parametrize("form", ["mask_tokens", "visible"])
@torch.no_grad()
def test_a_call_has_its_own_mask(form: str) -> None:
    """Another thread in the middle of a call, and a copy of the student, neither see it nor change it."""
    made, found = student(form), dict[str, Tensor]()
    images, masked, index = halves(made)
    alone, whole = made(images, masked, index), made(images, None, index)

    def elsewhere(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and "whole" not in found:
            found["whole"] = torch.empty(0)
            thread = threading.Thread(target=lambda: found.update(whole=made(images, None, index)))
            thread.start()
            thread.join()

    with torch.no_grad():
        handle = made.trunk.blocks[0].register_forward_pre_hook(elsewhere)
        again = made(images, masked, index)
        handle.remove()
    assert torch.equal(again, alone)
    assert torch.allclose(found["whole"], whole, atol=1e-6)
    twin = copy.deepcopy(made)
    made.mask_token.add_(1)
    assert torch.equal(twin(images, masked, index), alone)
    twin.mask_token.add_(1)
    assert torch.equal(twin(images, masked, index), made(images, masked, index))


@torch.no_grad()
def test_a_student_has_a_head_for_each_target() -> None:
    made = student("mask_tokens", targets={"clip": HeadPlan(10), "dino": HeadPlan(6)})
    images, masked, index = halves(made)
    found = made(images, masked, index[:5])
    assert {name: tuple(value.shape) for name, value in found.items()} == {"clip": (5, 10), "dino": (5, 6)}
    with pytest.raises(UserError, match=r"teachers\.a\.b"):
        student("mask_tokens", targets={"a.b": HeadPlan(3)})
