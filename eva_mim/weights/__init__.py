"""Weights between stages: hand-over, head rows, CLIP start, export. Settings only here."""

from __future__ import annotations

from typing import Literal

from eva_mim.core.settings import Settings


class HandOverSettings(Settings):
    """How the trunk takes over the weights of `init_from`."""

    container: str | None = None
    """Part of a torch file ("model_ema", ...); default the trained weights."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches that the positions were made for, where the checkpoint does not say."""
    positions: Literal["timm", "original", "eva-clip"] = "timm"
    """Another grid: bicubic with antialias (timm), without (EVA's run_class_finetuning.py), or with aligned corners (EVA-CLIP's
    loader, for tables under OpenAI's names)."""
    kernel: Literal["pseudo-inverse", "bicubic"] = "pseudo-inverse"
    """Another patch size: the kernel that answers to a resized patch as the old one did (FlexiViT, timm), or plain bicubic
    (EVA's interpolate_patch_14to16.py)."""
    norm: Literal["copy", "drop"] = "copy"
    """A mean-pooled classifier's `fc_norm` starts as the parent's `norm` (timm), or fresh (EVA's run_class_finetuning.py)."""
