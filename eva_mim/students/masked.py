"""Students that predict the features of masked patches: a trunk, ways to hide patches from it, and heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.students.heads import TargetWidths, build_head, draw_linear, predict
from eva_mim.students.hiding import HIDINGS, MaskCounts, hidden
from eva_mim.students.positions import POSITIONS
from eva_mim.trunks import facts
from eva_mim.trunks.create import build_trunk
from eva_mim.trunks.pixels import normalise


class MaskedStudent(nn.Module):
    """A timm ViT without its head, a way to hide patches from it (`settings.form`), and heads on its patches.

    The trunk keeps timm's forward and key names. Raises UserError for a trunk or masks that do not fit the form.
    """

    def __init__(self, settings: MaskedSettings, targets: TargetWidths, mask: MaskCounts | None = None):
        """`mask`: numbers of masked patches; None for any number."""
        super().__init__()
        self._hidings = HIDINGS[settings.form]
        self.stem_parameters = tuple(name for hiding in self._hidings for name in hiding.stem_parameters)
        self.any_mask = all(hiding.any_mask for hiding in self._hidings)
        self.trunk: Any = build_trunk(settings, num_classes=0, global_pool="")
        if why := facts.why_not_masked(self.trunk, pixels_hidden=any(hiding.hides_pixels for hiding in self._hidings)):
            raise UserError(f"student.name: {settings.name} {why}")
        grid = facts.grid(self.trunk)
        assert grid is not None
        self.grid: Grid = grid
        self.patches: int = grid[0] * grid[1]
        self.prefix: int = facts.prefix_tokens(self.trunk)
        self.image_size = facts.image_size(self.trunk, settings)
        self.mean, self.std = facts.mean_std(self.trunk, settings)
        POSITIONS[settings.positions](self.trunk, grid, settings)
        width: int = self.trunk.embed_dim  # type: ignore[assignment]
        for hiding in self._hidings:
            hiding.build(self, settings, mask)
            width = hiding.width(settings, width)
        self.head = build_head(settings.head, width, targets)
        for hiding in self._hidings:
            hiding.draw(self)
        draw_linear(self.head)
        if mask is not None and mask.masked_patches(self.patches) == 0:
            self.mask_token.requires_grad_(False)  # it is not used, so it would get no gradient

    def tokens(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Returns [B, T, D] class token, register tokens and patches after the final norm, of uint8 images. The patches of
        `masked`, [B, N] bool, are hidden from the trunk; None hides no patch."""
        pixels = normalise(images, self.mean, self.std)
        if masked is not None:
            for hiding in self._hidings:
                pixels = hiding.pixels(self, pixels, masked)
        with hidden(masked):
            tokens: Tensor = self.trunk.forward_features(pixels)
        return tokens

    def forward(self, images: Tensor, masked: Tensor | None, target_index: Tensor) -> Tensor | dict[str, Tensor]:
        """Returns [M, C] predictions for the patches of `target_index` (see `MaskedBatch`); for several targets by name. The
        patches of `masked` are hidden; None hides no patch."""
        tokens = self.tokens(images, masked)
        for hiding in self._hidings:
            tokens = hiding.patches(self, tokens, masked)
        patches = tokens[:, self.prefix :]
        return predict(self.head, patches.reshape(-1, patches.shape[-1])[target_index])

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the mean of the patches and the class token (None if the trunk has none) of unmasked images, [B, D] each."""
        tokens = self.tokens(images)
        class_token = tokens[:, 0] if self.trunk.cls_token is not None else None
        return tokens[:, self.prefix :].mean(dim=1), class_token

    def summary(self, images: Tensor) -> Tensor:
        """Returns the [B, D] mean of the patch tokens of unmasked images."""
        return self.features(images)[0]
