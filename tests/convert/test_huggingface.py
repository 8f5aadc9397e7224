"""Conversion from and to transformers, against its own classes, files and loaders, and timm's and open_clip's models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.convert.parity import outputs as our_outputs
from eva_mim.convert.parity import streamed, unloaded
from eva_mim.core.errors import UserError
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.files.lazy import Deferred, deferred, materialise
from eva_mim.weights.files.read import open_checkpoint
from eva_mim.weights.names.families import detect
from eva_mim.weights.names.huggingface import build, for_module, from_transformers, outputs, preprocessor, to_transformers

transformers = pytest.importorskip("transformers")
TRUNK: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
TIMM: dict[str, Any] = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}
SWIGLU: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 256 / 48}
REGISTERS: dict[str, Any] = {"reg_tokens": 3, "no_embed_class": True}
UNTOLD: dict[str, Any] = {"heads": 4, "image_size": 28, "eps": 1e-6}
# class of transformers, what its configuration has beyond TRUNK, timm's arguments beyond TIMM
TRUNKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": ("ViTModel", {"intermediate_size": 80, "layer_norm_eps": 1e-6}, {"mlp_ratio": 80 / 48}),
    "vit head": ("ViTForImageClassification", {"intermediate_size": 80, "layer_norm_eps": 1e-6, "num_labels": 5},
                 {"mlp_ratio": 80 / 48, "num_classes": 5}),
    "vit bare": ("ViTModel", {"qkv_bias": False, "intermediate_size": 80, "layer_norm_eps": 1e-6},
                 {"mlp_ratio": 80 / 48, "qkv_bias": False}),
    "dinov2": ("Dinov2Model", {"mlp_ratio": 2}, {"mlp_ratio": 2, "init_values": 1.0}),
    "dinov2 head": ("Dinov2ForImageClassification", {}, {"init_values": 1.0}),
    "dinov2 giant": ("Dinov2Model", {"use_swiglu_ffn": True}, {"init_values": 1.0} | SWIGLU),
    "registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, {"init_values": 1.0} | REGISTERS),
    "registers giant": ("Dinov2WithRegistersModel", {"num_register_tokens": 3, "use_swiglu_ffn": True},
                        {"init_values": 1.0} | REGISTERS | SWIGLU),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read when it was imported
    torch.manual_seed(0)


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter random: no zero bias and no norm of ones hides a mistake."""
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape) * 0.3 + 0.1)
    return module.eval()


def trunk(name: str) -> nn.Module:
    """The model of transformers."""
    kind, more, _ = TRUNKS[name]
    settings = getattr(transformers, f"{kind.replace('ForImageClassification', '').removesuffix('Model')}Config")
    return randomise(getattr(transformers, kind)(settings(**TRUNK, **more)))


def saved(module: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(its file as Deferred tensors, its config.json)."""
    module.save_pretrained(folder)
    return deferred(open_checkpoint(folder)), json.loads((folder / "config.json").read_text())


def written(weights: Mapping[str, Tensor], config: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    save_file({name: materialise(value).clone().contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path, how: str = "AutoModel") -> Any:
    """By transformers' own loader, which must use every tensor and miss none."""
    module, info = getattr(transformers, how).from_pretrained(folder, output_loading_info=True)
    assert {kind: list(names) for kind, names in info.items() if names} == {}
    return module.eval()


def into(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    module.load_state_dict({name: materialise(value) for name, value in weights.items()})
    return module.eval()


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(materialise(one[name]), materialise(other[name]))] == []


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: set[str]) -> None:
    assert one.keys() & other.keys() == names
    for name in names:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-5)
        assert not one[name].numel() > 1 or one[name].std() > 0.1


def example(name: str, tmp_path: Path) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    module = trunk(name)
    return module, *saved(module, tmp_path / "theirs")


@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_says_the_same_in_timm(name: str, tmp_path: Path) -> None:
    module, weights, config = example(name, tmp_path)
    done = from_transformers(weights, config)
    assert all(isinstance(value, Deferred) for value in done.weights.values())
    ours = into(VisionTransformer(**TIMM | TRUNKS[name][2]), done.weights)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        answer = module(images)
        features = module.base_model(images).last_hidden_state
    theirs = {"tokens": features} | ({"answer": answer.logits} if name == "vit head" else {})
    close(theirs, our_outputs(ours, images), set(theirs))
    assert sorted(done.report.loaded) == sorted(done.weights)
    left = {"vit": {"pooler"}, "vit bare": {"pooler"}, "vit head": set(), "dinov2 head": {"classifier", "dinov2"}}
    assert {key.partition(".")[0] for key in done.report.ignored} == left.get(name, {"embeddings"})
    assert set(done.report.ignored) <= done.report.reasons.keys()


@pytest.mark.parametrize("name", TRUNKS)
def test_built_without_memory_and_streamed(name: str, tmp_path: Path) -> None:
    module, weights, config = example(name, tmp_path)
    weights = {key: value for key, value in weights.items() if "pooler" not in key}  # many files of ViTs have none
    with unloaded():
        made = build(config)
    assert all(value.is_meta for value in made.parameters())
    images = torch.randn(2, 3, 28, 28)
    said = outputs(streamed(made, for_module(weights, made)), images)
    close(said, outputs(module, images), {"tokens", "answer"} if name == "vit head" else {"tokens"})


