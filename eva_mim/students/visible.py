"""The student whose trunk sees the visible patches alone; a small decoder predicts the rest (MAE; EVA-L)."""

from __future__ import annotations

from typing import Protocol

import torch
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.students.masked import MaskedStudent, PatchStudent, TargetWidths, build_head, predict
from eva_mim.trunks.positions import sincos_table


class MaskCounts(Protocol):
    """What a student must know of `MaskSettings`."""

    @property
    def varies(self) -> bool:
        """Images differ in their number of masked patches."""

    def masked_patches(self, patches: int) -> int:
        """Masked patches of an image with so many."""


def build_masked_student(settings: MaskedSettings, targets: TargetWidths, mask: MaskCounts) -> PatchStudent:
    """The student of `settings.form`. Raises UserError for a trunk or masks that the form cannot work with."""
    student = VisibleStudent(settings, targets, mask) if settings.form == "visible" else MaskedStudent(settings, targets)
    if mask.masked_patches(student.patches) == 0:
        student.mask_token.requires_grad_(False)  # it has no use, so it would get no gradient
    return student


class KeptPatches(nn.Module):
    """In the place of timm's patch dropout: keeps the first `prefix` tokens and the patches of `index`, [B, V]; None: all."""

    index: Tensor | None = None

    def __init__(self, prefix: int, with_index: bool):
        super().__init__()
        self.prefix, self.with_index = prefix, with_index

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """[B, prefix + V, D] of [B, prefix + N, D]; with the index for a trunk that gathers its rotary positions by it."""
        if self.index is not None:
            patches = x[:, self.prefix :].gather(1, self.index[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, : self.prefix], patches], dim=1)
        return (x, self.index) if self.with_index else x


class VisibleStudent(PatchStudent):
    """The decoder puts its mask token where a patch is missing, adds fixed positions, and predicts every patch.

    The seam is timm's patch dropout. Every image must have the same number of masked patches.
    """

    any_mask = False
    decoder_positions: Tensor

    def __init__(self, settings: MaskedSettings, targets: TargetWidths, mask: MaskCounts):
        super().__init__(settings)
        if not isinstance(self.trunk, (VisionTransformer, Eva)):
            raise UserError(f"student.form=visible: {settings.name} cannot leave out patches; set it to mask_tokens")
        if mask.varies:
            raise UserError(
                "student.form=visible needs the same number of visible patches in every image; "
                "set mask.kind=random or mask.exact=true"
            )
        self.visible = self.patches - mask.masked_patches(self.patches)
        if self.visible == 0:
            raise UserError(f"student.form=visible: none of {self.patches} patches would be visible; lower mask.ratio")
        self.trunk.patch_drop = KeptPatches(self.prefix, with_index=isinstance(self.trunk, Eva))
        width = settings.decoder.width
        self.decoder_embed = nn.Linear(self.trunk.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        blocks = [Block(width, settings.decoder.heads, qkv_bias=True) for _ in range(settings.decoder.depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = LayerNorm(width)
        self.head = build_head(width, targets)
        self.register_buffer("decoder_positions", sincos_table(self.grid, width, self.prefix), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in (self.decoder_embed, *self.decoder_blocks.modules(), *self.head.modules()):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def _hide(self, masked: Tensor | None) -> None:
        self.trunk.patch_drop.index = None if masked is None else self._visible_index(masked)

    def _visible_index(self, masked: Tensor) -> Tensor:
        """[B, V] positions of the visible patches, rising. V is known beforehand, so that no step waits for the device."""
        assert masked.shape[1] == self.patches, masked.shape
        torch._assert_async((masked.sum(dim=1) == self.patches - self.visible).all(), f"not {self.visible} patches are visible")
        return masked.byte().argsort(dim=1, stable=True)[:, : self.visible]

    def forward(self, images: Tensor, masked: Tensor | None, target_index: Tensor) -> Tensor | dict[str, Tensor]:
        """[M, C] predictions for the patches of `target_index` (see `Batch`), of several teachers by name; nothing is hidden
        where `masked` is None."""
        encoded = self.decoder_embed(self.tokens(images, masked))
        prefix, patches = encoded[:, : self.prefix], encoded[:, self.prefix :]
        if masked is not None:
            index = self._visible_index(masked)[:, :, None].expand_as(patches)
            missing = self.mask_token.to(patches.dtype).expand(len(images), self.patches, -1)
            patches = missing.scatter(1, index, patches)
        x = torch.cat([prefix, patches], dim=1) + self.decoder_positions
        decoded = self.decoder_norm(self.decoder_blocks(x))[:, self.prefix :]
        return predict(self.head, decoded.reshape(-1, decoded.shape[-1])[target_index])
