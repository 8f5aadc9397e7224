"""The CLIP student: open_clip's own model, with a timm trunk as image tower."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CustomTextCLIP, resize_text_pos_embed
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.run_folder import CLIP_CONFIG
from eva_mim.students import MAX_LOGIT_SCALE, ClipSettings, TextSettings
from eva_mim.trunks import Tower, facts
from eva_mim.trunks.create import build_trunk, scale_patch_gradient
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.files.lazy import finite

TEXT_LAYERS = {"stem": r"^(?:token|positional)_embedding", "blocks": r"^transformer\.resblocks\.(\d+)"}
"""Layers of open_clip's text tower; final norm and projection are at the top (EVA-CLIP/rei/training/optim.py)."""
PROJECTION = "text_projection"
FOREIGN = ("hf_model_name", "hf_tokenizer_name", "embed_cls", "output_tokens")
"""Keys of open_clip's text_cfg that need another tokenizer or another forward pass than this student has."""


class ClipStudent(nn.Module):
    """A CLIP model with an image tower and a text tower; `config` has the arguments with which open_clip builds the model."""

    def __init__(self, settings: ClipSettings, *, weights: bool = True, distilled: Mapping[str, int] | None = None):
        """Without `weights` no file is read. `distilled`: widths of a teacher's embeddings that are predicted, of "image" and
        perhaps "text"."""
        super().__init__()
        probe = build_trunk(settings.model_copy(update={"drop_path": 0.0}))
        own = int(probe.pretrained_cfg["input_size"][-1])  # type: ignore[index]
        if settings.patch_size is not None or settings.image_size not in (None, own):
            raise UserError(
                f"student: open_clip builds {settings.name} by its name alone ({own} px); name an architecture of the "
                "wanted image_size and patch_size, or register one with timm (see eva_mim/trunks/small.py)"
            )
        if settings.patch_dropout and not hasattr(probe, "patch_drop"):
            raise UserError(f"student.patch_dropout={settings.patch_dropout}: {settings.name} cannot leave out patches; set it "
                            "to 0")
        self.image_size = own
        self.mean, self.std = facts.mean_std(probe, settings)
        source = text_source(settings.text, weights=weights)
        self.config: dict[str, Any] = {
            "embed_dim": settings.embed_dim,
            "vision_cfg": {
                "timm_model_name": settings.name,
                "timm_pool": settings.pool,
                "timm_proj": "linear",
                "timm_proj_bias": settings.proj_bias,
                "image_size": own,
                "timm_drop_path": settings.drop_path or None,
                "patch_dropout": settings.patch_dropout,
            },
            "text_cfg": source.config,
            "quick_gelu": source.quick_gelu,
            "init_logit_scale": settings.init_logit_scale,
            "init_logit_bias": settings.init_logit_bias,
        }
        # The logit scale is a vector of one element, because DeepSpeed cannot broadcast a scalar parameter.
        self.model = CustomTextCLIP(**self.config, nonscalar_logit_scale=True)
        self.text_report = seed_text(self.model.text, source, settings) if source.weights and settings.init != "clip" else None
        """Report of the tensors taken from the text tower's source; None if the text tower has no weights of its own source."""
        if settings.grad_checkpointing:
            self.model.set_grad_checkpointing()
        scale_patch_gradient(self.trunk, settings)
        self._lock(settings)
        own_width = settings.embed_dim
        self.distilled = nn.ModuleDict({name: nn.Identity() if width == own_width else nn.Linear(own_width, width, bias=False)
                                        for name, width in (distilled or {}).items()})
        """From the shared space to a teacher's; no part of the result."""

    def _lock(self, settings: ClipSettings) -> None:
        """Locks the towers as the settings ask. Raises UserError if a locked text tower has no trained weights, if the trunk's
        layers are not known, or if every parameter of a locked tower would be trained."""
        if settings.lock_text and self.text_report is None and settings.init != "clip":
            raise UserError("student.lock_text=true needs a trained text tower; set student.text.init_from (and .weights)")
        for name, locked, unlocked, tower, lock in (
            ("image", settings.lock_image, settings.image_unlocked_groups, self.trunk, self.model.lock_image_tower),
            ("text", settings.lock_text, settings.text_unlocked_groups, self.model.text, self.model.lock_text_tower),
        ):
            if not locked:
                continue
            if unlocked and name == "image" and not hasattr(tower, "group_matcher"):
                raise UserError(f"student.image_unlocked_groups={unlocked}: {settings.name} does not say its layers; set it to 0")
            with warnings.catch_warnings():  # open_clip imports a timm module by its old name
                warnings.simplefilter("ignore", FutureWarning)
                lock(unlocked)
            if all(parameter.requires_grad for parameter in tower.parameters()):
                raise UserError(f"student.{name}_unlocked_groups={unlocked} leaves nothing locked; lower it")

    def train(self, mode: bool = True) -> ClipStudent:
        """Sets the mode of the model; locked batch norms stay in evaluation mode, so that their statistics do not change."""
        super().train(mode)
        for module in self.trunk.modules():
            # open_clip would replace them by modules without the activation that timm's batch norms contain.
            own = list(module.parameters()) if isinstance(module, _BatchNorm) else []
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        return self

    @property
    def trunk(self) -> nn.Module:
        """The timm model of the image tower."""
        trunk: nn.Module = self.model.visual.trunk
        return trunk

    def towers(self) -> dict[str, Tower]:
        """Returns both towers by name, each with its projection; the logit scale is in neither."""
        text = self.model.text
        return {"image": Tower.of_timm(self.trunk, self.model.visual), "text": Tower(text, text, TEXT_LAYERS)}

    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """Returns the tokenizer: texts -> [B, L] int64, cut at the context length."""
        tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        return tokenizer

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        """Returns unit image features [B, C], unit text features [B, C], the logit scale (not its logarithm), the logit bias
        if there is one, and the predictions of a teacher's embeddings [B, Ct] in the order of `distilled`."""
        image, text, *_ = self.model(normalise(images, self.mean, self.std), texts)
        raw = self.model.logit_scale.reshape(())
        # The gradient ignores the clamp, which is applied here because with ZeRO the stored value cannot be clamped.
        scale = (raw + (raw.clamp(0, MAX_LOGIT_SCALE) - raw).detach()).exp()
        bias = self.model.logit_bias
        found = (image, text, scale) if bias is None else (image, text, scale, bias.reshape(()))
        embeddings = {"image": image, "text": text}
        return (*found, *(head(embeddings[name]) for name, head in self.distilled.items()))

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns [B, C] unit features of uint8 images."""
        features: Tensor = self.model.encode_image(normalise(images, self.mean, self.std), normalize=True)
        return features

    def encode_text(self, texts: Tensor) -> Tensor:
        """Returns [B, C] unit features of [B, L] token ids."""
        features: Tensor = self.model.encode_text(texts, normalize=True)
        return features

    def open_clip_config(self) -> dict[str, Any]:
        """Returns the `open_clip_config.json` of the student, without drop path and patch dropout."""
        vision = {**self.config["vision_cfg"], "timm_drop_path": None, "patch_dropout": 0.0}
        model_config = {**self.config, "vision_cfg": vision, "custom_text": True}
        return open_clip_config(model_config, image_size=self.image_size, mean=self.mean, std=self.std)


def token_counts(texts: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each text before it is cut, with those of start and end."""
    encode = open_clip.SimpleTokenizer().encode
    return [len(encode(text)) + 2 for text in texts]


