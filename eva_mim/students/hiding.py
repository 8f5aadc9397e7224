"""Ways to hide patches from a trunk: a class for each, and the table of those that a student combines.

A way of hiding adds its modules and parameters to the student (so that their names in checkpoints are the student's), and acts at
three places: on the pixels before the trunk, inside the trunk (by a hook, or by a module that replaces one of timm's), and on the
tokens after it. The mask is an argument of the student's call. timm's forward has no such argument, so the places inside the
trunk read the mask from a context variable that `hidden` sets around the call of the trunk:
  - the mask is visible to this call alone: an inner call sets its own mask and restores the outer one, also after an exception,
    and each thread has its own value;
  - timm's activation checkpointing recomputes blocks, which do not read the mask. If a full student is recomputed, its `forward`
    runs again with its arguments, the mask among them, and sets the variable again, in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.students.heads import draw_linear
from eva_mim.trunks import facts
from eva_mim.trunks.positions import sincos_table

_masked: ContextVar[Tensor | None] = ContextVar("masked", default=None)


@contextmanager
def hidden(masked: Tensor | None) -> Iterator[None]:
    """Hides the patches of `masked`, [B, N] bool, from the trunk that is called inside the block; None hides no patch."""
    before = _masked.set(masked)
    try:
        yield
    finally:
        _masked.reset(before)


class MaskCounts(Protocol):
    """Numbers of masked patches, of which a student is built; `MaskSettings` implements it."""

    @property
    def varies(self) -> bool:
        """True if images differ in their number of masked patches."""

    def masked_patches(self, patches: int) -> int:
        """Returns the number of masked patches of an image with `patches` patches."""


class Hiding:
    """Base of the ways to hide patches: it does nothing at any place, and a subclass overrides some. It has no state."""

    stem_parameters: tuple[str, ...] = ()
    """Names of parameters added to the student that act before the trunk's first block."""
    any_mask = True
    """True if the number of masked patches may differ from image to image."""
    hides_pixels = False
    """True if patches are hidden before the stem, whose receptive field may then extend beyond a patch."""

    def build(self, student: Any, settings: MaskedSettings, mask: MaskCounts | None) -> None:
        """Adds modules and parameters to the student. Raises UserError for a trunk or masks that do not fit."""

    def draw(self, student: Any) -> None:
        """Initialises the weights that `build` added."""

    def pixels(self, student: Any, pixels: Tensor, masked: Tensor) -> Tensor:
        """Returns the trunk's input, [B, channels, H, W] normalised pixels."""
        return pixels

    def patches(self, student: Any, tokens: Tensor, masked: Tensor | None) -> Tensor:
        """Returns the [B, prefix + N, D'] tokens before the head, from the trunk's output tokens [B, T, D]."""
        return tokens

    def width(self, settings: MaskedSettings, width: int) -> int:
        """Returns D', the width of the tokens before the head, for a trunk of width D."""
        return width


class MaskTokens(Hiding):
    """Mask tokens replace patch embeddings before positions are added (EVA), by a hook on timm's `patch_embed`."""

    stem_parameters = ("mask_token",)

    def build(self, student: Any, settings: MaskedSettings, mask: MaskCounts | None) -> None:
        """Adds `mask_token` [1, 1, D]. Raises UserError for a trunk that could not tell one mask token from another."""
        if not facts.has_positions(student.trunk) and mask is not None and mask.masked_patches(student.patches):
            raise UserError(f"student.name: {settings.name} has no positions, so that it would predict the same for every masked "
                            "patch of an image; set student.positions=sincos, or mask.ratio=0 to learn without masks")
        student.mask_token = nn.Parameter(torch.zeros(1, 1, student.trunk.embed_dim))
        student.trunk.patch_embed.register_forward_hook(partial(_put_mask_tokens, student))

    def draw(self, student: Any) -> None:
        """Initialises the mask token truncated normal, std 0.02."""
        nn.init.trunc_normal_(student.mask_token, std=0.02)


