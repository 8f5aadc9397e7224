"""Zero-shot classifier of a finished CLIP model: the weight of each class is the mean of its prompts' features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.core.settings import few
from eva_mim.data.class_lists import SYNSET, read_classes, spoken
from eva_mim.data.prompts import imagenet_names, told_templates
from eva_mim.engine.step import autocast
from eva_mim.evaluate.contrastive import class_features
from eva_mim.trunks.config import RESIZING
from eva_mim.trunks.create import create
from eva_mim.trunks.kernels import tune
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.files.sidecar import batch_of, describe


class FolderClip(nn.Module):
    """CLIP model that open_clip opens from a folder: a clip stage's result, its `ema`, or what `convert --to hf` wrote."""

    resizing: dict[str, Any] = RESIZING

    def __init__(self, folder: Path, *, precision: str, device: torch.device):
        """Raises UserError for a folder that is no CLIP model or that open_clip cannot open, and for other than bicubic resizing
        of the shortest side."""
        super().__init__()
        import open_clip

        if not describe(folder).open_clip:
            raise UserError(f"{folder} is no CLIP model (open_clip_config.json)")

        try:
            self.model: Any = create(f"local-dir:{folder}", by=open_clip.create_model, device=device, weights_only=True).eval()
            self.tokenize: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(f"local-dir:{folder}")
        except (RuntimeError, TypeError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise UserError(f"{folder}: open_clip cannot open it: {error}") from None
        pixels = open_clip.get_model_preprocess_cfg(self.model)
        if pixels["interpolation"] != "bicubic" or pixels["resize_mode"] != "shortest":
            raise UserError(f"{folder}: its images are resized by {pixels['interpolation']!r}, {pixels['resize_mode']!r}; only "
                            "bicubic of the shortest side is known here")
        size = pixels["size"]
        self.image_size = int(size[0] if isinstance(size, (tuple, list)) else size)
        self.mean, self.std = tuple(pixels["mean"]), tuple(pixels["std"])
        self.precision, self.device, self.batch = precision, device, batch_of(describe(folder))
        tune(self, device)

    def context(self) -> Any:
        """Returns the context of a forward pass, which sets its precision."""
        return autocast(self.device, self.precision)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the embeddings [B, C] of uint8 images, as the model gives them."""
        found: Tensor = self.model.encode_image(normalise(images, self.mean, self.std))
        return found

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns unit embeddings [T, C] of token ids [T, L]."""
        features: Tensor = self.model.encode_text(tokens, normalize=True)
        return features

    @torch.inference_mode()
    def class_weights(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Returns [K, C], a unit embedding for each class. Every rank must call."""
        return class_features(self.encode_text, self.tokenize, classes, templates, self.context, self.device)


class ZeroShot(nn.Module):
    """Zero-shot classifier of a CLIP model in a folder."""

    resizing = RESIZING

    def __init__(self, folder: Path, *, classes: str | None, templates: str, precision: str, device: torch.device):
        """`classes`: a file or folder with class names (`class_lists.read_classes`), default ImageNet's 1,000; `templates`:
        "openai", "simple" or a file. Every rank must call, since the prompts are divided among the ranks. Raises UserError for
        what `FolderClip` refuses, and unusable class names or templates."""
        super().__init__()
        self.classes = named_classes(classes)
        prompts = told_templates(templates)
        self.clip = FolderClip(folder, precision=precision, device=device)
        self.image_size, self.batch = self.clip.image_size, self.clip.batch
        self.register_buffer("weights", self.clip.class_weights(self.classes, prompts))

    def forward(self, images: Tensor) -> Tensor:
        """Returns [B, K] cosines of uint8 images with the classes."""
        features = F.normalize(self.clip(images), dim=-1).float()
        with torch.autocast(features.device.type, enabled=False):
            cosines: Tensor = features @ self.weights.T  # type: ignore[operator]
        return cosines


def named_classes(what: str | None) -> tuple[str, ...]:
    """Returns class names with words for prompts, by label. Raises UserError for classes with a synset id and no name."""
    classes: Sequence[str] = imagenet_names() if what is None else read_classes(what)
    silent = [name for name in classes if SYNSET.fullmatch(spoken(name))]
    if silent:
        raise UserError(f"--classes {what}: {len(silent)} classes have a synset id and no name: {few(silent)}; give a file with "
                        "lines such as \"n01440764 tench\"")
    return tuple(classes)
