"""Features of a timm trunk as tokens with their grid, whatever it returns: tokens, or a map of either layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.trunks import facts


def tokens_and_grid(features: Tensor, trunk: nn.Module) -> tuple[Tensor, Grid]:
    """Returns patch tokens [B, N, D] and grid from the output of a timm trunk's `forward_features`: [B, D, h, w] maps
    ([B, h, w, D] if `trunk.output_fmt` is "NHWC") or [B, prefix + N, D] tokens. Raises UserError if the grid is not known."""
    if features.ndim == 4:
        if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        grid = features.shape[2], features.shape[3]
        return features.flatten(2).transpose(1, 2), grid
    patches, own = features[:, facts.prefix_tokens(trunk) :], facts.grid(trunk)
    if own is None or own[0] * own[1] != patches.shape[1]:
        raise UserError(f"{type(trunk).__name__}: {patches.shape[1]} patch tokens, but the trunk does not say its grid")
    return patches, own


@torch.no_grad()
def final_grid(trunk: nn.Module, side: int, channels: int) -> Grid | None:
    """Returns (rows, columns) of the last features of images with this side in pixels: of a trunk of patch tokens its own, else
    those of its last map; None if it has neither."""
    if facts.has_tokens(trunk):
        return facts.grid(trunk)
    training, device = trunk.training, next(trunk.parameters()).device
    features = trunk.eval().forward_features(torch.zeros(1, channels, side, side, device=device))  # type: ignore[operator]
    trunk.train(training)
    return tokens_and_grid(features, trunk)[1] if features.ndim == 4 else None
