"""Which model of timm or open_clip holds a set of weights, so that a user can load them and a parity check can build it.

Names and shapes tell the sizes. They do not tell the number of heads, the activation, LayerNorm's eps, post-norm, what rotary
positions are scaled to, nor rows and columns of the grid. Those come, in this order, from what the user names, from a
configuration beside the source, or from a registered architecture whose names and shapes are exactly those of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import open_clip
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from eva_mim.convert.search import Candidate, Unfilled, check, check_name, choose, fit, image_of, on_meta, plausible, search, side
from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import CLIP_CONFIG
from eva_mim.weights.files.sidecar import Description
from eva_mim.weights.hints import Hints, Pixels, Requirements, check_limits, plain, read_clip_config, read_hints
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.families import Family


@dataclass(frozen=True)
class Architecture:
    """A model of a library, and the images that it takes."""

    library: Literal["timm", "open_clip"]
    name: str
    """What the library calls it; "" for a configuration of open_clip's without a name."""
    arguments: dict[str, Any]
    """Keywords for `timm.create_model` beyond the name; `num_classes` always, and `global_pool` where it is not the usual one."""
    config: dict[str, Any] | None
    """open_clip's `model_cfg`."""
    image_size: tuple[int, int]
    """(height, width)."""
    grid: Grid | None
    mean: Pixels
    std: Pixels

    @property
    def exact(self) -> bool:
        """The name builds it, with no more than timm's `num_classes` and `global_pool`."""
        if self.config is not None:
            return bool(self.name) and self.config == open_clip.get_model_config(self.name)
        return self.arguments.keys() <= {"num_classes", "global_pool"}

    def build(self) -> nn.Module:
        """The model with fresh weights, in evaluation mode."""
        return (_clip(self.config) if self.config is not None else timm.create_model(self.name, **self.arguments)).eval()

    def client(self, path: str = "FILE") -> str:
        """The line of Python with which a user loads a file of weights; where open_clip has no name for it, the folder."""
        if self.config is None:
            keywords = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
            return f"timm.create_model({self.name!r}{keywords}, checkpoint_path={path!r})"
        if not self.exact:
            return f"open_clip.create_model_and_transforms({f'local-dir:{path}'!r})"
        usual = (self.mean, self.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        pixels = "" if usual else f", image_mean={self.mean}, image_std={self.std}"
        return f"open_clip.create_model_and_transforms({self.name!r}, pretrained={path!r}{pixels})"

    def timm_config(self, classes: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Content of the `config.json` with which `timm.create_model("local-dir:FOLDER", pretrained=True)` opens a trunk."""
        model: Any = on_meta(self.name, self.arguments)
        own = {key: model.pretrained_cfg.get(key) for key in ("first_conv", "classifier", "pool_size")}
        count = self.arguments["num_classes"]
        if len(self.mean) != 3:
            own["first_conv"] = None  # as in `export.write_timm`
        pixels = {"input_size": [len(self.mean), *self.image_size], "mean": list(self.mean), "std": list(self.std)}
        config: dict[str, Any] = {
            "architecture": self.name.partition(".")[0],
            "num_classes": count,
            "num_features": model.num_features,
            "model_args": {key: value for key, value in self.arguments.items() if key != "num_classes"},
            "pretrained_cfg": {**pixels, "num_classes": count, "interpolation": "bicubic", "crop_pct": 1.0, **own},
        }
        return config | ({"label_names": list(classes)} if classes else {})

    def open_clip_config(self) -> dict[str, Any]:
        """Content of the `open_clip_config.json` with which `open_clip.create_model("local-dir:FOLDER")` opens a CLIP model."""
        pixels = {"size": side(self.image_size), "mean": self.mean, "std": self.std}
        return {"model_cfg": self.config, "preprocess_cfg": {**pixels, "interpolation": "bicubic", "resize_mode": "shortest"}}


def find_architecture(
    weights: Mapping[str, Tensor],
    family: Family | None,
    *,
    described: Description | None = None,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    rope: Rope | None = None,
    grid: Grid | None = None,
) -> Architecture:
    """The model of a trunk under timm's names, or of a whole CLIP model under open_clip's; only names and shapes are read.

    `family` is that of `weights`; None (a convolutional network) needs a name, or a configuration with one. `rope` is what was
    read off the tables of the source. Raises UserError where no model fits, where several do that differ, and where something
    is needed that nothing tells, with the option that says it.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is None and grid and family and family.patch:
        size = (grid[0] * family.patch[0], grid[1] * family.patch[1])
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    told = read_hints(described) if described else Hints()
    want = Requirements(shapes, family, plain(arguments or {}, "--argument "), size, grid, rope, told)
    check_limits(want)
    if family and family.text:
        found = _find_clip(want, name)
    elif family and family.prefix:
        raise UserError(f"checkpoint: only an image tower, below {family.prefix}; open_clip needs a text tower, use --to timm")
    else:
        found = _find_trunk(want, name)
    library: Literal["timm", "open_clip"] = "timm" if found.config is None else "open_clip"
    return Architecture(library, found.name, found.arguments, found.config, *image_of(found.model), found.mean, found.std)


def _find_trunk(want: Requirements, name: str | None) -> Candidate:
    named = name or want.told.name
    if named:
        check_name(named, timm.list_models(), "timm", "--architecture" if name else "the configuration beside the source")
        return fit(want, named, want.told.arguments if named == want.told.name else {})
    if want.family is None:
        raise UserError("checkpoint: of no family that is known here; name its timm model with --architecture")
    if found := search(want):
        return choose(want, found)
    if want.told.config and "norm_pre.weight" in want.shapes:
        return fit(want, *_tower(want.told.config))
    family = want.family
    ratio = f"{family.hidden / family.width:.8g}"
    sizes = {"embed_dim": family.width, "depth": family.depth, "mlp_ratio": ratio, "num_heads": "N"}
    options = " ".join(f"--argument {key}={value}" for key, value in sizes.items())
    own, size = ("", "") if want.size else (" at its own size", "say --image-size N, or ")
    raise UserError(
        f"checkpoint: no registered architecture of timm has these names and shapes{own}; {size}name one of its kind, and what "
        f"differs from it: --architecture {_like(want)} {options}"
    )


def _like(want: Requirements) -> str:
    """An architecture of timm of the same kind, for an error."""
    family = want.family
    assert family
    if family.patch is None or family.mlp == "geglu":
        return "vitamin_small_224"
    kind = family.timm_class()
    if kind == "Eva" and family.mlp != "plain":
        tower = family.sub_ln and family.inner_attn_ln
        return "eva02_tiny_patch14_224" if family.mlp == "packed" else f"eva02_base_patch{'16_clip' if tower else '14'}_224"
    if kind == "VisionTransformer" and "norm_pre.weight" in want.shapes:
        return "vit_base_patch16_clip_quickgelu_224 (OpenAI's; open_clip's: vit_base_patch16_clip_224)"
    return {"Eva": "eva_giant_patch14_224", "Beit": "beit_base_patch16_224"}.get(kind, "vit_base_patch16_224")


def _tower(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(architecture, keywords) of the ViT of an open_clip configuration in timm, which has registered few of them."""
    vision = config["vision_cfg"]
    width = vision.get("width", 768)
    return f"vit_base_patch16_clip_{'quickgelu_' if config.get('quick_gelu') else ''}224", {
        "embed_dim": width, "depth": vision.get("layers", 12), "num_heads": width // vision.get("head_width", 64),
        "mlp_ratio": vision.get("mlp_ratio", 4.0),
    }


def _find_clip(want: Requirements, name: str | None) -> Candidate:
    assert want.family
    if want.arguments:
        raise UserError(f"--argument {', '.join(want.arguments)}: open_clip's configurations have no place for keywords of timm")
    if name:
        check_name(name, open_clip.list_models(), "open_clip", "--architecture")
        return _fit_clip(want, name, open_clip.get_model_config(name))
    if told := want.told.config:
        same = next((known for known in open_clip.list_models() if _same(known, told)), "")
        return _fit_clip(want, same, open_clip.get_model_config(same) if same else told)
    found, towers = [], {None, *plausible(want, ("img_size", "patch_size"))}
    for known in open_clip.list_models():
        config = open_clip.get_model_config(known)
        if config["vision_cfg"].get("timm_model_name") in towers:
            with suppress(UserError):
                found.append(_fit_clip(want, known, config))
    if found:
        return choose(want, found)
    tower = "; it names the tower, which has to be registered with timm (see eva_mim/students/small.py)"
    raise UserError(
        "checkpoint: no model of open_clip has these names and shapes, and they do not tell the heads. Put its "
        f"open_clip_config.json beside the source{tower if want.family.name != 'OpenAI CLIP' else ''}, "
        "or convert the image tower alone with --to timm"
    )


def _same(name: str, config: Mapping[str, Any]) -> bool:
    with suppress(UserError):
        return read_clip_config(open_clip.get_model_config(name)) == config
    return False


def _fit_clip(want: Requirements, name: str, config: dict[str, Any]) -> Candidate:
    """A CLIP model of open_clip's. Raises UserError where its names and shapes are not exactly those of the weights."""
    label = name or CLIP_CONFIG
    if other := _mismatch(want, config):
        raise UserError(f"checkpoint: the weights are not those of {label}: {'; '.join(other)}")
    vision = config["vision_cfg"]
    if want.size and not vision.get("timm_model_name") and side(want.size) != vision.get("image_size"):
        config = config | {"vision_cfg": vision | {"image_size": side(want.size)}}
    try:
        with torch.device("meta"), Unfilled():
            model = _clip(config)
    except Exception as error:  # a configuration of a file can fail in any way
        raise UserError(f"open_clip cannot build {label}: {str(error)[:300]}") from None
    check(want, model, label)
    tags = open_clip.list_pretrained_tags_by_model(name) if name else []
    pixels = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    mean = want.told.mean or tuple(pixels.get("mean", open_clip.OPENAI_DATASET_MEAN))
    std = want.told.std or tuple(pixels.get("std", open_clip.OPENAI_DATASET_STD))
    return Candidate(name, {}, config, model, mean, std)


def _mismatch(want: Requirements, config: Mapping[str, Any]) -> list[str]:
    """Sizes of a configuration that are not the weights', said without building anything."""
    family, vision, words = want.family, config["vision_cfg"], config["text_cfg"]
    assert family
    assert family.text
    text = family.text
    sizes: list[tuple[str, Any, Any]] = [
        ("text width", words.get("width", 512), text.width), ("text layers", words.get("layers", 12), text.depth),
        ("context", words.get("context_length", 77), text.context), ("words", words.get("vocab_size", 49408), text.vocabulary),
        ("text tower of transformers", bool(words.get("hf_model_name")), False),
        ("text decoder", "multimodal_cfg" in config, False),
        ("image tower of timm", bool(vision.get("timm_model_name")), family.name != "OpenAI CLIP"),
    ]
    if not vision.get("timm_model_name"):
        sizes += [("width", vision.get("width", 768), family.width), ("layers", vision.get("layers", 12), family.depth)]
        sizes += [("patch size", vision.get("patch_size", 16), family.patch and family.patch[0])]
    elif not timm.is_model(str(vision["timm_model_name"])):
        sizes += [("image tower", vision["timm_model_name"], "one that timm has")]
    return [f"{what} {value}, not {mine}" for what, value, mine in sizes if value != mine]


def _clip(config: Mapping[str, Any]) -> nn.Module:
    """open_clip's model of a configuration; no tower fetches weights."""
    vision = {key: value for key, value in config["vision_cfg"].items() if key != "timm_model_pretrained"}
    keywords = {key: value for key, value in config.items() if key != "custom_text"} | {"vision_cfg": vision}
    model: nn.Module = (CustomTextCLIP if config.get("custom_text") else CLIP)(**keywords)
    return model
