"""What all teachers share: frozen, in eval mode, normalising their own pixels, not a submodule of anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.contracts import Features, Grid
from eva_mim.pixels import normalise


class FrozenTeacher:
    """A network with a way to read its features. Not an nn.Module: no engine casts, shards, saves or counts it.

    `features` maps normalised pixels [B, 3, S, S] to (summary [B, C], spatial [B, N, C], grid).
    """

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[Tensor], Features],
        *,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        self._network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._features = features
        self.image_size, self.mean, self.std = image_size, mean, std
        try:
            probe = self(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"teacher.image_size: this {type(network).__name__} cannot take {image_size} px: {error}") from None
        self.grid: Grid = probe.grid
        self.width: int = probe.spatial.shape[-1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of [B, 3, S, S] uint8 pixels."""
        return self._features(normalise(images, self.mean, self.std))

    def to(self, device: Any) -> FrozenTeacher:
        """Move the weights."""
        self._network.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights: proof that a run left the teacher alone."""
        total = hashlib.sha256()
        for name, value in sorted(self._network.state_dict().items()):
            total.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def tokens_and_grid(features: Tensor, trunk: nn.Module) -> tuple[Tensor, Grid]:
    """Patch tokens [B, N, D] and grid from what a timm trunk's `forward_features` returns: [B, D, h, w] maps (or
    [B, h, w, D] for the trunks that say so) or [B, prefix + N, D] tokens."""
    if features.ndim == 4:
        if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        grid = features.shape[2], features.shape[3]
        return features.flatten(2).transpose(1, 2), grid
    patches = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    embed = getattr(trunk, "patch_embed", None)
    grid_size = getattr(embed, "grid_size", None)
    if grid_size is None or grid_size[0] * grid_size[1] != patches.shape[1]:
        raise UserError(f"{type(trunk).__name__}: {patches.shape[1]} patch tokens, but the trunk does not say its grid")
    return patches, (grid_size[0], grid_size[1])


def per_patch(features: Tensor, tokens: Tensor, trunk: Any, head: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, N, C]: what `head` (the trunk's pooling, last norm and projection) makes of each patch alone.

    Each of the [B, N, D] `tokens` goes through as a map of one cell, or a sequence of one patch behind copies of itself in
    the places of class and register tokens. `features` is what the tokens came from: it tells the layout.
    """
    batch, count, width = tokens.shape
    single = tokens.reshape(batch * count, 1, width)
    if features.ndim == 4:
        nhwc = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        single = single.reshape(-1, 1, 1, width) if nhwc else single.reshape(-1, width, 1, 1)
    else:
        single = single.expand(-1, getattr(trunk, "num_prefix_tokens", 0) + 1, -1)
    return head(single).reshape(batch, count, -1)