def clip(quick: bool) -> tuple[Any, CLIP]:
    """(transformers', open_clip's), of other weights."""
    tower = {"num_hidden_layers": 2, "hidden_act": "quick_gelu" if quick else "gelu", "intermediate_size": 128}
    words = tower | {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 9}
    words["eos_token_id"] = 2  # as in OpenAI's own files: the feature is taken at the largest id
    pixels = tower | TRUNK | {"intermediate_size": 192, "projection_dim": 24}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(text_config=words, vision_config=pixels, projection_dim=24))
    vision = CLIPVisionCfg(layers=2, width=48, head_width=12, patch_size=7, image_size=28)
    text = CLIPTextCfg(context_length=9, vocab_size=60, width=32, heads=2, layers=2)
    return randomise(theirs), CLIP(24, vision, text, quick_gelu=quick)  # type: ignore[return-value]


CLIP_UNTOLD = UNTOLD | {"eps": 1e-5, "activation": "quick_gelu", "text_heads": 2}


@pytest.mark.parametrize("quick", [True, False])
def test_clip_says_the_same_in_open_clip_and_comes_back(quick: bool, tmp_path: Path) -> None:
    module, ours = clip(quick)
    weights, config = saved(module, tmp_path / "theirs")
    done = from_transformers(weights, config)
    into(ours, done.weights)
    images, tokens = torch.randn(2, 3, 28, 28), torch.randint(1, 60, (3, 9))  # the largest id stands anywhere
    with torch.no_grad():
        said = {"image": module.get_image_features(images).pooler_output, "text": module.get_text_features(tokens).pooler_output,
                "scale": module.logit_scale.exp()}
    close(said, our_outputs(ours, images, tokens), {"image", "text", "scale"})
    untold = CLIP_UNTOLD | {"activation": "quick_gelu" if quick else "gelu"}
    back, made = to_transformers(done.weights, detect(done.weights), **untold)
    same(back.weights, weights)
    assert (back.report.new, back.report.ignored, done.report.ignored) == ([], [], [])
    reloaded = loaded(written(back.weights, made, tmp_path / "ours"))
    assert type(reloaded).__name__ == "CLIPModel"
    close(outputs(reloaded, images, tokens), said, {"image", "text", "scale"})
    with unloaded():
        empty = build(made)
    close(outputs(streamed(empty, for_module(back.weights, empty)), images, tokens), said, {"image", "text", "scale"})


def test_clip_with_a_text_tower_of_its_own() -> None:
    module, ours = clip(quick=True)
    weights = randomise(ours).state_dict()
    custom = {name if name.startswith(("visual.", "logit")) else f"text.{name}": value for name, value in weights.items()}
    done, config = to_transformers(custom, detect(custom), **CLIP_UNTOLD)
    assert done.weights.keys() == module.state_dict().keys()
    same(from_transformers(done.weights, config).weights, weights)


def test_an_image_tower_alone(tmp_path: Path) -> None:
    module, ours = clip(quick=True)
    tower = randomise(transformers.CLIPVisionModelWithProjection(module.config.vision_config))
    weights, config = saved(tower, tmp_path / "theirs")
    done = from_transformers(weights, config)
    assert all(name.startswith("visual.") for name in done.weights)
    ours.load_state_dict({**ours.state_dict(), **{name: materialise(value) for name, value in done.weights.items()}})
    images = torch.randn(2, 3, 28, 28)
    close(outputs(tower, images), our_outputs(ours.eval(), images), {"image"})
    back, made = to_transformers(done.weights, detect(done.weights), **CLIP_UNTOLD)
    same(back.weights, weights)
    again = loaded(written(back.weights, made, tmp_path / "ours"), "CLIPVisionModelWithProjection")
    close(outputs(again, images), outputs(tower, images), {"image"})
    bare = {name: value for name, value in weights.items() if name != "visual_projection.weight"}
    with pytest.raises(UserError, match="CLIPVisionModelWithProjection"):
        from_transformers(bare, config)


DINOV2 = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
FULL: dict[str, tuple[str, int, int, int]] = {"vit_base_patch16_224": ("ViT", 768, 12, 12)}
for _size, _numbers in DINOV2.items():
    FULL[f"vit_{_size}_patch14_dinov2"] = ("Dinov2", *_numbers)
    FULL[f"vit_{_size}_patch14_reg4_dinov2"] = ("Dinov2WithRegisters", *_numbers)


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


@pytest.mark.parametrize("name", FULL)
def test_names_at_full_size(name: str) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    kind, width, depth, heads = FULL[name]
    side, patch = (224, 16) if kind == "ViT" else (518, 14)
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "image_size": side}
    sizes["patch_size"] = patch
    more = {} if kind == "ViT" else {"use_swiglu_ffn": "giant" in name}
    with meta_device():
        config = getattr(transformers, f"{kind}Config")(**sizes, **more)
        module = getattr(transformers, f"{kind}Model")(config)
        theirs = revert_weight_conversion(module, module.state_dict())  # as its file would have them
        ours = timm.create_model(name, num_classes=0).state_dict()
    done = from_transformers(theirs, config.to_dict())
    assert shapes(done.weights) == shapes(ours)


