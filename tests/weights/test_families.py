"""What a checkpoint is taken for: the fixtures by their constructors, libraries' models, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP
from timm.models.eva import Eva
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.students import MaskedSettings
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.names.eva import from_eva
from eva_mim.weights.names.families import Family, Text, detect
from eva_mim.weights.names.name_tables import RESBLOCK
from tests.students.golden import below
from tests.weights.golden_names import checkpoint

FUSED_EVA: dict[str, Any] = {"qkv": "fused", "bias": "q, v", "mlp": "plain", "rope": False}
PACKED: dict[str, Any] = FUSED_EVA | {"mlp": "packed", "rope": True}
SPLIT: dict[str, Any] = {"qkv": "split", "bias": "q, v", "mlp": "naive", "rope": True, "sub_ln": True}
PLAIN: dict[str, Any] = {"qkv": "fused", "bias": "q, k, v", "mlp": "plain"}
BOTH = ("eva", "timm")
FIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eva01_mim": ("EVA-01", "mim", FUSED_EVA | {"norms": ("norm",), "head": 64}),
    "eva01_cls": ("EVA-01", "classifier", FUSED_EVA | {"norms": ("fc_norm",), "head": 37, "rope": None, "schemes": BOTH}),
    "eva01_relpos": ("EVA-01", "mim", FUSED_EVA | {"relative": "shared", "layer_scale": True, "positions": None, "tokens": None}),
    "eva02_s_mim": ("EVA-02", "mim", PACKED),
    "eva02_s_cls": ("EVA-02", "classifier", PACKED | {"norms": ("fc_norm",)}),
    "eva02_b_mim": ("EVA-02", "mim", SPLIT),
    "eva02_b_cls": ("EVA-02", "classifier", SPLIT),
    "evaL_cls": ("ViT", "classifier", PLAIN | {"schemes": BOTH, "rope": None, "head": 29}),
    "evaL_mae": ("EVA-L", "mim", PLAIN | {"decoder": (48, 2), "head": 40}),
    "clip_eva02_b": ("EVA-02", "clip", SPLIT | {"inner_attn_ln": True, "text": Text(48, 2, 32, 300), "prefix": "visual."}),
    "clip_eva01_g": ("EVA-01", "clip", FUSED_EVA | {"text": Text(48, 2, 77, 400)}),
    "clip_eva01_b_layerscale": ("EVA-01", "clip", FUSED_EVA | {"layer_scale": True}),
    "clip_bige_visual": ("EVA-01", "clip tower", FUSED_EVA | {"hidden": 720}),
    "openai_visual": ("OpenAI CLIP", "clip tower", {"schemes": ("openai", "open_clip"), "head": 48}),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_fixture_is_what_its_constructor_says(shared: Path, name: str) -> None:
    state, _, facts = checkpoint(shared, name)
    label, form, parts = FIXTURES[name]
    family = detect(state)
    assert (family.name, family.form) == (label, form)
    assert {part: getattr(family, part) for part in parts} == parts
    options = facts.get("constructor") or facts["constructor_mim"]
    vision = options.get("vision_cfg", options)
    width = vision.get("embed_dim", vision.get("width"))
    side = vision.get("img_size", vision.get("image_size", vision.get("input_resolution"))) // vision["patch_size"]
    assert (family.width, family.depth) == (width, vision.get("depth", vision.get("layers")))
    assert family.patch == (vision["patch_size"], vision["patch_size"])
    assert family.tokens == parts.get("tokens", side * side)
    assert family.schemes == parts.get("schemes", ("eva",))
    heads = vision.get("num_heads", vision.get("heads", width // vision.get("head_width", width)))
    assert family.heads == (heads if family.rope or family.relative != "none" else None)


def test_the_classifier_with_tables_in_its_blocks(shared: Path) -> None:
    golden = checkpoint(shared, "eva01_relpos")[1]
    family = detect(below(golden, "finetune/"))
    assert (family.relative, family.form, family.heads, family.timm_class()) == ("per block", "classifier", 4, "Beit")


TIMM = {
    "eva_giant_patch14_224": ("EVA-01", BOTH, "Eva", {"tokens": 256, "hidden": 6144, "head": 1000}),
    "eva_large_patch14_196": ("ViT", BOTH, "VisionTransformer", {"tokens": 196}),
    "eva02_tiny_patch14_224": ("EVA-02", ("timm",), "Eva", {"mlp": "packed", "hidden": 512, "form": "features"}),
    "eva02_large_patch14_224": ("EVA-02", ("timm",), "Eva", {"mlp": "naive", "hidden": 2730, "sub_ln": True, "rope": None}),
    "eva02_base_patch16_clip_224": ("EVA-02", ("timm",), "Eva", {"inner_attn_ln": True, "form": "clip tower", "head": 512}),
    "beit_base_patch16_224": ("EVA-01", BOTH, "Beit", {"heads": 12, "relative": "per block", "tokens": None}),
    "vit_base_patch14_reg4_dinov2": ("ViT", ("timm",), "VisionTransformer",
        {"registers": 4, "tokens": 37 * 37, "positions": 1369}),
    "vit_giant_patch14_dinov2": ("ViT", ("timm",), "VisionTransformer", {"mlp": "packed", "hidden": 4096, "layer_scale": True}),
    "deit3_small_patch16_224": ("ViT", ("timm",), "VisionTransformer", {"tokens": 196, "positions": 196, "layer_scale": True}),
    "vitamin_small_224": ("ViT", ("timm",), "VisionTransformer",
        {"class_token": False, "mlp": "geglu", "patch": None, "hidden": 768}),
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_by_shapes_alone(name: str) -> None:
    label, schemes, timm_class, parts = TIMM[name]
    with meta_device():
        model = timm.create_model(name)
    family = detect(model.state_dict())
    assert (family.name, family.schemes, family.timm_class()) == (label, schemes, timm_class)
    assert type(model).__name__ == timm_class
    assert (family.width, family.depth) == (model.embed_dim, len(model.blocks))
    assert {part: getattr(family, part) for part in parts} == parts


@pytest.mark.parametrize(("name", "text"), [
    ("EVA02-B-16", Text(512, 12, 77, 49408)), ("EVA01-g-14", Text(768, 12, 77, 49408)), ("ViTamin-S", Text(384, 12, 77, 49408)),
])
def test_open_clips_models_and_ours_in_training(name: str, text: Text) -> None:
    config = open_clip.get_model_config(name)
    config.pop("custom_text")
    with meta_device():
        state = CustomTextCLIP(**config).state_dict()
    family = detect(state)
    assert (family.form, family.schemes, family.text, family.prefix) == ("clip", ("open_clip",), text, "visual.trunk.")
    training = detect({f"model.{key}": value for key, value in state.items()})
    assert (training.form, training.schemes, training.text) == ("clip", ("stage",), text)
    assert training.width == family.width
    tower = detect({key: value for key, value in state.items() if key.startswith("visual.")})
    assert (tower.form, tower.text) == ("clip tower", None)


def test_our_masked_stage_in_training_and_its_exports(shared: Path) -> None:
    state, _, _ = checkpoint(shared, "eva02_b_mim")
    done = from_eva(state)
    student = MaskedStudent(MaskedSettings(name="golden_eva02_b_mim"), 64)
    family = detect(student.state_dict())
    assert (family.form, family.schemes, family.head, family.prefix) == ("mim", ("stage",), 64, "trunk.")
    trunk = detect(done.weights)
    assert (trunk.form, trunk.schemes, trunk.norms) == ("features", ("timm",), ("norm",))
    with pytest.raises(UserError, match=r"head.safetensors of a masked stage, .*mask_token \(1\); missing: blocks.0.norm1"):
        detect(done.outside)


def small() -> dict[str, Tensor]:
    return Eva(img_size=28, patch_size=14, embed_dim=8, depth=3, num_heads=2, num_classes=3).state_dict()


def without(*names: str) -> dict[str, Tensor]:
    return {name: value for name, value in small().items() if name not in names}


VECTOR = torch.zeros(8)
EVA_TINY = {name: value for name, value in small().items() if name not in ("cls_token", "pos_embed")} | {
    "mask_token": torch.zeros(1, 1, 8), "lm_head.weight": torch.zeros(4, 8),
}
TEXT_TOWER = {f"visual.{name}": value for name, value in small().items()} | {
    "text.token_embedding.weight": torch.zeros(9, 8), "text.positional_embedding": torch.zeros(5, 8),
    "text.text_projection": torch.zeros(8, 3), "text.ln_final.weight": VECTOR, "logit_scale": torch.zeros(()),
} | {f"text.transformer.resblocks.0.{name}": torch.zeros(8, 8) for name in RESBLOCK}
BROKEN: list[tuple[dict[str, Tensor], str]] = [
    ({}, "seen: nothing; missing: blocks.0.norm1.weight"),
    ({"layer1.0.conv1.weight": VECTOR, "fc.weight": VECTOR}, r"seen: layer1 \(1\), fc \(1\); missing: blocks.0.norm1.weight"),
    (small() | {"blocks.0.attn.rank.weight": VECTOR, "extra": VECTOR}, "missing: blocks.1.attn.rank.weight"),
    (small() | {"extra": VECTOR}, "1 tensors belong to no model that is known here: extra"),
    (without("blocks.1.mlp.fc1.bias"), r"seen: .*blocks \(38\).*; missing: blocks.1.mlp.fc1.bias"),
    ({name: value for name, value in small().items() if not name.startswith("blocks.1.")}, "there are 2 blocks, up to 2"),
    (small() | {"blocks.2.norm1.weight": torch.zeros(9)}, "missing: blocks.2.norm1.weight as in block 0"),
    (without(*(f"blocks.{n}.attn.v_bias" for n in range(3))), "missing: blocks.0.attn.v_bias"),
    (without(*(f"blocks.{n}.mlp.fc2.weight" for n in range(3))), "missing: blocks.0.mlp.fc2.weight"),
    (without("patch_embed.proj.weight", "patch_embed.proj.bias"), "missing: patch_embed.proj.weight"),
    (without(*(f"blocks.{n}.norm2.bias" for n in range(3))), "missing: blocks.0.norm2.bias"),
    (EVA_TINY, "missing: cls_token, pos_embed or relative positions"),
    (without("fc_norm.weight"), "missing: norm.weight or fc_norm.weight"),
    (small() | {"mask_token": torch.zeros(1, 1, 8)}, "missing: lm_head.weight or decoder_pred.weight beside mask_token"),
    (small() | {"lm_head.weight": torch.zeros(4, 8)}, "missing: mask_token"),
    (small() | {"rope.freqs_cos": torch.zeros(4, 4)}, "missing: rope.freqs_sin"),
    (small() | {f"blocks.{n}.attn.inner_attn_ln.weight": VECTOR for n in range(3)} | {"reg_token": torch.zeros(1, 2, 8)},
     "ambiguous, names of the original code .* beside timm's"),
    (small() | {f"visual.{name}": value for name, value in small().items()}, "ambiguous, there are blocks below each of"),
    (small() | {"pos_embed": torch.zeros(5)}, r"pos_embed has the shape \[5\]; it needs 3 dimensions"),
    ({f"visual.{name}": value for name, value in small().items()} | {"text.token_embedding.weight": torch.zeros(9, 4)},
     "missing: positional_embedding of the text tower"),
    ({f"visual.{name}": value for name, value in small().items()} | {"logit_scale": torch.zeros(())},
     "missing: token_embedding.weight of the text tower"),
    (TEXT_TOWER | {"text.transformer.resblocks.2.ln_1.weight": VECTOR}, "missing: text tower's transformer.resblocks.1"),
    ({"visual.transformer.resblocks.0.ln_1.weight": VECTOR}, "missing: visual.conv1.weight"),
    ({"visual.transformer.resblocks.0.ln_1.weight": VECTOR, "visual.layer1.conv.weight": VECTOR}, "not of OpenAI's CLIP"),
]


@pytest.mark.parametrize(("state", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_what_is_unknown_is_refused_with_what_is_missing(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect(state)


def test_any_thing_with_a_shape_will_do_and_too_many_are_refused() -> None:
    class Shaped:
        def __init__(self, shape: tuple[int, ...]):
            self.shape = shape

    state = small()
    family: Family = detect({name: Shaped(tuple(value.shape)) for name, value in state.items()})
    assert family == detect(state)
    with pytest.raises(UserError, match="a model has at most 100000"):
        detect(dict.fromkeys(map(str, range(100_001)), Shaped((1,))))


def test_nothing_but_a_user_error_comes_out_of_broken_names_and_shapes(shared: Path) -> None:
    """700 checkpoints with tensors removed, renamed, reshaped or from another one."""
    draw = random.Random(0)
    states = [checkpoint(shared, name)[0] for name in FIXTURES]
    sources = [{name: torch.empty(value.shape, device="meta") for name, value in state.items()} for state in states]
    accepted, answers = 0, []
    for _ in range(700):
        state = dict(draw.choice(sources))
        for _ in range(draw.randint(1, 3)):
            name, other = draw.choice(list(state)), draw.choice(sources)
            kind, taken = draw.randrange(4), draw.choice(list(other))
            value = state.pop(name)
            if kind == 1:
                state[draw.choice(["visual.", "module.", "blocks.", "blocks.\u00b2."]) + name] = value
            elif kind == 2:
                state[name] = torch.empty([draw.randint(0, 9) for _ in range(draw.randint(0, 5))], device="meta")
            elif kind == 3:
                state |= {name: value, taken: other[taken]}
        try:
            detect(state)
            accepted += 1
        except UserError as error:
            answers.append(str(error))
    assert 0 < accepted < 200
    assert all(answer.startswith("checkpoint: ") and len(answer) < 1000 for answer in answers)