def open_clip_config(
    model_config: dict[str, Any], *, image_size: int | tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
    """Returns the `open_clip_config.json` with which `open_clip.create_model("local-dir:FOLDER")` builds and opens a CLIP model.

    `model_config` is open_clip's `model_cfg`; `image_size` is a side in pixels, or (height, width); `mean` and `std` have one
    value per channel.
    """
    pixels = {"size": image_size, "mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"model_cfg": model_config, "preprocess_cfg": pixels}


def as_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the model's weights as in open_clip's own models: logit scale and bias are scalars, and the scale is clamped."""
    scalars = {name: state[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in state}
    return state | scalars | {"logit_scale": scalars["logit_scale"].clamp(0, MAX_LOGIT_SCALE)}


class TextSource(NamedTuple):
    """Architecture and initial weights of a text tower."""

    name: str
    config: dict[str, Any]
    """open_clip's text_cfg of the tower."""
    quick_gelu: bool
    weights: dict[str, Tensor]
    """Initial weights by name; empty for a tower from scratch."""


def text_source(settings: TextSettings, *, weights: bool = True) -> TextSource:
    """Reads the text tower's `init_from`; without `weights` its architecture alone. Raises UserError if it is no text tower of a
    kind that this student supports, or not of the size in the settings."""
    sizes = {"width": settings.width or 128, "layers": settings.layers or 2, "heads": settings.heads or 4}
    if settings.init_from is None:
        length, vocabulary = settings.context_length or 24, open_clip.SimpleTokenizer().vocab_size
        config = {**sizes, "context_length": length, "vocab_size": vocabulary}
        return TextSource("scratch", config, bool(settings.quick_gelu), {})
    folder = Path(settings.init_from)
    if folder.is_dir():
        if not (folder / CLIP_CONFIG).is_file():
            raise UserError(f"student.text.init_from: {folder} is not the folder of a finished clip stage")
        model_config = json.loads((folder / CLIP_CONFIG).read_text())["model_cfg"]
        found = _text_weights(f"local-dir:{folder}", None) if weights else {}
    else:
        model_config = open_clip.get_model_config(settings.init_from)
        if model_config is None:
            raise UserError(f"student.text.init_from: {settings.init_from} is neither a folder nor an open_clip name")
        found = _text_weights(settings.init_from, settings.weights) if settings.weights and weights else {}
    config = dict(model_config["text_cfg"])
    for part in FOREIGN:
        if config.get(part):
            raise UserError(f"student.text.init_from: the text tower of {settings.init_from} needs {part}={config[part]}, "
                            "which this student does not have; take another")
    has = CLIPTextCfg(**config)
    for what in sizes:
        if getattr(settings, what) not in (None, getattr(has, what)):
            raise UserError(f"student.text.{what}={getattr(settings, what)}: the text tower of {settings.init_from} has "
                            f"{getattr(has, what)}; leave it out, or take another student.text.init_from")
    config["context_length"] = settings.context_length or has.context_length
    quick = model_config.get("quick_gelu", False) if settings.quick_gelu is None else settings.quick_gelu
    return TextSource(settings.init_from, config, bool(quick), found)


def _text_weights(name: str, weights: str | None) -> dict[str, Tensor]:
    """Reads the text tower's tensors of an open_clip model, by name. Raises UserError."""
    try:
        model = open_clip.create_model(name, pretrained=weights, weights_only=True)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise UserError(f"student.text: {name}{f' with weights {weights}' if weights else ''}: {error}") from None
    state = open_clip.model.convert_to_custom_text_state_dict(model.state_dict())
    return {name.removeprefix("text."): torch.as_tensor(value) for name, value in state.items() if name.startswith("text.")}


def seed_text(tower: nn.Module, source: TextSource, settings: ClipSettings) -> KeyReport:
    """Copies a source's weights into a text tower, in place. Returns a report of every tensor, under its name in a CLIP model.

    Raises UserError if the projection shall be reused and its output has another width than the shared space.
    """
    wanted = settings.text.projection or ("reused" if settings.lock_text else "new")
    given = {name: value for name, value in source.weights.items() if wanted == "reused" or not name.startswith(PROJECTION)}
    state = tower.state_dict()
    report = KeyReport()
    for name in source.weights.keys() - given.keys():
        report.note(report.ignored, f"text.{name}", "the source's projection")
    for name, value in state.items():
        if name not in given and name.startswith(PROJECTION):
            report.note(report.new, f"text.{name}", "the projection into the shared space")
        elif name.startswith(PROJECTION) and value.shape != given[name].shape:
            raise UserError(f"student.embed_dim={settings.embed_dim}: the projection of {source.name}, which is reused, is "
                            f"{list(given[name].shape)}; set student.embed_dim to its width")
        elif name == "positional_embedding" and len(value) != len(given[name]):
            old, new = len(given[name]), len(value)
            how = "the first ones" if new < old else "interpolated"
            report.note(report.resized, f"text.{name}", f"{old} positions -> {new}: {how}")
            given[name] = given[name][:new].clone()
            if new > old:
                resize_text_pos_embed(given, tower)
        else:
            report.loaded.append(f"text.{name}")
    for name, value in given.items():
        finite(value, f"text.{name}", f"the text tower of {source.name}")
    tower.load_state_dict(state | given)
    return report