@pytest.mark.parametrize(("name", "tower", "text"), [
    ("ViT-B-32", (768, 12, 12, 32), (512, 8)), ("ViT-L-14", (1024, 24, 16, 14), (768, 12)),
])
def test_clip_at_full_size(name: str, tower: tuple[int, ...], text: tuple[int, int]) -> None:
    width, heads = text
    words = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 12, "intermediate_size": 4 * width}
    sizes = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"), tower, strict=True))
    vision = sizes | {"intermediate_size": 4 * tower[0]}
    with meta_device():
        config = transformers.CLIPConfig(text_config=words, vision_config=vision, projection_dim=width)
        theirs = transformers.CLIPModel(config).state_dict()
        ours = open_clip.create_model(name, device="meta").state_dict()
    done = from_transformers(theirs, config.to_dict())
    assert shapes(done.weights) == shapes(ours)
    untold = CLIP_UNTOLD | {"heads": sizes["num_attention_heads"], "image_size": 224, "text_heads": heads}
    back, made = to_transformers(ours, detect(ours), **untold)
    assert shapes(back.weights) == shapes(theirs)
    assert (made["vision_config"].items() >= vision.items(), made["text_config"].items() >= words.items()) == (True, True)
    assert (made["text_config"]["vocab_size"], made["text_config"]["max_position_embeddings"]) == (49408, 77)


@pytest.mark.parametrize(("told", "said"), [
    ({"heads": 7}, "heads: 7 does not divide the width 48"), ({}, "text_heads: None does not divide the width 32"),
    ({"text_heads": 2, "image_size": 35}, "image_size: 35 gives 25 patches, and there are 17 positions"),
])
def test_sizes_that_do_not_fit_are_refused(told: dict[str, Any], said: str) -> None:
    weights = clip(quick=True)[1].state_dict()
    with pytest.raises(UserError, match=said):
        to_transformers(weights, detect(weights), **UNTOLD | told)


def test_strange_files_are_refused(tmp_path: Path) -> None:
    _, weights, config = example("vit", tmp_path)
    with pytest.raises(UserError, match=r"'bert' is not known here; known: clip, .*vit"):
        from_transformers(weights, {"model_type": "bert"})
    with pytest.raises(UserError, match=r"decoder.0.weight"):
        from_transformers({**weights, "decoder.0.weight": torch.zeros(1)}, config)
    with pytest.raises(UserError, match="1 tensors have no place, or not one of their own"):
        from_transformers({**weights, "vit.layernorm.weight": torch.zeros(48)}, config)
    half = {name: value for name, value in weights.items() if name != "encoder.layer.1.attention.attention.key.bias"}
    with pytest.raises(UserError, match=r"encoder.layer.1.attention.attention.key.bias missing"):
        from_transformers(half, config)


@pytest.mark.parametrize(("change", "said"), [
    ({"architectures": ["ViTForMaskedImageModeling"]}, "known: ViTModel, ViTForImageClassification"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is more than 1000"),
    ({"hidden_act": "no such"}, "makes no ViTModel of it"),
    ({"num_attention_heads": 0}, "makes no ViTModel of it"),
])
def test_strange_configurations_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(TRUNK | {"model_type": "vit", "architectures": ["ViTModel"]} | change)


def test_a_configuration_cannot_ask_for_code() -> None:
    asked: dict[str, Any] = {"model_type": "dinov2", "auto_map": {"AutoModel": "evil--model.Evil"}}
    asked["quantization_config"] = {"quant_method": "bnb"}
    asked |= dict.fromkeys(("attn_implementation", "_attn_implementation", "_attn_implementation_internal"), "evil/kernel")
    settings = build(TRUNK | asked).config
    assert settings._attn_implementation in ("sdpa", "eager")
    assert not asked.keys() - {"model_type"} & settings.to_dict().keys()


def test_old_clip_configurations_and_their_position_ids(tmp_path: Path) -> None:
    module, ours = clip(quick=True)
    weights, config = saved(module, tmp_path / "theirs")
    old = config | {"text_config_dict": config["text_config"], "text_config": {"hidden_size": 16}, "vision_config_dict": None}
    made = build(old)
    same(into(made, for_module(weights, made)).state_dict(), module.state_dict())
    more = {**weights, "text_model.embeddings.position_ids": torch.arange(9)[None]}
    done = from_transformers(more, config)
    assert (done.weights.keys(), done.report.ignored) == (ours.state_dict().keys(), ["text_model.embeddings.position_ids"])


def test_preprocessors(tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    tree = preprocessor(mean, std, 20)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(tree))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    image = torch.randint(256, (3, 20, 20), dtype=torch.uint8)
    made = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(made, (image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])
    assert processor(torch.zeros(3, 30, 50, dtype=torch.uint8), return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 20)