def _put_mask_tokens(student: Any, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor | None:
    masked = _masked.get()
    if masked is None:
        return None
    masked = masked.reshape(*patches.shape[:-1], 1)  # patches are [B, N, D] or, in some models, [B, h, w, D]
    token: Tensor = student.mask_token.to(patches.dtype).reshape((1,) * (patches.ndim - 1) + (-1,))
    return torch.where(masked, token, patches)


class SeamTokens(MaskTokens):
    """Mask tokens in a trunk that has a place for them; in others it does nothing."""

    def build(self, student: Any, settings: MaskedSettings, mask: MaskCounts | None) -> None:
        """See `MaskTokens`."""
        if facts.has_seam(student.trunk):
            super().build(student, settings, mask)

    def draw(self, student: Any) -> None:
        """See `MaskTokens`."""
        if facts.has_seam(student.trunk):
            super().draw(student)


class PixelFill(Hiding):
    """Masked patches are filled with the mean colour before the trunk (SimMIM's input), whose layers may then look across patches
    as they like."""

    hides_pixels = True

    def pixels(self, student: Any, pixels: Tensor, masked: Tensor) -> Tensor:
        """Returns normalised pixels with 0, the mean, in masked patches."""
        return _without(student, pixels, masked)


class MaskedConvolutions(PixelFill):
    """Beside `PixelFill`, masked cells are set to 0 again after the stem and each convolutional block (ConvMAE, Gao et al. 2022):
    a biased convolution of grey is not grey, and the edge of a visible patch would see it."""

    def build(self, student: Any, settings: MaskedSettings, mask: MaskCounts | None) -> None:
        """Adds hooks to the convolutional blocks. Raises UserError for a trunk that has none before its tokens."""
        backbone: Any = getattr(getattr(student.trunk, "patch_embed", None), "backbone", None)
        if not facts.has_seam(student.trunk) or not hasattr(backbone, "stem") or not hasattr(backbone, "stages"):
            raise UserError(f"student.form=masked_conv: {settings.name} has no stem and stages of convolutions before its "
                            "tokens; set it to pixel_fill")
        if getattr(backbone, "grad_checkpointing", False):
            backbone.grad_checkpointing = False  # blocks that are computed again in the backward pass would see no mask
        for block in [backbone.stem, *(block for stage in backbone.stages for block in getattr(stage, "blocks", stage))]:
            block.register_forward_hook(partial(_set_to_0, student))


def _set_to_0(student: Any, module: nn.Module, inputs: Any, found: Tensor) -> Tensor | None:
    masked = _masked.get()
    return None if masked is None else _without(student, found, masked)


def _without(student: Any, values: Tensor, masked: Tensor) -> Tensor:
    """Returns maps [B, C, H, W] with 0 in masked patches, [B, N]."""
    scale, (height, width) = math.sqrt(masked.shape[1] / student.patches), values.shape[-2:]  # of several sizes
    rows, columns = (round(scale * side) for side in student.grid)
    cells = masked.view(len(masked), 1, rows, columns)
    return values.masked_fill(cells.repeat_interleave(height // rows, 2).repeat_interleave(width // columns, 3), 0.0)


class DroppedPatches(Hiding):
    """The trunk runs on visible patches alone. A decoder inserts its mask token for each masked patch and adds fixed positions
    (MAE; EVA-L). Patches are dropped in the place of timm's patch dropout. All images have the same number of masked patches."""

    any_mask = False

    def build(self, student: Any, settings: MaskedSettings, mask: MaskCounts | None) -> None:
        """Adds `mask_token` [1, 1, D'], `decoder_embed`, `decoder_blocks`, `decoder_norm`, `decoder_positions`, `visible`."""
        trunk = student.trunk
        if why := facts.why_not_dropped(trunk):
            raise UserError(f"student.form=visible: {settings.name} {why}; set it to mask_tokens")
        assert mask is not None, "the number of visible patches must be known"
        if mask.varies:
            raise UserError("student.form=visible needs the same number of visible patches in every image; "
                            "set mask.kind=random or mask.exact=true")
        student.visible = student.patches - mask.masked_patches(student.patches)
        if student.visible == 0:
            raise UserError(f"student.form=visible: none of {student.patches} patches would be visible; lower mask.ratio")
        trunk.patch_drop = KeptPatches(student.prefix, student.visible, with_index=facts.patch_drop_returns_index(trunk))
        width = settings.decoder.width
        student.decoder_embed = nn.Linear(trunk.embed_dim, width)
        student.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        blocks = [Block(width, settings.decoder.heads, qkv_bias=True) for _ in range(settings.decoder.depth)]
        student.decoder_blocks = nn.Sequential(*blocks)
        student.decoder_norm = LayerNorm(width)
        student.register_buffer("decoder_positions", sincos_table(student.grid, width, student.prefix), persistent=False)

    def draw(self, student: Any) -> None:
        """Initialises mask token and linear weights of the decoder truncated normal, std 0.02; biases are 0."""
        nn.init.trunc_normal_(student.mask_token, std=0.02)
        draw_linear(student.decoder_embed, student.decoder_blocks)

    def patches(self, student: Any, tokens: Tensor, masked: Tensor | None) -> Tensor:
        """Returns the [B, prefix + N, D'] tokens after the decoder."""
        encoded = student.decoder_embed(tokens)
        prefix, patches = encoded[:, : student.prefix], encoded[:, student.prefix :]
        if masked is not None:
            index = visible_index(masked, student.visible)[:, :, None].expand_as(patches)
            missing = student.mask_token.to(patches.dtype).expand(len(tokens), student.patches, -1)
            patches = missing.scatter(1, index, patches)
        x = torch.cat([prefix, patches], dim=1) + student.decoder_positions
        decoded: Tensor = student.decoder_norm(student.decoder_blocks(x))
        return decoded

    def width(self, settings: MaskedSettings, width: int) -> int:
        """Returns the decoder's width."""
        return settings.decoder.width


class KeptPatches(nn.Module):
    """Replacement of timm's patch dropout: keeps the first `prefix` tokens and the `visible` patches that are not masked."""

    def __init__(self, prefix: int, visible: int, *, with_index: bool):
        super().__init__()
        self.prefix, self.visible, self.with_index = prefix, visible, with_index

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Returns [B, prefix + V, D] tokens of [B, prefix + N, D]; `with_index` also the index [B, V], by which the trunk gathers
        its rotary positions. Without a mask it returns all tokens, and None as index."""
        masked = _masked.get()
        if masked is None:
            return (x, None) if self.with_index else x
        assert masked.shape[1] == x.shape[1] - self.prefix, (masked.shape, x.shape)
        index = visible_index(masked, self.visible)
        patches = x[:, self.prefix :].gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, : self.prefix], patches], dim=1)
        return (x, index) if self.with_index else x


def visible_index(masked: Tensor, visible: int) -> Tensor:
    """Returns the [B, V] positions of the visible patches, rising. V is given, so that no step waits for the device."""
    torch._assert_async((masked.sum(dim=1) == masked.shape[1] - visible).all(), f"not {visible} patches are visible")
    return masked.byte().argsort(dim=1, stable=True)[:, :visible]


HIDINGS: dict[str, tuple[Hiding, ...]] = {
    "mask_tokens": (MaskTokens(),), "visible": (DroppedPatches(),), "pixel_fill": (PixelFill(), SeamTokens()),
    "masked_conv": (MaskedConvolutions(), SeamTokens()),
}
"""Ways of hiding by `student.form`, in the order in which they act."""
