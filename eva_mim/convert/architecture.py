"""Finding the model of timm or open_clip that holds a set of weights, for loading them and for the parity check.

Names and shapes determine the sizes. They do not determine the number of heads, the activation, LayerNorm's eps, post-norm, the
reference grid of rotary positions, nor rows and columns of the grid. These come, in this order, from the user, from a
configuration beside the source, or from a registered architecture with exactly the names and shapes of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import open_clip
import timm
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from eva_mim.convert.search import Candidate, check, check_name, choose, fit, image_of, on_meta, plausible, search, side
from eva_mim.core.contracts import Grid
from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import CLIP_CONFIG
from eva_mim.students.clip import open_clip_config
from eva_mim.trunks.config import timm_config
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.files.sidecar import Description
from eva_mim.weights.hints import Hints, Pixels, Requirements, check_requirements, plain, read_clip_config, read_hints
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.families import Family


@dataclass(frozen=True)
class Architecture:
    """A model of timm or open_clip, and the size and normalisation of its images."""

    library: Literal["timm", "open_clip"]
    name: str
    """The library's name of the model; "" for an open_clip configuration without a name."""
    arguments: dict[str, Any]
    """Keywords for `timm.create_model` beyond the name: always `num_classes`, and `global_pool` if it differs from the
    default."""
    config: dict[str, Any] | None
    """open_clip's `model_cfg`; None for a model of timm."""
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    grid: Grid | None
    mean: Pixels
    std: Pixels
    resizing: dict[str, Any] = field(default_factory=dict)
    """timm's interpolation, crop_pct and crop_mode of held-out images, where they are known."""

    @property
    def exact(self) -> bool:
        """True if the name alone builds the model, apart from timm's `num_classes` and `global_pool`."""
        if self.config is not None:
            return bool(self.name) and self.config == open_clip.get_model_config(self.name)
        return self.arguments.keys() <= {"num_classes", "global_pool"}

    def build(self) -> nn.Module:
        """Builds the model with fresh weights, in evaluation mode."""
        return (_clip(self.config) if self.config is not None else timm.create_model(self.name, **self.arguments)).eval()

    def client(self, path: str = "FILE") -> str:
        """Returns the line of Python that opens a file of these weights, or their folder if open_clip has no name for the
        model."""
        if self.config is None:
            keywords = "".join(f", {key}={value!r}" for key, value in self.arguments.items())
            return f"timm.create_model({self.name!r}{keywords}, checkpoint_path={path!r})"
        if not self.exact:
            return f"open_clip.create_model_and_transforms({f'local-dir:{path}'!r})"
        usual = (self.mean, self.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        pixels = "" if usual else f", image_mean={self.mean}, image_std={self.std}"
        return f"open_clip.create_model_and_transforms({self.name!r}, pretrained={path!r}{pixels})"

    def timm_config(self, classes: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Returns the `config.json` of a trunk; `classes` are the names of the head's rows."""
        arguments = {key: value for key, value in self.arguments.items() if key != "num_classes"}
        return timm_config(
            self.name.partition(".")[0], on_meta(self.name, self.arguments), arguments, image_size=self.image_size,
            mean=self.mean, std=self.std, num_classes=self.arguments["num_classes"], labels=classes, resizing=self.resizing,
        )

    def open_clip_config(self) -> dict[str, Any]:
        """Returns the `open_clip_config.json` of a CLIP model."""
        assert self.config is not None
        return open_clip_config(self.config, image_size=side(self.image_size), mean=self.mean, std=self.std)


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
    """Returns the model of a trunk under timm's names, or of a whole CLIP model under open_clip's; of the weights only names and
    shapes are read.

    `family` is that of `weights`; None (a convolutional network) requires a name, from the user or a configuration. `rope` are
    the parameters of the source's rotary tables. Raises UserError if no model fits, if several fit that compute different
    outputs, and if a size is unknown; the message names the option that gives it.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is None and grid and family and family.patch:
        size = (grid[0] * family.patch[0], grid[1] * family.patch[1])
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    hints = read_hints(described) if described else Hints()
    want = Requirements(shapes, family, plain(arguments or {}, "--argument "), size, grid, rope, hints)
    check_requirements(want)
    if family and family.text:
        found = _find_clip(want, name)
    elif family and family.prefix:
        raise UserError(f"checkpoint: only an image tower, below {family.prefix}; open_clip needs a text tower, use --to timm")
    else:
        found = _find_trunk(want, name)
    library: Literal["timm", "open_clip"] = "timm" if found.config is None else "open_clip"
    return Architecture(
        library, found.name, found.arguments, found.config, *image_of(found.model), found.mean, found.std, found.resizing
    )


def _find_trunk(want: Requirements, name: str | None) -> Candidate:
    named = name or want.hints.name
    if named:
        check_name(named, timm.list_models(), "timm", "--architecture" if name else "the configuration beside the source")
        return fit(want, named, want.hints.arguments if named == want.hints.name else {})
    if want.family is None:
        raise UserError("checkpoint: of no family that is known here; name its timm model with --architecture")
    if found := search(want):
        return choose(want, found)
    if want.hints.config and "norm_pre.weight" in want.shapes:
        return fit(want, *_tower(want.hints.config))
    family = want.family
    ratio = f"{family.hidden / family.width:.8g}"
    sizes = {"embed_dim": family.width, "depth": family.depth, "mlp_ratio": ratio, "num_heads": "N"}
    options = " ".join(f"--argument {key}={value}" for key, value in sizes.items())
    own, size = ("", "") if want.size else (" at its own size", "say --image-size N, or ")
    raise UserError(
        f"checkpoint: no registered architecture of timm has these names and shapes{own}; {size}name one of its kind, and "
        f"the differences: --architecture {_like(want)} {options}"
    )


def _like(want: Requirements) -> str:
    """Returns an architecture of timm of the same kind, for an error message."""
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
    """Returns (architecture, keywords) of timm for the ViT of an open_clip configuration; timm has registered few of them."""
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
    if config := want.hints.config:
        same = next((known for known in open_clip.list_models() if _same(known, config)), "")
        return _fit_clip(want, same, open_clip.get_model_config(same) if same else config)
    found, towers = [], {None, *plausible(want, ("img_size", "patch_size"))}
    for known in open_clip.list_models():
        config = open_clip.get_model_config(known)
        if config["vision_cfg"].get("timm_model_name") in towers:
            with suppress(UserError):
                found.append(_fit_clip(want, known, config))
    if found:
        return choose(want, found)
    tower = "; it names the tower, which has to be registered with timm (see eva_mim/trunks/small.py)"
    raise UserError(
        "checkpoint: no model of open_clip has these names and shapes, which do not determine the heads. Put its "
        f"open_clip_config.json beside the source{tower if want.family.name != 'OpenAI CLIP' else ''}, "
        "or convert the image tower alone with --to timm"
    )


def _same(name: str, config: Mapping[str, Any]) -> bool:
    with suppress(UserError):
        return read_clip_config(open_clip.get_model_config(name)) == config
    return False


def _fit_clip(want: Requirements, name: str, config: dict[str, Any]) -> Candidate:
    """Returns a CLIP model of open_clip. Raises UserError unless its names and shapes are exactly those of the weights."""
    label = name or CLIP_CONFIG
    if other := _mismatch(want, config):
        raise UserError(f"checkpoint: the weights are not those of {label}: {'; '.join(other)}")
    vision = config["vision_cfg"]
    if want.size and not vision.get("timm_model_name") and side(want.size) != vision.get("image_size"):
        config = config | {"vision_cfg": vision | {"image_size": side(want.size)}}
    try:
        with meta_device():
            model = _clip(config)
    except Exception as error:  # a file's configuration can fail in any way
        raise UserError(f"open_clip cannot build {label}: {str(error)[:300]}") from None
    check(want, model, label)
    tags = open_clip.list_pretrained_tags_by_model(name) if name else []
    pixels = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    mean = want.hints.mean or tuple(pixels.get("mean", open_clip.OPENAI_DATASET_MEAN))
    std = want.hints.std or tuple(pixels.get("std", open_clip.OPENAI_DATASET_STD))
    return Candidate(name, {}, config, model, mean, std)


def _mismatch(want: Requirements, config: Mapping[str, Any]) -> list[str]:
    """Returns the sizes in which a configuration differs from the weights, without building a model."""
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
    """Builds open_clip's model of a configuration without fetching weights for a tower."""
    vision = {key: value for key, value in config["vision_cfg"].items() if key != "timm_model_pretrained"}
    keywords = {key: value for key, value in config.items() if key != "custom_text"} | {"vision_cfg": vision}
    model: nn.Module = (CustomTextCLIP if config.get("custom_text") else CLIP)(**keywords)
    return model
