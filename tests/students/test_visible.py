"""The visible form: the trunk runs on visible patches alone, and the decoder gets them back in their places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from eva_mim.core.errors import UserError
from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import DecoderSettings, MaskedSettings
from eva_mim.students.masked import MaskedStudent
from tests.students.test_masked import images_and_mask, normalised, pixel_mask, randomise

DECODER = DecoderSettings(width=32, depth=2, heads=4)
FAMILIES = [
    ("vit_nano_patch4_32", None), ("eva02_tiny_patch14_224", 56), ("vit_small_patch16_dinov3", 64),
    ("vit_small_patch14_reg4_dinov2", 56), ("dynamic_vit", None), ("test_vit2", None),
]
MASK = MaskSettings(kind="random", ratio=0.75)


def visible(name: str = "vit_nano_patch4_32", size: int | None = None, mask: MaskSettings = MASK) -> Any:
    """A random student with 10 targets."""
    settings = MaskedSettings(name=name, image_size=size, form="visible", decoder=DECODER)
    torch.manual_seed(0)
    return randomise(MaskedStudent(settings, 10, mask).eval())


def images_and_choice(made: MaskedStudent) -> Any:
    """Pictures, masks of three quarters, flat indices of the masked patches."""
    images, _, _ = images_and_mask(made)
    generator = torch.Generator().manual_seed(2)
    places = torch.rand(3, made.patches, generator=generator).argsort(dim=1)
    masked = places >= made.patches // 4
    return images, masked, masked.flatten().nonzero()[:, 0]


@pytest.mark.parametrize(("name", "size"), FAMILIES)
@torch.no_grad()
def test_no_masked_pixel_reaches_the_output(name: str, size: int | None) -> None:
    made = visible(name, size)
    images, masked, index = images_and_choice(made)
    hidden = pixel_mask(made, masked)
    other = torch.where(hidden, 255 - images, images)
    assert torch.equal(made.tokens(images, masked), made.tokens(other, masked))
    assert torch.equal(made(images, masked, index), made(other, masked, index))
    row, column = (~hidden[0, 0]).nonzero()[17].tolist()
    seen = images.clone()
    seen[0, :, row, column] = 255 - seen[0, :, row, column]
    change = (made(images, masked, index) - made(seen, masked, index)).abs().amax(-1)
    first = masked[0].sum()
    assert (change[:first] > 0).all()
    assert (change[first:] == 0).all()


@pytest.mark.parametrize(("name", "size"), FAMILIES)
@torch.no_grad()
def test_the_trunk_is_its_blocks_on_the_visible_tokens(name: str, size: int | None) -> None:
    """By hand, picture by picture: patches cut out one by one, with their own positions (learned and rotary)."""
    made = visible(name, size)
    trunk = made.trunk
    images, masked, _ = images_and_choice(made)
    side, columns = made.image_size // made.grid[0], made.grid[1]
    prefix = [token[0] for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    count = sum(len(token) for token in prefix)
    rope = trunk.rope.get_embed(shape=made.grid) if getattr(trunk, "rope", None) is not None else None
    for picture, mask, tokens in zip(normalised(made, images), masked, made.tokens(images, masked), strict=True):
        places = [place for place in range(made.patches) if not mask[place]]
        rows = []
        for place in places:
            top, left = place // columns * side, place % columns * side
            patch = trunk.patch_embed.proj(picture[None, :, top : top + side, left : left + side]).flatten()
            table = trunk.pos_embed
            rows.append(patch if table is None else patch + table[0, place + table.shape[1] - made.patches])
        extra = trunk.pos_embed is not None and trunk.pos_embed.shape[1] > made.patches
        first = torch.cat(prefix) + (trunk.pos_embed[0, :count] if extra else 0) if prefix else torch.zeros(0, len(rows[0]))
        x = torch.cat([first, torch.stack(rows)])[None]
        for block in trunk.blocks:
            x = block(x) if rope is None else block(x, rope=rope[places])
        assert torch.allclose(tokens, trunk.norm(x)[0], atol=2e-5 * x.abs().max().item())


@torch.no_grad()
def test_where_nothing_is_hidden_the_decoder_gets_every_patch() -> None:
    """The trunk's tokens are those of the other form, features as well; no mask token is in the prediction."""
    made = visible(mask=MaskSettings(ratio=0))
    other = MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 10).eval()
    other.trunk.load_state_dict(made.trunk.state_dict())
    images, _, _ = images_and_choice(made)
    assert torch.equal(made.tokens(images), other.tokens(images))
    assert all(torch.equal(*pair) for pair in zip(made.features(images), other.features(images), strict=True))
    before = made(images, None, torch.arange(192))
    made.mask_token.add_(1)
    assert torch.equal(made(images, None, torch.arange(192)), before)
    made.decoder_blocks[0].mlp.fc2.bias[0] += 1  # one channel: the norm after the blocks takes away what all have in common
    assert not torch.equal(made(images, None, torch.arange(192)), before)


