"""Writers of the formats in `targets.py`: functions of (Model, file or existing empty folder, dtype) that return the report of
the changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eva_mim.convert.architecture import Architecture
from eva_mim.convert.onnx import export
from eva_mim.convert.parity import unloaded
from eva_mim.convert.targets import TORCH_SUFFIXES
from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json
from eva_mim.core.report import KeyReport
from eva_mim.core.run_folder import CLIP_CONFIG, CLIP_WEIGHTS, HEAD, TIMM_CONFIG, WEIGHTS
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.files.write import write_safetensors, write_torch
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.dinov2 import to_dinov2
from eva_mim.weights.names.eva import Converted, to_eva
from eva_mim.weights.names.families import Family, detect
from eva_mim.weights.names.huggingface import preprocessor, to_transformers
from eva_mim.weights.names.openai import timm_to_openai, to_openai

PRE_NORM = "norm_pre.weight"
"""Tensor of timm's ViTs that are OpenAI's image tower."""


@dataclass(frozen=True)
class Model:
    """Weights under our names, and the model of a library that holds them."""

    weights: dict[str, Tensor]
    """A trunk under timm's names, or a CLIP model under open_clip's."""
    architecture: Architecture
    family: Family | None
    """None for an architecture that names and shapes do not determine."""
    trunk: Model | None = None
    """The image tower of a CLIP model, as timm's model."""
    outside: dict[str, Tensor] = field(default_factory=dict)
    """Mask token and predicting head of a masked model."""
    rope: Rope | None = None
    classes: tuple[str, ...] | None = None
    """Classes of the head, in the order of its rows."""
    tower: bool = False
    """True for the image tower of a CLIP file, alone, which the original code's names put below `visual.`."""

    def built(self) -> nn.Module:
        """Builds the model; its parameters take no memory."""
        with unloaded():
            return self.architecture.build()


def write_file(model: Model, path: Path, dtype: str | None) -> KeyReport:
    """Writes one file of weights, torch's or safetensors by its suffix."""
    write = write_torch if path.suffix in TORCH_SUFFIXES else write_safetensors
    write(path, model.weights, dtype=dtype)
    return KeyReport()


def write_open_clip(model: Model, path: Path, dtype: str | None) -> KeyReport:
    """Writes a CLIP model that open_clip has a name for."""
    if model.trunk is None:
        raise UserError("--to open_clip: there is no text tower here, and open_clip holds whole CLIP models; use --to timm or hf")
    if not model.architecture.exact:
        raise UserError("--to open_clip: open_clip has no name for this model; use --to hf, which it opens as local-dir:DST")
    return write_file(model, path, dtype)


def write_folder(model: Model, folder: Path, dtype: str | None) -> KeyReport:
    """Writes timm's folder, and open_clip's files beside it for a model with a text tower."""
    trunk = model.trunk or model
    write_safetensors(folder / WEIGHTS, trunk.weights, dtype=dtype)
    same = trunk.classes if trunk.classes and len(trunk.classes) == trunk.architecture.arguments["num_classes"] else None
    write_json(folder / TIMM_CONFIG, trunk.architecture.timm_config(same))
    if model.trunk is not None:
        write_safetensors(folder / CLIP_WEIGHTS, model.weights, dtype=dtype)
        write_json(folder / CLIP_CONFIG, model.architecture.open_clip_config())
    return KeyReport()


def write_stage(model: Model, folder: Path, dtype: str | None) -> KeyReport:
    """Writes the folder of a stage of ours."""
    if model.outside:
        write_safetensors(folder / HEAD, model.outside, dtype=dtype)
    return write_folder(model, folder, dtype)


def write_eva(model: Model, path: Path, dtype: str | None) -> KeyReport:
    """Writes a file under the names of the original code of the family, below its container: `module`, or none for CLIP."""
    if model.family is None:
        raise UserError(f"--to eva: {model.architecture.name} is no model of the original code")
    if model.family.name == "OpenAI CLIP":
        done = to_openai(model.weights)
    elif PRE_NORM in model.weights:
        done = timm_to_openai(model.weights)
    else:
        rope = model.rope or (_rope(model) if model.family.name == "EVA-02" else None)
        done = to_eva(model.weights, model.outside, grid=model.architecture.grid, rope=rope, tower=model.tower)
    bare = model.family.form == "clip" or model.tower or PRE_NORM in model.weights
    write_torch(path, done.weights, container=None if bare else "module", dtype=dtype)
    return done.report


def _rope(model: Model) -> Rope:
    """Returns the rotary parameters of EVA-02's timm model; masked models have plain indices."""
    trunk: Any = (model.trunk or model).built()
    width: int = trunk.embed_dim // trunk.blocks[0].attn.num_heads
    reference = trunk.rope.ref_feat_shape
    return Rope(width, None if model.outside or not reference else reference[0])


def write_transformers(model: Model, folder: Path, dtype: str | None) -> KeyReport:
    """Writes OpenAI's CLIP, whole or its image tower, or a plain ViT, as a folder of transformers."""
    found = model.architecture
    if model.family is None or not (model.family.name == "OpenAI CLIP" or PRE_NORM in model.weights):
        done, config = to_dinov2(model.weights, model.built())
        _write_transformers(folder, done, config, found, dtype)
        return done.report
    if found.image_size[0] != found.image_size[1]:
        raise UserError(f"--to transformers: images of {found.image_size} are not square")
    tower: Any = model.built()
    text_heads, changed, weights = None, KeyReport(), model.weights
    if model.family.name == "OpenAI CLIP":
        text, tower = getattr(tower, "text", tower), tower.visual
        heads, text_heads = (part.transformer.resblocks[0].attn.num_heads for part in (tower, text))
        eps, act = tower.ln_post.eps, tower.transformer.resblocks[0].mlp.gelu
    else:
        heads, eps, act = tower.blocks[0].attn.num_heads, tower.blocks[0].norm1.eps, tower.blocks[0].mlp.act
        openai = timm_to_openai(weights)
        weights, changed = openai.weights, openai.report
    done, config = to_transformers(
        weights, detect(weights), heads=heads, image_size=found.image_size[0], eps=eps, text_heads=text_heads,
        activation="quick_gelu" if type(act).__name__.startswith("QuickGELU") else "gelu",
    )
    _write_transformers(folder, done, config, found, dtype)
    return changed.plus(done.report)


def _write_transformers(folder: Path, done: Converted, config: dict[str, Any], found: Architecture, dtype: str | None) -> None:
    write_safetensors(folder / WEIGHTS, done.weights, dtype=dtype)
    write_json(folder / TIMM_CONFIG, config)
    write_json(folder / "preprocessor_config.json", preprocessor(found.mean, found.std, found.image_size[0]))


def write_onnx(model: Model, path: Path, dtype: str | None) -> KeyReport:
    """Writes a graph in float32."""
    if dtype not in (None, "float32"):
        raise UserError(f"--to onnx --dtype {dtype}: graphs are written in float32; leave --dtype out")
    built = model.built()
    weights = {name: value.float() if value.is_floating_point() else value for name, value in model.weights.items()}
    built.load_state_dict({name: materialise(value) for name, value in weights.items()}, assign=True)
    export(built, path, model.architecture.image_size, channels=len(model.architecture.mean))
    return KeyReport()
