"""Renaming against the original code's outputs, bit for bit both ways, and against the libraries' own names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor
from torch.nn import LayerNorm

from eva_mim.core.errors import UserError
from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import DecoderSettings, MaskedSettings
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.files.read import open_checkpoint
from eva_mim.weights.names.buffers import Rope
from eva_mim.weights.names.eva import Converted, from_eva, from_stage, to_eva, unshare_relative, visual_trunk, with_norm
from eva_mim.weights.names.families import detect
from eva_mim.weights.names.openai import from_openai, openai_to_timm, to_openai
from eva_mim.weights.resize import resize_positions, resize_trunk
from tests.students.golden import below, pixels
from tests.weights.golden_names import checkpoint, classifier, clip

MIM = ["eva01_mim", "eva02_s_mim", "eva02_b_mim", "eva01_relpos"]
CLASSIFIERS = ["eva01_cls", "eva02_s_cls", "eva02_b_cls", "evaL_cls"]
CLIPS = ["clip_eva02_b", "clip_eva01_g", "clip_eva01_b_layerscale"]
EVA = [*MIM, *CLASSIFIERS, *CLIPS, "clip_bige_visual", "evaL_mae"]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", MIM)
@torch.no_grad()
def test_a_masked_model_predicts_as_the_original_code(shared: Path, name: str) -> None:
    """Trunk and head.safetensors fill our student, nothing missing and nothing left."""
    state, golden, _ = checkpoint(shared, name)
    done = from_eva(state)
    student = MaskedStudent(MaskedSettings(name=f"golden_{name}"), len(done.outside["head.bias"])).eval()
    student.load_state_dict({f"trunk.{key}": value for key, value in done.weights.items()} | done.outside)
    masked = golden["in/mask"].flatten(1)
    tokens = student.tokens(pixels(golden["in/image"]), masked)
    assert (tokens - golden["out/final_norm_tokens"]).abs().max() < 2e-5
    predicted = student(pixels(golden["in/image"]), masked, masked.flatten().nonzero()[:, 0])
    assert (predicted - golden["out/predictions"]).abs().max() < 1e-5
    again = from_stage(student.state_dict())
    assert equal(again.weights, done.weights)
    assert equal(again.outside, done.outside)


@torch.no_grad()
def test_the_masked_autoencoder_predicts_as_the_original_code(shared: Path) -> None:
    state, golden, _ = checkpoint(shared, "evaL_mae")
    done = from_eva(state)
    settings = MaskedSettings(
        name="golden_evaL_mae", form="visible", positions="sincos", decoder=DecoderSettings(width=48, depth=2, heads=4)
    )
    student = MaskedStudent(settings, 40, MaskSettings(kind="random", ratio=0.75)).eval()
    student.load_state_dict({f"trunk.{key}": value for key, value in done.weights.items()} | done.outside)
    predicted = student(pixels(golden["in/image"]), golden["out/mask"].bool(), torch.arange(128)).unflatten(0, (2, 64))
    assert (predicted - golden["out/predictions"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_a_classifier_answers_as_the_original_code(shared: Path, name: str) -> None:
    """Also at the fixture's larger size, by the original's rule for positions; RoPE keeps its reference grid there."""
    state, golden, facts = checkpoint(shared, name)
    done, family = from_eva(state), detect(state)
    heads = facts["constructor"]["num_heads"]
    model = classifier(family, heads, done.rope, 112)
    model.load_state_dict(done.weights)
    assert (model(golden["in/image"]) - golden["out/logits"]).abs().max() < 1e-5
    if "in/large_image" in golden:
        size = facts["large_img_size"]
        larger, report = resize_trunk(
            done.weights, (8, 8), (size // 14, size // 14), positions="original", kernel="bicubic"
        )
        assert report.resized == ["pos_embed"]
        assert (larger["pos_embed"] - golden["out/large_pos_embed"]).abs().max() < 1e-5
        model = classifier(family, heads, done.rope, size)
        model.load_state_dict(larger)
        assert (model(golden["in/large_image"]) - golden["out/large_logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_a_clip_model_answers_as_the_original_code(shared: Path, name: str) -> None:
    state, golden, facts = checkpoint(shared, name)
    model = clip(name, facts)
    model.load_state_dict(from_eva(state).weights)
    image, text, scale = model(golden["in/image"], golden["in/text"])
    assert (image - golden["out/image_features"]).abs().max() < 1e-5
    assert (text - golden["out/text_features"]).abs().max() < 1e-5
    assert (scale * image @ text.T - golden["out/logits_per_image"]).abs().max() < 1e-5
    tower = visual_trunk(model.state_dict())
    assert equal(tower.weights, model.visual.trunk.state_dict())
    assert len(tower.report.ignored) == len(model.state_dict()) - len(tower.weights)


@torch.no_grad()
def test_a_post_norm_tower_answers_as_the_original_code(shared: Path) -> None:
    state, golden, _ = checkpoint(shared, "clip_bige_visual")
    tower = Eva(img_size=84, patch_size=14, embed_dim=84, depth=2, num_heads=4, mlp_ratio=720 / 84, use_post_norm=True,
                num_classes=60, global_pool="token").eval()
    tower.load_state_dict(from_eva(state).weights)
    assert (tower(golden["in/image"]) - golden["out/image_embed"]).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "grid"), [("", (8, 8)), ("large_", (12, 12)), ("rect_", (8, 12))])
@torch.no_grad()
def test_an_openai_tower_answers_as_the_original_code(shared: Path, name: str, grid: tuple[int, int]) -> None:
    state, golden, _ = checkpoint(shared, "openai_visual")
    done = {key.removeprefix("visual."): value for key, value in from_openai(state).weights.items()}
    positions = resize_positions(done["positional_embedding"], (8, 8), grid, prefix=1, rule="original")
    tower = VisionTransformer(
        image_size=(grid[0] * 14, grid[1] * 14),  # type: ignore[arg-type]
        patch_size=14, width=80, layers=2, heads=5, mlp_ratio=4.0, output_dim=48, act_layer=QuickGELU, output_tokens=True,
    ).eval()
    tower.load_state_dict(done | {"positional_embedding": positions})
    tokens = tower(golden[f"in/{name}image"])[1]
    assert (tokens @ done["proj"] - golden[f"out/{name}dense_features"]).abs().max() < 2e-5
    assert equal(to_openai(from_openai(state).weights).weights, state)


@torch.no_grad()
def test_an_openai_tower_answers_in_timm(shared: Path) -> None:
    """The class token's answer is open_clip's, the patches' are the fixture's."""
    state, golden, _ = checkpoint(shared, "openai_visual")
    done = openai_to_timm(state)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=112, patch_size=14, embed_dim=80, depth=2, num_heads=5, num_classes=48, global_pool="token", pre_norm=True,
        act_layer="quick_gelu", norm_layer=partial(LayerNorm, eps=1e-5),
    ).eval()
    model.load_state_dict(done.weights)
    assert done.report.new == ["head.bias"]
    patches = model.head(model.forward_features(golden["in/image"])[:, 1:])
    assert (patches - golden["out/dense_features"]).abs().max() < 2e-5
    with meta_device():
        materialise = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=512)
        source = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
    assert openai_to_timm(source.state_dict()).weights.keys() == materialise.state_dict().keys()


@pytest.mark.parametrize("name", EVA)
def test_the_way_back_changes_no_bit(shared: Path, tmp_path: Path, name: str) -> None:
    """In each container; tables are computed again; what went in is untouched."""
    state, _, _ = checkpoint(shared, name)
    kept = {key: value.clone() for key, value in state.items()}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    trees: list[tuple[dict[str, Any], str | None]] = [(state, None), (wrapped, None)]
    trees.append(({"model_ema": state, "model": {"a": torch.ones(1)}}, "model_ema"))
    trees += [({key: state, "epoch": 3, "optimizer": {"a": 1}}, None) for key in ("module", "model", "state_dict", "model_ema")]
    for tree, container in trees:
        torch.save(tree, tmp_path / "file.pt")
        assert equal(dict(open_checkpoint(tmp_path / "file.pt", container)), state)
    done = from_eva(state)
    back = to_eva(done.weights, done.outside, grid=done.grid, rope=done.rope, tower=name == "clip_bige_visual")
    assert back.weights.keys() == state.keys()
    assert sorted(back.report.new) == sorted(done.report.ignored)  # the tables
    assert done.report.reasons.keys() == set(done.report.ignored)
    for key, value in state.items():
        assert back.weights[key].dtype == value.dtype
        if key in back.report.new:
            assert (back.weights[key] - value).abs().max() < 1e-6
        else:
            assert torch.equal(back.weights[key], value)
    assert equal(state, kept)
    assert len(done.report.loaded) == len(done.weights) + len(done.outside)


@pytest.mark.parametrize("name", [*MIM[:3], "eva01_cls", "eva02_s_cls", "eva02_b_cls", "clip_bige_visual"])
def test_names_are_those_of_timms_own_filter(shared: Path, name: str) -> None:
    """timm moves norm to fc_norm for a masked model: our rule copy."""
    state, _, _ = checkpoint(shared, name)
    family = detect(state)
    model = Eva(img_size=112, patch_size=14, embed_dim=family.width, depth=1, num_heads=4)
    mine = from_eva(state).weights
    if family.form == "mim":
        mine = with_norm(mine, "copy").weights
    theirs = checkpoint_filter_fn(state, model)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine if key != "pos_embed" or name != "clip_bige_visual")


def test_the_original_hand_over_to_a_classifier_with_tables(shared: Path) -> None:
    """norm dropped, the shared table copied to both blocks and resized: the state after the original loader."""
    state, golden, _ = checkpoint(shared, "eva01_relpos")
    expected = from_eva(below(golden, "finetune/")).weights
    done = with_norm(unshare_relative(from_eva(state).weights).weights, "drop")
    made, report = resize_trunk(done.weights, (8, 8), (12, 12), positions="original", kernel="bicubic")
    assert expected.keys() - made.keys() == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert made.keys() <= expected.keys()
    assert all((made[key] - expected[key]).abs().max() < 1e-5 for key in made)
    assert report.resized == [f"blocks.{number}.attn.relative_position_bias_table" for number in (0, 1)]
    assert sorted(done.report.new) == ["fc_norm.bias", "fc_norm.weight"]


def test_the_norm_rules() -> None:
    trunk = {"norm.weight": torch.ones(2), "norm.bias": torch.zeros(2), "cls_token": torch.zeros(1, 1, 2)}
    assert equal(with_norm(trunk, "keep").weights, trunk)
    assert list(with_norm(trunk, "copy").weights) == ["fc_norm.weight", "fc_norm.bias", "cls_token"]
    dropped = with_norm(trunk, "drop")
    assert list(dropped.weights) == ["cls_token"]
    assert dropped.report.ignored == ["norm.weight", "norm.bias"]
    with pytest.raises(UserError, match="norm=copy: the trunk has fc_norm already"):
        with_norm(trunk | {"fc_norm.weight": torch.ones(2)}, "copy")


ARCHITECTURES = {
    "eva_giant_patch14_224": None, "eva_large_patch14_196": None, "eva_giant_patch14_clip_224": None,
    "eva02_tiny_patch14_224": Rope(64, 16), "eva02_small_patch14_224": Rope(64, 16), "eva02_base_patch14_224": Rope(64, 16),
    "eva02_large_patch14_224": Rope(64, 16), "eva02_base_patch16_clip_224": Rope(64, 16),
    "eva02_enormous_patch14_clip_224": None, "beit_base_patch16_224": None,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_real_architectures_names_come_back_as_timm_has_them(name: str) -> None:
    with meta_device():
        model = timm.create_model(name)
    state = model.state_dict()
    there = to_eva(state, grid=model.patch_embed.grid_size, rope=ARCHITECTURES[name])
    back = from_eva(there.weights)
    assert list(back.weights) == list(state)
    assert all(back.weights[key] is state[key] for key in state)
    assert detect(there.weights).schemes in (("eva",), ("eva", "timm"))
    assert all(value.is_meta for value in there.weights.values())
    split = name.startswith(("eva02_base", "eva02_large"))
    assert ("blocks.0.attn.q_bias" in there.weights) == (name != "eva_large_patch14_196")
    assert ("blocks.11.mlp.w2.weight" in there.weights) == split
    assert ("blocks.11.mlp.w12.weight" in there.weights) == name.startswith(("eva02_tiny", "eva02_small"))
    assert ("rope.freqs_cos" in there.weights) == (ARCHITECTURES[name] is not None)


@pytest.mark.parametrize(("name", "side"), [("EVA02-B-16", 14), ("EVA01-g-14", 16), ("EVA02-L-14", 16)])
def test_a_real_clip_models_names_come_back_as_open_clip_has_them(name: str, side: int) -> None:
    config = open_clip.get_model_config(name)
    config.pop("custom_text")
    with meta_device():
        state = CustomTextCLIP(**config).state_dict()
    there = to_eva(state, grid=(side, side), rope=Rope(64, 16) if name.startswith("EVA02") else None)
    assert not any("trunk" in key for key in there.weights)
    assert ("visual.blocks.0.attn.inner_attn_ln.weight" in there.weights) == name.startswith("EVA02")
    back = from_eva(there.weights)
    assert list(back.weights) == list(state)
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    alone = to_eva(visual, grid=(side, side), rope=Rope(64, 16) if name.startswith("EVA02") else None)
    assert alone.weights.keys() == {key for key in there.weights if key.startswith("visual.")}


@pytest.mark.parametrize("name", ["vitamin_small_224", "deit3_small_patch16_224"])
def test_what_the_original_code_cannot_hold_is_named(name: str) -> None:
    with meta_device():
        state = timm.create_model(name).state_dict()
    with pytest.raises(UserError, match="no place for") as error:
        to_eva(state)
    parts = ["a GeGLU", "patch_embed.backbone"] if name.startswith("vitamin") else ["ls1.gamma"]
    assert all(part in str(error.value) for part in [*parts, "positions without a class token"])


def test_a_vitamin_tower_is_timms_by_another_prefix() -> None:
    config = open_clip.get_model_config("ViTamin-S")
    config.pop("custom_text")
    with meta_device():
        model = CustomTextCLIP(**config)
        trunk = timm.create_model("vitamin_small_224", num_classes=0)
    done = visual_trunk(model.state_dict())
    assert list(done.weights) == list(trunk.state_dict())
    assert "visual.head.proj.weight" in done.report.ignored
    assert list(from_stage({f"model.{key}": value for key, value in model.state_dict().items()}).weights) == [*model.state_dict()]


def small(**changes: Tensor | None) -> dict[str, Tensor]:
    """EVA-01 of width 8 under the original names, with tensors added or (None) taken out."""
    state = Eva(img_size=28, patch_size=14, embed_dim=8, depth=2, num_heads=2, num_classes=3).state_dict()
    state |= {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in state.items() if changes.get(name, value) is not None}


def test_the_logit_scale_of_both_places(shared: Path) -> None:
    state, _, _ = checkpoint(shared, "clip_eva01_g")
    scale = state.pop("logit_scale")
    assert torch.equal(from_eva(state | {"text.logit_scale": scale}).weights["logit_scale"], scale)
    both = from_eva(state | {"text.logit_scale": scale, "logit_scale": scale})
    assert both.report.ignored == ["logit_scale"]
    with pytest.raises(UserError, match="both logit_scale and differ"):
        from_eva(state | {"text.logit_scale": scale, "logit_scale": scale + 1})
    flat = {name.removeprefix("text."): value for name, value in state.items()} | {"logit_scale": scale}
    assert equal(from_eva(flat).weights, from_eva(state | {"logit_scale": scale}).weights)


def test_what_timm_cannot_hold_is_named(shared: Path) -> None:
    tables = {"rel_pos_bias.relative_position_bias_for_high": torch.zeros(6, 2),
              "rel_pos_bias.relative_position_bias_for_width": torch.zeros(6, 2)}
    with pytest.raises(UserError, match=r"timm cannot represent .* decoupled relative positions"):
        from_eva(small(**tables))
    state, _, _ = checkpoint(shared, "eva02_b_mim")
    with pytest.raises(UserError, match=r"beside rotary ones or relative positions with q, k and v apart or .* sub-LN"):
        from_eva(state | {"rel_pos_bias.relative_position_bias_table": torch.zeros(228, 4)})


def test_a_table_that_would_not_be_computed_again_is_an_error(shared: Path) -> None:
    state, _, _ = checkpoint(shared, "eva02_s_mim")
    for name in ("rope.freqs_cos", "blocks.1.attn.rope.freqs_sin"):
        for wrong in (state[name] + 0.1, state[name] * torch.nan, state[name][1:], state[name][:, 1:]):
            with pytest.raises(UserError, match=r"cannot be computed again|as in block 0"):
                from_eva(state | {name: wrong})
    state, _, _ = checkpoint(shared, "evaL_mae")
    with pytest.raises(UserError, match="decoder_pos_embed is not the original"):
        from_eva(state | {"decoder_pos_embed": state["decoder_pos_embed"].flip(1)})
    with pytest.raises(UserError, match="decoder of width 47 has no sine"):
        from_eva(state | {"decoder_pos_embed": state["decoder_pos_embed"][..., 1:]})
    state, _, _ = checkpoint(shared, "eva01_relpos")
    name = "rel_pos_bias.relative_position_index"
    with pytest.raises(UserError, match="relative_position_index is not"):
        from_eva(state | {name: state[name].T.contiguous()})


def test_tables_need_their_sizes(shared: Path) -> None:
    done = from_eva(checkpoint(shared, "eva02_s_mim")[0])
    with pytest.raises(UserError, match="rope: EVA-02 stores rotary tables"):
        to_eva(done.weights, grid=(8, 8))
    with pytest.raises(UserError, match=r"grid: \(7, 8\) is not the grid of 64 patches"):
        to_eva(done.weights, grid=(7, 8), rope=done.rope)
    with pytest.raises(UserError, match="grid: None"):
        to_eva(done.weights, rope=done.rope)
    with pytest.raises(UserError, match="head_width: 30 is not a multiple of 4"):
        to_eva(done.weights, grid=(8, 8), rope=Rope(30))
    with pytest.raises(UserError, match=r"decoder_embed.bias is no part of a masked model, which has mask_token, head.weight"):
        to_eva(small(), {"decoder_embed.bias": torch.zeros(3)})
    with pytest.raises(UserError, match="mask_token is no part of a CLIP model"):
        to_eva(small(), {"mask_token": torch.zeros(1, 1, 8)}, tower=True)
    with pytest.raises(UserError, match=r"this conversion starts from .*names of eva"):
        from_eva({f"visual.trunk.{name}": value for name, value in small().items()})


@torch.no_grad()
def test_a_whole_openai_model_in_both_classes_of_open_clip() -> None:
    torch.manual_seed(0)
    vision = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 2, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    flat = open_clip.model.CLIP(16, vision, text, quick_gelu=True).eval()  # type: ignore[arg-type]
    state = dict(flat.state_dict())
    scripted = state | {"input_resolution": torch.tensor(28), "context_length": torch.tensor(8), "vocab_size": torch.tensor(50)}
    assert detect(scripted).schemes == ("openai",)
    done = from_openai(scripted)
    assert equal(done.weights, state)
    assert done.report.ignored == ["input_resolution", "context_length", "vocab_size"]
    custom = CustomTextCLIP(16, vision, text, quick_gelu=True).eval()  # type: ignore[arg-type]
    apart: Converted = from_openai(scripted, custom_text=True)
    custom.load_state_dict(apart.weights)
    images, texts = torch.randn(2, 3, 28, 28), torch.randint(0, 50, (2, 8))
    for mine, theirs in zip(custom(images, texts), flat(images, texts), strict=True):
        assert (mine - theirs).abs().max() < 1e-6
    assert equal(to_openai(apart.weights).weights, state)
    with pytest.raises(UserError, match="no timm model as image tower"):
        visual_trunk(apart.weights)