def test_names_that_travel() -> None:
    """The trunk is timm's key by key; the decoder's positions follow from the settings and are not saved."""
    made = visible()
    mine = [name.removeprefix("trunk.") for name in made.state_dict() if name.startswith("trunk.")]
    assert mine == list(MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 10).trunk.state_dict())
    own = {name.partition(".")[0] for name in made.state_dict()} - {"trunk"}
    assert own == {"mask_token", "decoder_embed", "decoder_blocks", "decoder_norm", "head"}
    assert made.stem_parameters == ()


def test_masks_of_varying_size_are_refused() -> None:
    """At build time, and not for the form that can take them."""
    settings = MaskedSettings(name="vit_nano_patch4_32", form="visible", decoder=DECODER)
    with pytest.raises(UserError, match=r"mask\.kind=random or mask\.exact=true"):
        MaskedStudent(settings, 10, MaskSettings())
    assert visible(mask=MaskSettings(exact=True)).visible == 64 - 26
    assert visible(mask=MaskSettings(kind="random", ratio=0.7)).visible == 19
    assert isinstance(MaskedStudent(MaskedSettings(name="vit_nano_patch4_32"), 10, MaskSettings()), MaskedStudent)


def test_what_cannot_leave_patches_out_is_refused() -> None:
    with pytest.raises(UserError, match=r"student\.form=visible: golden_eva01_relpos .*mask_tokens"):
        visible("golden_eva01_relpos")
    with pytest.raises(UserError, match=r"none of 64 patches would be visible; lower mask\.ratio"):
        visible(mask=MaskSettings(kind="random", ratio=0.99))


def test_a_mask_of_another_size_stops_the_pass() -> None:
    """One patch fewer in one image would shift every patch after it."""
    made = visible()
    images, masked, index = images_and_choice(made)
    masked[1, masked[1].nonzero()[0]] = False
    with pytest.raises(RuntimeError, match="not 16 patches are visible"):
        made(images, masked, index)


@torch.no_grad()
def test_a_pass_leaves_no_mask_behind() -> None:
    made = visible()
    images, masked, _ = images_and_choice(made)
    x = normalised(made, images)
    before = made.trunk.forward_features(x)
    made.tokens(images, masked)
    assert torch.equal(made.trunk.forward_features(x), before)
    with pytest.raises(RuntimeError):
        made.tokens(images[:2], masked)
    assert torch.equal(made.trunk.forward_features(x), before)


@pytest.mark.parametrize(("width", "heads", "divisor"), [(30, 5, 4), (32, 5, 5)])
def test_a_decoder_width_must_divide(width: int, heads: int, divisor: int) -> None:
    with pytest.raises(ValidationError, match=rf"student\.decoder\.width={width} must be a multiple of {divisor}"):
        DecoderSettings(width=width, heads=heads)
