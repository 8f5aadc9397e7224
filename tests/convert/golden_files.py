"""The golden checkpoints as files, what a conversion of each has to be told, and what the reference says that it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import open_clip.factory
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from eva_mim.convert.convert import Options, convert
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.names.translate import read_source
from tests.students.golden import below, load
from tests.weights.golden_names import checkpoint

MASKED = ("eva01_mim", "eva02_s_mim", "eva02_b_mim", "eva01_relpos", "evaL_mae")
CLASSIFIERS = ("eva01_cls", "eva02_s_cls", "eva02_b_cls", "evaL_cls", "relpos_tuned")
TOWERS = ("clip_bige_visual", "openai_visual")
CLIPS = ("clip_eva02_b", "clip_eva01_g", "clip_eva01_b_layerscale")
TRUNKS = (*MASKED, *CLASSIFIERS, *TOWERS)
GOLDEN = (*TRUNKS, *CLIPS)
SUFFIX = {"timm": ".safetensors", "open_clip": ".safetensors", "eva": ".pt", "onnx": ".onnx"}
"""Of a file; the other formats are folders."""
TOLD: dict[str, Options] = {
    "eva01_cls": Options(
        architecture="eva_giant_patch14_224", image_size=(112, 112),
        arguments={"embed_dim": 88, "depth": 2, "num_heads": 4, "mlp_ratio": 384 / 88},
    ),
    "clip_bige_visual": Options(
        architecture="eva_giant_patch14_224", image_size=(84, 84),
        arguments={"embed_dim": 84, "depth": 2, "num_heads": 4, "mlp_ratio": 720 / 84, "use_post_norm": True},
    ),
    "openai_visual": Options(
        architecture="vit_base_patch16_clip_quickgelu_224", image_size=(112, 112),
        arguments={"embed_dim": 80, "depth": 2, "num_heads": 5},
    ),
}
"""Where no registered architecture has their names and shapes: one of their kind, and what differs from it."""
QUICK = ("eva02_b_cls", "clip_eva02_b", "openai_visual")
"""One of each kind, for tests that are slow with all."""
TOKENS, ANSWERS = 2e-5, 1e-5
"""The golden README's tolerances for token features; for logits and embeddings."""


@dataclass(frozen=True)
class Golden:
    """A checkpoint with what the reference computed of it."""

    name: str
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def images(self) -> Tensor:
        """Normalised."""
        return self.tensors["in/finetune_image" if self.name == "relpos_tuned" else "in/image"]


def golden(shared: Path, name: str) -> Golden:
    """`relpos_tuned` is the classifier that the reference made of eva01_relpos, on another grid."""
    if name == "relpos_tuned":
        tensors, facts = load(shared, "eva01_relpos")
        return Golden(name, below(tensors, "finetune/"), tensors, facts)
    return Golden(name, *checkpoint(shared, name))


def written(found: Golden, folder: Path, *, container: str | None = "module") -> Path:
    """The checkpoint as the reference saves it."""
    path = folder / f"{found.name}.pt"
    bare = container is None or found.name == "openai_visual"
    torch.save(found.state if bare else {container: found.state, "epoch": 3}, path)
    return path


def clip_config(found: Golden) -> dict[str, Any]:
    """open_clip's model_cfg of a CLIP fixture; its tower is registered by `golden_names.py`."""
    given = found.facts["constructor"]
    vision = {"timm_model_name": f"names_{found.name}", "timm_pool": "token", "timm_proj": None,
              "image_size": given["vision_cfg"]["image_size"]}
    text = {key: given["text_cfg"][key] for key in ("context_length", "vocab_size", "width", "heads", "layers")}
    return {"embed_dim": given["embed_dim"], "vision_cfg": vision, "text_cfg": text, "custom_text": True}


