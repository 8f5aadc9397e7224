"""Ways to hide patches from a trunk: a class for each, and the table of the ways that a student composes.

A way adds what it needs to the student (so that names in checkpoints are the student's own), and acts at three places: on the
pixels before the trunk, inside the trunk (a hook or a module in the place of one of timm's), and on the tokens after it. The
mask is an argument of the call. timm's forward has no such argument, so on its way to the places inside the trunk the mask is
in a context variable that `hidden` sets around the call of the trunk:
  - the call has it, and no other call: an inner call sets its own and puts back what was there, an exception puts it back as
    well, and another thread has its own;
  - timm's activation checkpointing recomputes blocks alone, which do not look at it. Where a whole student is recomputed, its
    `forward` runs again with its arguments, the mask among them, and sets it again, in whatever thread that runs.
"""

from __future__ import annotations

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
    """Within it, the trunk that is called does not see the patches of `masked`, [B, N] bool; None: it sees all."""
    before = _masked.set(masked)
    try:
        yield
    finally:
        _masked.reset(before)


class MaskCounts(Protocol):
    """Counts of masked patches that a student needs from `MaskSettings`."""

    @property
    def varies(self) -> bool:
        """Images differ in their number of masked patches."""

    def masked_patches(self, patches: int) -> int:
        """Masked patches of an image with so many."""


class Hiding:
    """A way to hide patches that does nothing at any place: a subclass says what it does. It has no state of its own."""

    stem_parameters: tuple[str, ...] = ()
    """Parameters that it adds to the student and that enter before the trunk's first block."""
    any_mask = True
    """Works with any number of hidden patches."""
    hides_pixels = False
    """Hides patches before the stem, which may then look across patches."""

    def build(self, student: Any, settings: MaskedSettings, mask: MaskCounts | None) -> None:
        """Add modules and parameters to the student. Raises UserError for a trunk or masks that it cannot work with."""

    def draw(self, student: Any) -> None:
        """Draw the weights of what it added."""

    def pixels(self, student: Any, pixels: Tensor, masked: Tensor) -> Tensor:
        """[B, channels, H, W] normalised pixels that the trunk gets."""
        return pixels

    def patches(self, student: Any, tokens: Tensor, masked: Tensor | None) -> Tensor:
        """[B, prefix + N, D'] tokens that the head reads the patches from, of the trunk's tokens [B, T, D]."""
        return tokens

    def width(self, settings: MaskedSettings, width: int) -> int:
        """D' for a trunk of width D."""
        return width


class MaskTokens(Hiding):
    """Mask tokens replace patch embeddings before positions are added (EVA). The place in the trunk is timm's `patch_embed`."""

    stem_parameters = ("mask_token",)

    def build(self, student: Any, settings: MaskedSettings, mask: MaskCounts | None) -> None:
        """Adds `mask_token` [1, 1, D]."""
        student.mask_token = nn.Parameter(torch.zeros(1, 1, student.trunk.embed_dim))
        student.trunk.patch_embed.register_forward_hook(partial(_put_mask_tokens, student))

    def draw(self, student: Any) -> None:
        """Cut normal, std 0.02."""
        nn.init.trunc_normal_(student.mask_token, std=0.02)


def _put_mask_tokens(student: Any, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor | None:
    masked = _masked.get()
    if masked is None:
        return None
    masked = masked.reshape(*patches.shape[:-1], 1)  # patches are [B, N, D] or, in some models, [B, h, w, D]
    token: Tensor = student.mask_token.to(patches.dtype).reshape((1,) * (patches.ndim - 1) + (-1,))
    return torch.where(masked, token, patches)


class DroppedPatches(Hiding):
    """The trunk runs on visible patches alone. A decoder puts its mask token where a patch is missing and adds fixed positions
    (MAE; EVA-L). The place in the trunk is timm's patch dropout. Every image must have the same number of masked patches."""

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
        """Cut normal, std 0.02."""
        nn.init.trunc_normal_(student.mask_token, std=0.02)
        draw_linear(student.decoder_embed, student.decoder_blocks)

    def patches(self, student: Any, tokens: Tensor, masked: Tensor | None) -> Tensor:
        """[B, prefix + N, D'] tokens after the decoder."""
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
        """The decoder's."""
        return settings.decoder.width


class KeptPatches(nn.Module):
    """In the place of timm's patch dropout: keeps the first `prefix` tokens and the `visible` patches that are not masked."""

    def __init__(self, prefix: int, visible: int, *, with_index: bool):
        super().__init__()
        self.prefix, self.visible, self.with_index = prefix, visible, with_index

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """[B, prefix + V, D] of [B, prefix + N, D]; with the index [B, V] for a trunk that gathers its rotary positions by it."""
        masked = _masked.get()
        if masked is None:
            return (x, None) if self.with_index else x
        assert masked.shape[1] == x.shape[1] - self.prefix, (masked.shape, x.shape)
        index = visible_index(masked, self.visible)
        patches = x[:, self.prefix :].gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, : self.prefix], patches], dim=1)
        return (x, index) if self.with_index else x


def visible_index(masked: Tensor, visible: int) -> Tensor:
    """[B, V] positions of the visible patches, rising. V is known beforehand, so that no step waits for the device."""
    torch._assert_async((masked.sum(dim=1) == masked.shape[1] - visible).all(), f"not {visible} patches are visible")
    return masked.byte().argsort(dim=1, stable=True)[:, :visible]


HIDINGS: dict[str, tuple[Hiding, ...]] = {"mask_tokens": (MaskTokens(),), "visible": (DroppedPatches(),)}
"""By `student.form`: the ways that it composes, in the order in which they act."""
