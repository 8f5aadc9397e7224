"""The formats that a model can be written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eva_mim.convert.architecture import Architecture
from eva_mim.convert.onnx import export
from eva_mim.convert.parity import unloaded
from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json
from eva_mim.core.report import KeyReport
from eva_mim.weights.files.lazy import real
from eva_mim.weights.files.write import write_safetensors, write_torch
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.eva import to_eva
from eva_mim.weights.names.families import Family, detect
from eva_mim.weights.names.huggingface import preprocessor, to_transformers
from eva_mim.weights.names.openai import timm_to_openai, to_openai

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
PRE_NORM = "norm_pre.weight"
"""Of a timm ViT: it is OpenAI's image tower."""


@dataclass(frozen=True)
class Model:
    """Weights under our names, and the model of a library that holds them."""

    weights: dict[str, Tensor]
    """A trunk under timm's names, or a CLIP model under open_clip's."""
    architecture: Architecture
    family: Family | None
    """None for an architecture that names and shapes do not tell."""
    trunk: Model | None = None
    """Of a CLIP model, what timm holds."""
    outside: dict[str, Tensor] = field(default_factory=dict)
    """Mask token and predicting head of a masked model."""
    rope: Rope | None = None
    classes: tuple[str, ...] | None = None
    """Of the head."""
    tower: bool = False
    """The image tower of a CLIP file, alone: below `visual.` where the original code's names are wanted."""

    def built(self) -> nn.Module:
        """The model, whose parameters take no memory."""
        with unloaded():
            return self.architecture.build()


@dataclass(frozen=True)
class Format:
    """How a model is written."""

    write: Callable[[Model, Path, str | None], KeyReport]
    """Model, the file or the (existing, empty) folder, dtype of the floating tensors (None: as they are) -> what changed."""
    suffixes: tuple[str, ...] = ()
    """Of a file; none: a folder."""
    whole: bool = True
    """A CLIP model is written whole, not its trunk alone."""
    outside: bool = False
    """What a masked model has outside its trunk is written as well."""
    client: Callable[[Model, Path], str] = lambda model, dst: model.architecture.client(str(dst))
    """Model, result -> the line with which it is opened."""


def _file(model: Model, path: Path, dtype: str | None) -> KeyReport:
    write = write_torch if path.suffix in TORCH_SUFFIXES else write_safetensors
    write(path, model.weights, dtype=dtype)
    return KeyReport()


def _open_clip(model: Model, path: Path, dtype: str | None) -> KeyReport:
    if model.trunk is None:
        raise UserError("--to open_clip: there is no text tower here, and open_clip holds whole CLIP models; use --to timm or hf")
    if not model.architecture.exact:
        raise UserError("--to open_clip: open_clip has no name for this model; use --to hf, which it opens as local-dir:DST")
    return _file(model, path, dtype)


def _folder(model: Model, folder: Path, dtype: str | None) -> KeyReport:
    """timm's, and open_clip's as well where there is a text tower."""
    trunk = model.trunk or model
    write_safetensors(folder / "model.safetensors", trunk.weights, dtype=dtype)
    same = trunk.classes if trunk.classes and len(trunk.classes) == trunk.architecture.arguments["num_classes"] else None
    write_json(folder / "config.json", trunk.architecture.timm_config(same))
    if model.trunk is not None:
        write_safetensors(folder / "open_clip_model.safetensors", model.weights, dtype=dtype)
        write_json(folder / "open_clip_config.json", model.architecture.open_clip_config())
    return KeyReport()


def _ours(model: Model, folder: Path, dtype: str | None) -> KeyReport:
    """As a stage of ours leaves it."""
    if model.outside:
        write_safetensors(folder / "head.safetensors", model.outside, dtype=dtype)
    return _folder(model, folder, dtype)


def _eva(model: Model, path: Path, dtype: str | None) -> KeyReport:
    """The names of the code that a family comes from, and its containers: `module`, or none for CLIP."""
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
    """Of EVA-02, as its timm model has it; masked models count in plain indices."""
    trunk: Any = (model.trunk or model).built()
    width: int = trunk.embed_dim // trunk.blocks[0].attn.num_heads
    reference = trunk.rope.ref_feat_shape
    return Rope(width, None if model.outside or not reference else reference[0])


def _transformers(model: Model, folder: Path, dtype: str | None) -> KeyReport:
    if model.family is None:
        raise UserError(f"--to transformers: {model.architecture.name} is not known under names of transformers")
    found, built = model.architecture, model.built()
    if found.image_size[0] != found.image_size[1]:
        raise UserError(f"--to transformers: images of {found.image_size} are not square")
    tower: Any = getattr(built, "visual", built)
    if model.family.name == "OpenAI CLIP":
        text: Any = getattr(built, "text", built)
        block, text_heads = tower.transformer.resblocks[0], text.transformer.resblocks[0].attn.num_heads
        eps, act = tower.ln_post.eps, block.mlp.gelu
    elif hasattr(tower, "trunk"):
        raise UserError("--to transformers: it has no CLIP with an image tower of timm's; convert the tower with --to timm or hf")
    else:
        block, text_heads = tower.blocks[0], None
        eps, act = block.norm1.eps, block.mlp.act
    openai = timm_to_openai(model.weights) if PRE_NORM in model.weights else None
    weights = openai.weights if openai else model.weights
    done, config = to_transformers(
        weights, detect(weights), heads=block.attn.num_heads, image_size=found.image_size[0], eps=eps, text_heads=text_heads,
        activation="quick_gelu" if type(act).__name__.startswith("QuickGELU") else "gelu", classes=model.classes,
    )
    write_safetensors(folder / "model.safetensors", done.weights, dtype=dtype)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor(found.mean, found.std, found.image_size[0]))
    return openai.report.plus(done.report) if openai else done.report


def _onnx(model: Model, path: Path, dtype: str | None) -> KeyReport:
    if dtype not in (None, "float32"):
        raise UserError(f"--to onnx --dtype {dtype}: graphs are written in float32; leave --dtype out")
    built = model.built()
    weights = {name: value.float() if value.is_floating_point() else value for name, value in model.weights.items()}
    built.load_state_dict({name: real(value) for name, value in weights.items()}, assign=True)
    export(built, path, model.architecture.image_size, channels=len(model.architecture.mean))
    return KeyReport()


def _opens_folder(model: Model, dst: Path) -> str:
    library = "open_clip" if model.trunk else "timm"
    return f"{library}.create_model({f'local-dir:{dst}'!r}{'' if model.trunk else ', pretrained=True'})"


FORMATS = {
    "safetensors": Format(_ours, outside=True, client=lambda model, dst: f"init_from={dst}"),
    "timm": Format(_file, (".safetensors", *TORCH_SUFFIXES), whole=False),
    "open_clip": Format(_open_clip, (".safetensors", *TORCH_SUFFIXES)),
    "eva": Format(_eva, TORCH_SUFFIXES, outside=True, client=lambda model, dst: f"torch.load({str(dst)!r}, weights_only=True)"),
    "hf": Format(_folder, client=_opens_folder),
    "transformers": Format(_transformers, client=lambda model, dst: f"transformers.AutoModel.from_pretrained({str(dst)!r})"),
    "onnx": Format(_onnx, (".onnx",), client=lambda model, dst: f"onnxruntime.InferenceSession({str(dst)!r})"),
}
