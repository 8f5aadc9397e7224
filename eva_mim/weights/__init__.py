"""Weights between stages: hand-over, head rows, CLIP start, export. This file has the settings alone."""

from __future__ import annotations

from typing import Literal

from eva_mim.core.settings import Settings


class HandOverSettings(Settings):
    """Rules by which a trunk takes over the weights of `init_from`."""

    container: str | None = None
    """Part of a torch file ("model_ema", ...); default: the trained weights."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches for which the positions were made, if the checkpoint does not record them."""
    positions: Literal["timm", "original", "eva-clip"] = "timm"
    """Rule for another grid: bicubic with antialias (timm), without (EVA's run_class_finetuning.py), or with aligned corners
    (EVA-CLIP's loader, for tables under OpenAI's names)."""
    kernel: Literal["pseudo-inverse", "bicubic"] = "pseudo-inverse"
    """Rule for another patch size: the kernel whose response to a resized patch equals the old one's to the patch (FlexiViT,
    timm), or plain bicubic (EVA's interpolate_patch_14to16.py)."""
    norm: Literal["copy", "drop"] = "copy"
    """Start of a mean-pooled classifier's `fc_norm`: the parent's `norm` (timm), or fresh (EVA's run_class_finetuning.py)."""
