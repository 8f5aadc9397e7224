"""Students that predict the features of masked patches: a trunk, ways to hide patches from it, and heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.students import MaskedSettings
from eva_mim.students.heads import SUMMARY, HeadPlan, Patches, Plans, build_heads, draw_linear, predict
from eva_mim.students.hiding import HIDINGS, MaskCounts, hidden
from eva_mim.students.positions import cropped
from eva_mim.students.windows import add_windows, sides_of, windowed
from eva_mim.trunks import facts
from eva_mim.trunks.create import build_trunk, has_tokens
from eva_mim.trunks.maps import final_grid, tokens_and_grid
from eva_mim.trunks.pixels import normalise


class MaskedStudent(nn.Module):
    """A timm trunk without its head, a way to hide patches from it (`settings.form`), and heads on its patches and its summary.

    The trunk keeps timm's forward and key names. Raises UserError for a trunk or masks that do not fit the form.
    """

    head_parts = ("head.", "summary_head.")
    """Beginnings of the names of the heads' parameters."""

    def __init__(
        self, settings: MaskedSettings, targets: Plans, mask: MaskCounts | None = None, sizes: Collection[int] = ()
    ):
        """`targets`: what is predicted; `mask`: numbers of masked patches, None for any number; `sizes`: further sides of its
        input in pixels."""
        super().__init__()
        self.settings = settings
        self.plans = {"teacher": HeadPlan(targets, settings=settings.head)} if isinstance(targets, int) else dict(targets)
        """What is predicted, by the teacher's name."""
        self.heads_alone = False
        """True while the heads are trained alone: no gradient goes further."""
        self._hidings = HIDINGS[settings.form]
        self.stem_parameters = tuple(name for hiding in self._hidings for name in hiding.stem_parameters)
        self.any_mask = all(hiding.any_mask for hiding in self._hidings)
        several = {"dynamic_img_size": True} if sizes and has_tokens(settings) else {}  # a trunk of maps takes any size
        self.trunk: Any = build_trunk(settings, num_classes=0, global_pool="", **several)
        if why := facts.why_not_masked(self.trunk, pixels_hidden=any(hiding.hides_pixels for hiding in self._hidings)):
            raise UserError(f"student.name: {settings.name} {why}")
        self.mean, self.std = facts.mean_std(self.trunk, settings)
        self.image_size = facts.image_size(self.trunk, settings)
        grid = final_grid(self.trunk, self.image_size, len(self.mean))
        if grid is None or any(self.image_size % side for side in grid):
            raise UserError(f"student.image_size: {settings.name} has no last map whose cells are whole pixels at "
                            f"{self.image_size} px (grid {grid}); choose another size")
        self.grid: Grid = grid
        self.patches: int = grid[0] * grid[1]
        self.prefix: int = facts.prefix_tokens(self.trunk)
        if wrong := [size for size in sizes if size * grid[0] % self.image_size]:
            raise UserError(f"groups: {few(wrong)} px are not a whole number of patches of {self.image_size // grid[0]} px")
        if sizes and (settings.form == "visible" or settings.positions == "sincos"):
            raise UserError(f"groups: several sizes need another student.form than visible (now {settings.form}) and "
                            f"student.positions=learned or cropped (now {settings.positions})")
        if settings.positions == "cropped":
            cropped(self.trunk, grid, settings)
        if settings.windows is not None:
            self._check_windows(settings, [grid, *map(self.grid_at, sizes)])
            add_windows(self.trunk, settings.windows.global_blocks)
        width = encoded = facts.width(self.trunk)
        for hiding in self._hidings:
            hiding.build(self, settings, mask)
            width = hiding.width(settings, width)
        self.class_tokens = self._class_tokens(settings, targets)
        self.head, self.summary_head, self._cells = build_heads(width, encoded, targets, settings.head)
        for hiding in self._hidings:
            hiding.draw(self)
        draw_linear(self.head, self.summary_head)
        if hasattr(self, "mask_token") and mask is not None and mask.masked_patches(self.patches) == 0:
            self.mask_token.requires_grad_(False)  # it is not used, so it would get no gradient

    def _check_windows(self, settings: MaskedSettings, grids: list[Grid]) -> None:
        assert settings.windows is not None
        if settings.form != "mask_tokens" or not isinstance(self.trunk, VisionTransformer):
            raise UserError(f"student.windows: they are for a plain ViT of student.form=mask_tokens, not for {settings.name} "
                            f"with {settings.form}")
        if without := [f"{rows}x{columns}" for rows, columns in grids if not sides_of((rows, columns), settings.windows.sides)]:
            raise UserError(f"student.windows.sides={list(settings.windows.sides)}: none divides the grid {few(without)}")

    def _class_tokens(self, settings: MaskedSettings, targets: Plans) -> dict[str, int]:
        """Returns the position among the tokens of what each teacher's summary is predicted from; -1: the mean of the patches."""
        names = [] if isinstance(targets, int) else [name for name, plan in targets.items() if plan.summary]
        if settings.class_tokens == "none" or not names:
            return dict.fromkeys(names, -1)
        if not self._has_class_token:
            raise UserError(f"student.class_tokens={settings.class_tokens}: {settings.name} has no class token; set it to none, "
                            "for the mean of the patches")
        if settings.class_tokens == "shared":
            return dict.fromkeys(names, 0)
        if len(names) > self.prefix:
            raise UserError(f"student.class_tokens=per_teacher: {', '.join(names)} need {len(names)} class tokens, and "
                            f"{settings.name} has {self.prefix} with its registers; set student.registers={len(names) - 1}, or "
                            "more")
        return {name: place for place, name in enumerate(names)}

    @property
    def _has_class_token(self) -> bool:
        return getattr(self.trunk, "cls_token", None) is not None

    def tokens(self, images: Tensor, masked: Tensor | None = None, window: int | None = None) -> Tensor:
        """Returns [B, T, D] class token, register tokens and patches after the final norm, of uint8 images. The patches of
        `masked`, [B, N] bool, are hidden from the trunk; None hides no patch. `window`: side of windows in patches, None for
        none."""
        pixels = normalise(images, self.mean, self.std)
        if masked is not None:
            for hiding in self._hidings:
                pixels = hiding.pixels(self, pixels, masked)
        with hidden(masked), windowed(self.grid_at(images.shape[-1]), window):
            features: Tensor = self.trunk.forward_features(pixels)
        return features if features.ndim == 3 else tokens_and_grid(features, self.trunk)[0]

    def grid_at(self, side: int | None) -> Grid:
        """Returns the grid of patches of images with this side in pixels; None: of its own size."""
        if side is None:
            return self.grid
        rows, columns = self.grid
        return side * rows // self.image_size, side * columns // self.image_size

    def forward(
        self, images: Tensor, masked: Tensor | None, target_index: Tensor, wanted: Mapping[str, Grid | None] | None = None,
        window: int | None = None, turns: Mapping[str, Tensor] | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Returns [M, C] predictions for the patches of `target_index` (see `MaskedBatch`); for several targets by name, those of
        summaries [B, C] as NAME_summary. The patches of `masked` are hidden; None hides no patch.

        `wanted`: teachers to predict, each with the grid to which patches are brought by interpolation, all of which are then
        predicted, or None; of other teachers no rows are predicted, but the prediction depends on all their heads' weights.
        `window`: see `tokens`; `turns`: see `predict`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.heads_alone):
            encoded = tokens = self.tokens(images, masked, window)
            for hiding in self._hidings:
                tokens = hiding.patches(self, tokens, masked)
        if self.heads_alone and torch.is_grad_enabled():
            # A gradient of 0: the optimizer counts the steps of all parameters alike, and ZeRO reduces what it expects.
            tokens = tokens + sum((value.sum() * 0 for value in self._before_heads()), tokens.new_zeros(()))
        patches = Patches(tokens, self.prefix, self.grid_at(images.shape[-1]), target_index)
        found = predict(self.head, self._cells, patches, wanted, turns)
        if isinstance(found, Tensor):
            return found
        for name, head in self.summary_head.items():
            summary = self._summary(encoded, self.class_tokens[name])
            found[name + SUMMARY] = head(summary if wanted is None or name in wanted else summary[:0])
        return found

    def _before_heads(self) -> list[nn.Parameter]:
        return [value for name, value in self.named_parameters()
                if value.requires_grad and not name.startswith(self.head_parts)]

    def _summary(self, tokens: Tensor, place: int) -> Tensor:
        return tokens[:, self.prefix :].mean(dim=1) if place < 0 else tokens[:, place]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns of unmasked images the mean of the patches [B, D], and the class token [B, D] (None if the trunk has none); of
        several class tokens one after the other."""
        tokens = self.tokens(images)
        count = max(self.class_tokens.values(), default=0) + 1
        class_token = tokens[:, : max(1, count)].flatten(1) if self._has_class_token else None
        return self._summary(tokens, -1), class_token

    def summary(self, images: Tensor) -> Tensor:
        """Returns the [B, D] mean of the patch tokens of unmasked images."""
        return self.features(images)[0]
