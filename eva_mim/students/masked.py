"""Students that predict the features of hidden patches: what both forms share, and the one that sees mask tokens."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.trunks.create import build_trunk, input_size, mean_std
from eva_mim.trunks.pixels import normalise
from eva_mim.trunks.positions import sincos_table


class PatchStudent(nn.Module):
    """A timm ViT without head. A subclass hides patches from it and predicts their features.

    The trunk's own forward and key names stay as they are. Raises UserError for what is no plain ViT.
    """

    stem_parameters: tuple[str, ...] = ()
    """Own parameters that enter before the trunk's first block: layer 0 of layer-wise learning rates."""
    any_mask = True
    """Works with any number of hidden patches."""

    def __init__(self, settings: MaskedSettings):
        super().__init__()
        self.trunk: Any = build_trunk(settings, num_classes=0, global_pool="")
        embed: Any = getattr(self.trunk, "patch_embed", None)
        # A subclass of PatchEmbed alone: other stems look across patches, so that mask tokens come too late for them.
        if not isinstance(self.trunk, (VisionTransformer, Eva, Beit)) or not isinstance(embed, PatchEmbed):
            raise UserError(f"student.name: {settings.name} is not a plain ViT with patch tokens; it cannot be masked")
        self.image_size = input_size(self.trunk, settings)
        self.grid: Grid = (embed.grid_size[0], embed.grid_size[1])
        self.patches = self.grid[0] * self.grid[1]
        self.prefix: int = self.trunk.num_prefix_tokens
        self.mean, self.std = mean_std(self.trunk, settings)
        if settings.positions == "sincos":
            self._fix_positions(settings)

    def _fix_positions(self, settings: MaskedSettings) -> None:
        table: nn.Parameter | None = self.trunk.pos_embed
        if table is None:
            raise UserError(f"student.positions=sincos: {settings.name} has no absolute positions; set it to learned")
        extra = table.shape[1] - self.patches  # 0 in models that add no positions to class and register tokens
        table.data.copy_(sincos_table(self.grid, table.shape[2], extra))
        table.requires_grad_(False)

    def _hide(self, masked: Tensor | None) -> None:
        """From now on the trunk does not see the patches of `masked`, [B, N] bool; None: it sees all."""
        raise NotImplementedError

    def tokens(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """[B, T, D] class token, register tokens and patches after the final norm, of uint8 images."""
        self._hide(masked)
        try:
            tokens: Tensor = self.trunk.forward_features(normalise(images, self.mean, self.std))
        finally:
            self._hide(None)
        return tokens

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean of the patches and class token (None where there is none) of whole images, [B, D] each."""
        tokens = self.tokens(images)
        class_token = tokens[:, 0] if self.trunk.cls_token is not None else None
        return tokens[:, self.prefix :].mean(dim=1), class_token

    def summary(self, images: Tensor) -> Tensor:
        """[B, D] mean of the patch tokens of whole images."""
        return self.features(images)[0]


class MaskedStudent(PatchStudent):
    """Mask tokens replace patch embeddings before positions are added; a linear head predicts.

    The seam is a forward hook on timm's `patch_embed`.
    """

    stem_parameters = ("mask_token",)

    def __init__(self, settings: MaskedSettings, target_width: int):
        super().__init__(settings)
        width: int = self.trunk.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, target_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.trunk.patch_embed.register_forward_hook(self._put_mask_tokens)
        self._masked: Tensor | None = None

    def _hide(self, masked: Tensor | None) -> None:
        self._masked = masked

    def _put_mask_tokens(self, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor | None:
        if self._masked is None:
            return None
        masked = self._masked.reshape(*patches.shape[:-1], 1)  # patches are [B, N, D] or, in some models, [B, h, w, D]
        return torch.where(masked, self.mask_token.to(patches.dtype).reshape((1,) * (patches.ndim - 1) + (-1,)), patches)

    def forward(self, images: Tensor, masked: Tensor | None, target_index: Tensor) -> Tensor:
        """[M, C] predictions for the patches of `target_index` (see `Batch`); nothing is hidden where `masked` is None."""
        patches = self.tokens(images, masked)[:, self.prefix :]
        prediction: Tensor = self.head(patches.reshape(-1, patches.shape[-1])[target_index])
        return prediction


