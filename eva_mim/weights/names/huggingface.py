"""Hugging Face's transformers: names to ours (those of CLIP also back), configurations, and outputs of its models.

transformers 5 renames tensors when it loads a file, and back when it saves one. The tables here have the names in files;
`for_module` translates them to those of a model in memory. Sources: models and `conversion_mapping.py` of transformers 5.23.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.settings import few
from eva_mim.weights.files.sidecar import at, text
from eva_mim.weights.names.eva import Converted
from eva_mim.weights.names.families import Family
from eva_mim.weights.names.openai import to_openai

CLASSES = {
    "clip": ("CLIPModel",),
    "clip_vision_model": ("CLIPVisionModelWithProjection",),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "vit": ("ViTModel", "ViTForImageClassification"),
}
"""`model_type` -> supported classes; the first is assumed if a configuration names none."""
FIELDS = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio", "use_swiglu_ffn",
          "hidden_act", "layer_norm_eps", "qkv_bias", "image_size", "patch_size", "num_channels", "num_register_tokens",
          "use_mask_token", "projection_dim", "vocab_size", "max_position_embeddings", "eos_token_id", "num_labels"}
"""Fields of a configuration that `build` uses. Other fields change no number, or make transformers fetch code (attention
kernels)."""
MAX_LAYERS, MAX_SIZE = 1000, 1_000_000
"""Largest number of layers and largest size in a configuration; larger ones come from broken or hostile files and would take
long to build."""

_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding", "visual.proj": "visual_projection.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight", "visual.ln_pre.*": "vision_model.pre_layrnorm.*",
    "visual.ln_post.*": "vision_model.post_layernorm.*", "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.*": "text_model.final_layer_norm.*", "text_projection": "text_projection.weight", "logit_scale": "logit_scale",
}
_CLIP_BLOCK = {"ln_1.*": "layer_norm1.*", "ln_2.*": "layer_norm2.*", "mlp.c_fc.*": "mlp.fc1.*", "mlp.c_proj.*": "mlp.fc2.*",
               "attn.out_proj.*": "self_attn.out_proj.*", "attn.in_proj_*": "self_attn.|q_proj.*|k_proj.*|v_proj.*"}
_TRUNK = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings", "norm.*": "layernorm.*",
          "patch_embed.proj.*": "embeddings.patch_embeddings.projection.*"}
_ATTENTION = {"attn.proj.*": "attention.output.dense.*", "attn.qkv.*": "attention.attention.|query.*|key.*|value.*"}
_VIT = {"norm1.*": "layernorm_before.*", "norm2.*": "layernorm_after.*", "mlp.fc1.*": "intermediate.dense.*",
        "mlp.fc2.*": "output.dense.*"}
_DINOV2 = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
           **{name: name for name in ("norm1.*", "norm2.*", "mlp.fc1.*", "mlp.fc2.*")}}
_SWIGLU = {"mlp.fc1.*": "mlp.weights_in.*", "mlp.fc2.*": "mlp.weights_out.*"}
"""Our name -> name in a file. * stands for weight and bias; the text before the first | is common to q, k and v."""
_TEXT_HIDDEN = "transformer.resblocks.0.mlp.c_fc.weight"
_TURNED = ("visual.proj", "text_projection")
"""Matrices that OpenAI multiplies from the right."""
_IGNORED = {
    r"embeddings\.mask_token": "of masked pretraining; timm's model has none",
    r"pooler\.dense\.(weight|bias)": "after the class token; timm's ViT has no such layer",
    r"classifier\.(weight|bias)": "reads the patches' mean beside the class token; timm's ViT has no such head",
    r"(vision|text)_model\.embeddings\.position_ids": "the indices 0, 1, 2, ...",
}
_IN_MEMORY = (
    ("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"), ("mlp.weights_out", "mlp.down_proj"),
)
"""Part of a name in a file -> part of the same tensor's name in transformers 5; applied in this order."""


def name_table(kind: str, packed: bool = False) -> dict[str, list[str]]:
    """Returns our name -> name in a file, or the three names of q, k and v; N stands for a block's number."""
    if kind in ("clip", "clip_vision_model"):
        rows = dict(_CLIP)
        for ours, theirs in {"visual.": "vision_model.", "": "text_model."}.items():
            rows[f"{ours}positional_embedding"] = f"{theirs}embeddings.position_embedding.weight"
            stem, block = f"{ours}transformer.resblocks.N.", f"{theirs}encoder.layers.N."
            rows |= {stem + new: block + old for new, old in _CLIP_BLOCK.items()}
        rows = {new: old for new, old in rows.items() if kind == "clip" or new.startswith("visual.")}
    else:
        inside = _ATTENTION | (_VIT if kind == "vit" else _DINOV2 | _SWIGLU if packed else _DINOV2)
        rows = _TRUNK | {f"blocks.N.{new}": f"encoder.layer.N.{old}" for new, old in inside.items()}
        rows |= {"vit": {"head.*": "classifier.*"}, "dinov2": {}}.get(kind, {"reg_token": "embeddings.register_tokens"})
    table = {}
    for ours, theirs in rows.items():
        stem, *ends = theirs.split("|")
        for leaf in ("weight", "bias") if "*" in ours else ("",):
            table[ours.replace("*", leaf)] = [(stem + end).replace("*", leaf) for end in ends or ("",)]
    return table


