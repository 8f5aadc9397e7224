"""The student of masked feature prediction: a plain timm ViT that sees mask tokens, and a linear head."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.contracts import Grid
from eva_mim.pixels import normalise
from eva_mim.students import TrunkSettings
from eva_mim.students.trunk import build_trunk, has_tokens, input_size, mean_std


class MaskedStudent(nn.Module):
    """Mask tokens replace patch embeddings before positions are added; only masked positions are predicted.

    The seam is a forward hook on timm's `patch_embed`: the trunk's own forward and key names stay as they are.
    """

    def __init__(self, settings: TrunkSettings, target_width: int):
        super().__init__()
        refusal = f"student.name: {settings.name} is not a plain ViT with patch tokens; it cannot be masked"
        if not has_tokens(settings):
            raise UserError(refusal)
        self.trunk = build_trunk(settings, num_classes=0, global_pool="")
        embed: Any = getattr(self.trunk, "patch_embed", None)
        if getattr(embed, "grid_size", None) is None or not isinstance(embed, PatchEmbed):
            raise UserError(refusal)
        self.image_size = input_size(self.trunk, settings)
        self.grid: Grid = (embed.grid_size[0], embed.grid_size[1])
        self.mean, self.std = mean_std(self.trunk)
        width: int = self.trunk.embed_dim  # type: ignore[assignment]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, target_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        embed.register_forward_hook(self._put_mask_tokens)
        self._masked: Tensor | None = None

    def _put_mask_tokens(self, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor | None:
        if self._masked is None:
            return None
        masked = self._masked.reshape(*patches.shape[:-1], 1)  # patches are [B, N, D] or, in some models, [B, h, w, D]
        return torch.where(masked, self.mask_token.to(patches.dtype).reshape((1,) * (patches.ndim - 1) + (-1,)), patches)

    def tokens(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """[B, N, D] patch tokens after the final norm, of uint8 images; `masked` is [B, N] bool."""
        self._masked = masked
        try:
            tokens: Tensor = self.trunk.forward_features(normalise(images, self.mean, self.std))  # type: ignore[operator]
        finally:
            self._masked = None
        return tokens[:, self.trunk.num_prefix_tokens :]  # type: ignore[misc]

    def forward(self, images: Tensor, masked: Tensor, masked_index: Tensor) -> Tensor:
        """[M, C] predictions for the masked patches, in the order of `masked_index` (see `Batch`)."""
        tokens = self.tokens(images, masked)
        prediction: Tensor = self.head(tokens.reshape(-1, tokens.shape[-1])[masked_index])
        return prediction

    def summary(self, images: Tensor) -> Tensor:
        """[B, D] mean of the patch tokens of whole images, for k-NN."""
        return self.tokens(images).mean(dim=1)
