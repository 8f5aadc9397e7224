"""The CLIP student: open_clip's own model, with a timm trunk as image tower."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from safetensors import SafetensorError
from torch import Tensor, nn

from eva_mim.config import UserError
from eva_mim.pixels import normalise
from eva_mim.students import ClipSettings, TextSettings
from eva_mim.students.trunk import build_trunk, mean_std, scale_patch_gradient

MAX_LOGIT_SCALE = math.log(100)
"""CLIP (Radford et al. 2021, section 2.5) and EVA-CLIP clip the learned temperature here."""


class ClipStudent(nn.Module):
    """Two towers; `config` is what open_clip needs to build the same model again."""

    def __init__(self, settings: ClipSettings):
        super().__init__()
        probe = build_trunk(settings.model_copy(update={"drop_path": 0.0}))
        own = probe.pretrained_cfg["input_size"][-1]  # type: ignore[index]
        if settings.patch_size is not None or settings.image_size not in (None, own):
            raise UserError(
                f"student: open_clip builds {settings.name} by its name alone ({own} px); name an architecture of the "
                "wanted image_size and patch_size, or register one with timm (see eva_mim/students/small.py)"
            )
        self.image_size = own
        self.mean, self.std = mean_std(probe)
        text, text_weights = text_tower(settings.text)
        self.config: dict[str, Any] = {
            "embed_dim": settings.embed_dim,
            "vision_cfg": {
                "timm_model_name": settings.name,
                "timm_pool": settings.pool,
                "timm_proj": "linear",
                "image_size": own,
                "timm_drop_path": settings.drop_path or None,
            },
            "text_cfg": text,
        }
        # A vector of one: DeepSpeed cannot broadcast a scalar parameter.
        self.model = CustomTextCLIP(**self.config, nonscalar_logit_scale=True)
        if text_weights:
            # text_projection belongs to the space that is being learned; EVA-CLIP's skip list leaves it out as well
            reused = {name: value for name, value in text_weights.items() if name != "text_projection"}
            missing = self.model.text.load_state_dict(reused, strict=False).missing_keys
            assert set(missing) <= {"text_projection"}, missing
        if settings.grad_checkpointing:
            self.model.set_grad_checkpointing()
        scale_patch_gradient(self.trunk, settings)

    @property
    def trunk(self) -> nn.Module:
        """The timm model of the image tower."""
        trunk: nn.Module = self.model.visual.trunk
        return trunk

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """Texts -> [B, L] int64, cut at the context length."""
        length: int = self.config["text_cfg"].get("context_length", 77)
        tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=length)
        return tokenizer

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image features [B, C], unit text features [B, C], logit scale (not its logarithm)."""
        image, text, _ = self.model(normalise(images, self.mean, self.std), texts)
        raw = self.model.logit_scale.reshape(())
        # The gradient passes the clamp: with ZeRO the stored value cannot be clamped between steps.
        scale = (raw + (raw.clamp(0, MAX_LOGIT_SCALE) - raw).detach()).exp()
        return image, text, scale

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, C] unit features of uint8 images."""
        features: Tensor = self.model.encode_image(normalise(images, self.mean, self.std), normalize=True)
        return features

    def encode_text(self, texts: Tensor) -> Tensor:
        """[B, C] unit features of [B, L] token ids."""
        features: Tensor = self.model.encode_text(texts, normalize=True)
        return features

    def open_clip_config(self) -> dict[str, Any]:
        """Content of `open_clip_config.json`: with it `open_clip.create_model("local-dir:...")` opens the stage."""
        vision = {**self.config["vision_cfg"], "timm_drop_path": None}
        return {
            "model_cfg": {**self.config, "vision_cfg": vision, "custom_text": True},
            "preprocess_cfg": {"size": self.image_size, "mean": self.mean, "std": self.std,
                               "interpolation": "bicubic", "resize_mode": "shortest"},
        }


def as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's weights as open_clip's own models hold them: the logit scale is a scalar, and within its bounds."""
    return state | {"logit_scale": state["logit_scale"].reshape(()).clamp(0, MAX_LOGIT_SCALE)}


def text_tower(settings: TextSettings) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(open_clip's text_cfg, weights of the text tower or nothing). Raises UserError."""
    if settings.init_from is None:
        return (
            {
                "width": settings.width,
                "layers": settings.layers,
                "heads": settings.heads,
                "context_length": settings.context_length,
                "vocab_size": open_clip.SimpleTokenizer().vocab_size,
            },
            {},
        )
    folder = Path(settings.init_from)
    if folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"student.text.init_from: {folder} is not the folder of a finished clip stage")
        config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
        name, weights = f"local-dir:{folder}", None
    else:
        config = open_clip.get_model_config(settings.init_from)
        if config is None:
            raise UserError(f"student.text.init_from: {settings.init_from} is neither a folder nor an open_clip name")
        name, weights = settings.init_from, settings.weights
    try:
        model = open_clip.create_model(name, pretrained=weights, weights_only=True)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"student.text: {settings.init_from} with weights {settings.weights}: {error}") from None
    if not hasattr(model, "text"):
        model = open_clip.model.convert_to_custom_text_state_dict(model.state_dict())
        state = {key.removeprefix("text."): value for key, value in model.items() if key.startswith("text.")}
    else:
        state = dict(model.text.state_dict())
    return dict(config["text_cfg"]), {name: torch.as_tensor(value) for name, value in state.items()}