def numbered(name: str) -> tuple[str, str]:
    """Returns a name with N for its first number, and `.number.`."""
    found = re.search(r"\.\d+\.", name)
    return (name.replace(found[0], ".N.", 1), found[0]) if found else (name, "")


def _kind(config: Mapping[str, Any]) -> str:
    kind = text(config, "model_type")
    if kind not in CLASSES:
        raise UserError(f"config.json: model_type {kind!r:.100} is not known here; known: {', '.join(CLASSES)}")
    return str(kind)


def from_transformers(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Converted:
    """Renames a file of transformers to ours: open_clip's flat `CLIP` names, or timm's of a ViT or `vit_*_dinov2`.

    timm's DINOv2 with registers has no position for the class token: its position is added to the token. Raises UserError for
    another `model_type`, for a tensor without a place, and for an image tower without projection.
    """
    kind = _kind(config)
    table = name_table(kind, any(".mlp.weights_in." in name for name in weights))
    places = {old: (new, part) for new, names in table.items() for part, old in enumerate(names)}
    report, unknown, found = KeyReport(), list[str](), dict[tuple[str, str], dict[int, Tensor]]()
    for name, value in weights.items():
        pattern, block = numbered(name.removeprefix(f"{kind}."))
        new, part = places.get(pattern, ("", 0))
        reason = None if new else next((why for known, why in _IGNORED.items() if re.fullmatch(known, pattern)), None)
        if reason:
            report.note(report.ignored, name, reason)
        elif not new or found.setdefault((new, block), {}).setdefault(part, value) is not value:
            unknown.append(name)
    if unknown:
        known = " or ".join(CLASSES[kind])
        raise UserError(f"checkpoint: {len(unknown)} tensors have no place, or not one of their own, in {known}: {few(unknown)}")
    made: dict[str, Tensor] = {}
    for (new, block), parts in found.items():
        if lost := [old.replace(".N.", block) for part, old in enumerate(table[new]) if part not in parts]:
            raise UserError(f"checkpoint: {few(lost)} missing: q, k and v are stored together here")
        value = torch.cat([parts[part] for part in sorted(parts)]) if len(parts) > 1 else parts[0]
        made[new.replace(".N.", block)] = value.T if new in _TURNED else value
    if kind == "clip_vision_model" and "visual.proj" not in made:
        raise UserError("checkpoint: a CLIP image tower without visual_projection.weight; save a CLIPVisionModelWithProjection")
    report.loaded += list(made)
    if {"reg_token", "cls_token", "pos_embed"} <= made.keys():
        rows = made["pos_embed"]
        made |= {"cls_token": made["cls_token"] + rows[:, :1], "pos_embed": rows[:, 1:]}
        report.reasons["cls_token"] = "the position of the class token is added: timm has none for it"
    return Converted(made, report)


def to_transformers(
    weights: Mapping[str, Tensor], family: Family, *, heads: int, image_size: int, eps: float,
    activation: Literal["gelu", "quick_gelu"] = "gelu", text_heads: int | None = None,
) -> tuple[Converted, dict[str, Any]]:
    """Renames OpenAI's CLIP, whole or its image tower, to a file of transformers; returns the file's tensors and its config.json.

    The heads of both towers, the image's side in pixels, the eps of the norms and the activation do not follow from names and
    shapes. Raises UserError for a size that does not fit.
    """
    kind = "clip" if family.text else "clip_vision_model"
    table, report, made = name_table(kind), KeyReport(), dict[str, Tensor]()
    config = _config(weights, family, kind, {"hidden_act": activation, "layer_norm_eps": eps}, heads, text_heads, image_size)
    for name, value in to_openai(weights).weights.items():
        pattern, block = numbered(name)
        names = [new.replace(".N.", block) for new in table[pattern]]
        made |= zip(names, value.chunk(3) if len(names) == 3 else [value.T if name in _TURNED else value], strict=True)
    report.loaded += made
    return Converted(made, report), config


def _config(
    weights: Mapping[str, Tensor], family: Family, kind: str, common: dict[str, Any],
    heads: int, text_heads: int | None, size: int,
) -> dict[str, Any]:
    """Returns the content of config.json. Raises UserError for a size that does not fit."""
    words, (side, width) = family.text, family.patch or (1, 0)
    for what, tower, count in ("heads", family, heads), ("text_heads", words, text_heads):
        if tower and (not count or tower.width % count):
            raise UserError(f"{what}: {count} does not divide the width {tower.width}")
    if side != width or family.tokens != (size // side) ** 2:
        raise UserError(f"image_size: {size} gives {(size // side) ** 2} patches, and there are {family.positions} positions")
    top: dict[str, Any] = {"model_type": kind, "architectures": [CLASSES[kind][0]]}
    vision = common | {
        "num_attention_heads": heads, "image_size": size, "hidden_size": family.width, "num_hidden_layers": family.depth,
        "patch_size": side, "intermediate_size": family.hidden, "projection_dim": family.head,
    }
    if words is None:
        return top | vision
    hidden = next(len(value) for name, value in weights.items() if name.removeprefix("text.") == _TEXT_HIDDEN)
    # 2 as the end token stands for open_clip's rule: the feature is taken at the largest id
    language = common | {
        "num_attention_heads": text_heads, "hidden_size": words.width, "num_hidden_layers": words.depth,
        "max_position_embeddings": words.context, "intermediate_size": hidden, "projection_dim": family.head,
        "vocab_size": words.vocabulary, "bos_token_id": 0, "eos_token_id": 2,
    }
    return top | {"projection_dim": family.head, "text_config": language, "vision_config": vision}


def build(config: Mapping[str, Any]) -> nn.Module:
    """Builds the model of a config.json with fresh weights and without ViT's pooler, by the code of the installed library alone.

    Raises UserError for an unsupported class, and for values from which transformers makes no model.
    """
    kind = _kind(config)
    name = at(config, "architectures", 0) or CLASSES[kind][0]
    if name not in CLASSES[kind]:
        raise UserError(f"config.json: architectures {name!r:.100} is not known here; known: {', '.join(CLASSES[kind])}")
    believed = _believed(config)
    if isinstance(labels := config.get("id2label"), dict):
        believed = {"num_labels": len(labels)} | believed
    for tower in ("text_config", "vision_config") if kind == "clip" else ():
        believed[tower] = _believed(config.get(tower)) | _believed(config.get(f"{tower}_dict"))  # the older spelling overrules
    try:
        library = importlib.import_module("transformers")
        settings = library.AutoConfig.for_model(kind, **believed)
        options = {"add_pooling_layer": False} if name == "ViTModel" else {}
        module: nn.Module = getattr(library, name)(settings, **options)
    except ModuleNotFoundError:
        raise UserError("transformers is not installed; pip install 'eva-mim[transformers]'") from None
    except Exception as error:  # transformers checks a configuration in many ways
        raise UserError(f"config.json: transformers makes no {name} of it: {error}") from None
    return module


def _believed(config: Any) -> dict[str, Any]:
    believed = {name: value for name, value in config.items() if name in FIELDS} if isinstance(config, Mapping) else {}
    for name, value in believed.items():
        limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if any(isinstance(size, (int, float)) and size > limit for size in (value if isinstance(value, list) else [value])):
            raise UserError(f"config.json: {name} {value} is more than {limit}")
    return believed


def for_module(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Returns a file's tensors under the names of a model in memory, without those that the model lacks."""
    here = module.state_dict().keys()
    made: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = name
        for old, new in _IN_MEMORY:
            short = short.replace(old, new)
        gate, up = (short.replace(".weights_in.", f".{part}_proj.") for part in ("gate", "up"))
        if gate != short and gate in here:
            made[gate], made[up] = value.chunk(2)
        elif spelling := next((new for new in (name, short, short.replace("encoder.layer.", "layers.")) if new in here), None):
            made[spelling] = value
    return made


@torch.inference_mode()
def outputs(module: Any, images: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Returns a model's outputs for normalised images [B, 3, H, W] and token ids [B, L], under the names of `parity.outputs`.

    CLIP returns `image` and `text` [B, C], not normalised, and `scale`. ViT and DINOv2 return `tokens` [B, N, D] after the norm,
    and a ViT with a head `answer` [B, K].
    """
    module.eval()
    if hasattr(module, "visual_projection"):
        found = {"image": module.visual_projection(module.vision_model(pixel_values=images).pooler_output)}
        found |= {"scale": module.logit_scale.exp()} if hasattr(module, "logit_scale") else {}
        if tokens is not None and hasattr(module, "text_model"):
            found["text"] = module.text_projection(module.text_model(input_ids=tokens).pooler_output)
        return found
    features = module.base_model(pixel_values=images).last_hidden_state
    head = module.config.model_type == "vit" and hasattr(module, "classifier")
    return {"tokens": features} | ({"answer": module.classifier(features[:, 0])} if head else {})


def preprocessor(mean: Sequence[float], std: Sequence[float], size: int) -> dict[str, Any]:
    """Returns the content of preprocessor_config.json: shorter side to `size` pixels (bicubic), centre crop, normalisation."""
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
    }