@contextmanager
def known_to_open_clip(folder: Path, **configs: dict[str, Any]) -> Iterator[None]:
    """open_clip has these models by name, for as long as this lasts."""
    factory: Any = open_clip.factory
    known, paths = dict(factory._MODEL_CONFIGS), list(factory._MODEL_CONFIG_PATHS)
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    try:
        yield
    finally:
        factory._MODEL_CONFIGS, factory._MODEL_CONFIG_PATHS[:] = known, paths


def converted(source: Path, to: str, folder: Path, name: str = "", **options: Any) -> tuple[dict[str, Any], Path]:
    """(record, what was written) of a source; the golden one `name` is told what it needs."""
    dst = folder / f"{source.name.partition('.')[0]}-{to}{SUFFIX.get(to, '')}"
    return convert(source, dst, to, replace(TOLD.get(name, Options()), **options)), dst


def tensors(path: Path) -> dict[str, Tensor]:
    """Of a trunk or a whole CLIP model, under our names."""
    whole = (path / "open_clip_model.safetensors").is_file()
    return {name: materialise(value) for name, value in read_source(path, "open_clip_model" if whole else None).weights.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    equal = {name for name in one.keys() & other.keys() if torch.equal(one[name], other[name])}
    return one.keys() == other.keys() == equal and all(one[name].dtype == other[name].dtype for name in one)


class Kept(torch.nn.Module):
    """In the place of timm's `patch_drop`: only these patches, [B, n], and the class token."""

    def __init__(self, kept: Tensor):
        super().__init__()
        self.kept = kept

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:].gather(1, self.kept[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.cat([tokens[:, :1], patches], dim=1)


@torch.inference_mode()
def timm_says(found: Golden, model: Any) -> None:
    """Asserts that timm's model says what the reference says. A masked model is shown the fixture's mask by hand."""
    reference, images = found.tensors, found.images
    model.eval()
    if found.name == "evaL_mae":
        model.patch_drop = Kept(reference["in/noise"].argsort(dim=1)[:, :16])
        close(model.forward_features(images), reference["out/encoder_tokens"], TOKENS)
    elif found.name in MASKED:
        hidden, token = reference["in/mask"].flatten(1)[..., None], found.state["mask_token"]
        with_mask = model.patch_embed.register_forward_hook(lambda _, __, patches: torch.where(hidden, token, patches))
        close(model.forward_features(images), reference["out/final_norm_tokens"], TOKENS)
        with_mask.remove()
    elif found.name == "openai_visual":
        close(model.head(model.forward_features(images)[:, 1:]), reference["out/dense_features"], ANSWERS)
    elif found.name == "relpos_tuned":
        close(model(images), reference["out/finetune_logits"], ANSWERS)
    elif found.name in CLASSIFIERS:
        close(model(images), reference["out/logits"], ANSWERS)
    elif found.name == "clip_bige_visual":
        close(model(images), reference["out/image_embed"], ANSWERS)
    else:
        close(normalize(model(images), dim=-1), reference["out/image_features"], ANSWERS)


@torch.inference_mode()
def open_clip_says(found: Golden, model: Any) -> None:
    """Asserts that open_clip's model says what the reference says."""
    reference = found.tensors
    image, text, scale = model.eval()(reference["in/image"], reference["in/text"])[:3]
    close(image, reference["out/image_features"], ANSWERS)
    close(text, reference["out/text_features"], ANSWERS)
    close(scale * image @ text.T, reference["out/logits_per_image"], ANSWERS)


def marked(
    fast: Callable[..., bool], cases: Iterable[Any], long: Callable[..., bool] = lambda *_: False
) -> list[Any]:
    """Parameters of a test, of which those are slow that are not `fast`; the `long` ones are left to `make test-long`."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [[pytest.mark.slow] * (not fast(*row)) + [pytest.mark.long] * long(*row) for row in rows]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]


def close(mine: Tensor, wanted: Tensor, bound: float) -> None:
    """Asserts an absolute tolerance."""
    assert mine.shape == wanted.shape
    assert (mine - wanted).abs().max() <= bound
