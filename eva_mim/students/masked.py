"""Students that predict the features of hidden patches: what both forms share, and the one that sees mask tokens."""

from __future__ import annotations

from collections.abc import Mapping
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


TargetWidths = int | Mapping[str, int]
"""C of the one teacher, or of several by the teacher's name."""


def build_head(width: int, targets: TargetWidths) -> nn.Linear | nn.ModuleDict:
    """A linear layer from the student's width to the target's, or one for each of several teachers, by name. Raises UserError for
    a name that torch does not allow."""
    if isinstance(targets, int):
        return nn.Linear(width, targets)
    for name in targets:
        if hasattr(nn.ModuleDict, name):
            raise UserError(f"teachers.{name}: torch has this name for something else; choose another")
    return nn.ModuleDict({name: nn.Linear(width, target) for name, target in targets.items()})


def predict(head: nn.Module, patches: Tensor) -> Tensor | dict[str, Tensor]:
    """[M, C] predictions from [M, D] patches; of several heads by the teacher's name."""
    if isinstance(head, nn.ModuleDict):
        return {name: one(patches) for name, one in head.items()}
    prediction: Tensor = head(patches)
    return prediction


class MaskedStudent(PatchStudent):
    """Mask tokens replace patch embeddings before positions are added; a linear head predicts.

    The seam is a forward hook on timm's `patch_embed`.
    """

    stem_parameters = ("mask_token",)

    def __init__(self, settings: MaskedSettings, targets: TargetWidths):
        super().__init__(settings)
        width: int = self.trunk.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = build_head(width, targets)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for layer in self.head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.trunk.patch_embed.register_forward_hook(self._put_mask_tokens)
        self._masked: Tensor | None = None

    def _hide(self, masked: Tensor | None) -> None:
        self._masked = masked

    def _put_mask_tokens(self, module: nn.Module, inputs: Any, patches: Tensor) -> Tensor | None:
        if self._masked is None:
            return None
        masked = self._masked.reshape(*patches.shape[:-1], 1)  # patches are [B, N, D] or, in some models, [B, h, w, D]
        return torch.where(masked, self.mask_token.to(patches.dtype).reshape((1,) * (patches.ndim - 1) + (-1,)), patches)

    def forward(self, images: Tensor, masked: Tensor | None, target_index: Tensor) -> Tensor | dict[str, Tensor]:
        """[M, C] predictions for the patches of `target_index` (see `Batch`), of several teachers by name; nothing is hidden
        where `masked` is None."""
        patches = self.tokens(images, masked)[:, self.prefix :]
        return predict(self.head, patches.reshape(-1, patches.shape[-1])[target_index])


