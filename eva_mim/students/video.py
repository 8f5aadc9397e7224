"""Classifiers of videos: a timm model with its head that sees all frames at once, or the mean of its answers to single frames."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.students import VideoClassifierSettings
from eva_mim.students.classifier import Classifier
from eva_mim.trunks import facts
from eva_mim.trunks.pixels import normalise


class VideoClassifier(Classifier):
    """A timm model with `classes` outputs for videos of `settings.frames` frames.

    Joint attention (EVA-01): the patches of all frames are tokens of one sequence, with learned positions of the frames, which
    start at zero, beside those of patches; class and register tokens are there once. The head reads the mean of all patches. A
    video of one frame gives what the image classifier gives. Raises UserError for a trunk that is no plain transformer.
    """

    def __init__(self, settings: VideoClassifierSettings, classes: int):
        super().__init__(settings, classes)
        self.frames, self.joint = settings.frames, settings.time == "joint"
        if not self.joint:
            return
        trunk: Any = self.trunk
        if not isinstance(trunk, (VisionTransformer, Eva)) or facts.grid(trunk) is None:
            raise UserError(f"student.name: {settings.name} has no sequence of patches for all frames; set student.time=mean")
        if isinstance(trunk, Eva) and getattr(trunk, "rope_mixed", False):
            raise UserError(f"student.name: {settings.name} turns patches differently in each layer; set student.time=mean")
        self.time_embed = nn.Parameter(torch.zeros(1, self.frames, 1, facts.width(trunk)))

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters outside the trunk that are not decayed, as timm's models do for their positions."""
        return {"time_embed"}

    def forward(self, images: Tensor) -> Tensor:
        """Returns [B, K] logits of videos [B, T, 3, H, W], uint8 or 0 to 255."""
        count = images.shape[1]
        pixels = normalise(images.flatten(0, 1), self.mean, self.std)
        if not self.joint:
            alone: Tensor = self.trunk(pixels)
            return alone.reshape(-1, count, alone.shape[1]).mean(1)
        trunk: Any = self.trunk
        placed = trunk._pos_embed(trunk.patch_embed(pixels))
        tokens, rope = placed if isinstance(placed, tuple) else (placed, None)
        prefix = facts.prefix_tokens(trunk)
        patches = tokens[:, prefix:].unflatten(0, (-1, count)) + self.time_embed
        tokens = torch.cat([tokens[::count, :prefix], patches.flatten(1, 2)], 1)
        tokens = trunk.norm_pre(tokens)
        options = {} if rope is None else {"rope": rope.repeat(count, 1)}
        for block in trunk.blocks:
            if trunk.grad_checkpointing and torch.is_grad_enabled():
                tokens = torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False, **options)
            else:
                tokens = block(tokens, **options)
        logits: Tensor = trunk.forward_head(trunk.norm(tokens))
        return logits


def resized_times(times: Tensor, frames: int) -> Tensor:
    """Returns positions [1, T, 1, D] of frames for another number of frames, by linear interpolation."""
    rows = times[0, :, 0].T[None]
    return nn.functional.interpolate(rows, frames, mode="linear")[0].T[None, :, None]
