"""Architectures from names and shapes: real models by name, fixtures by what they answer, and what is said when nothing tells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from eva_mim.convert.architecture import Architecture, find_architecture
from eva_mim.core.errors import UserError
from eva_mim.trunks.meta import meta_device
from eva_mim.weights.files.sidecar import Description, describe
from eva_mim.weights.names.buffers import Rope, rope_tables
from eva_mim.weights.names.eva import from_eva, visual_trunk
from eva_mim.weights.names.families import detect
from eva_mim.weights.names.openai import openai_to_timm
from eva_mim.weights.resize import resize_trunk
from tests.students.golden import below
from tests.weights.golden_names import checkpoint


def meta(name: str, **options: Any) -> dict[str, Tensor]:
    """Names and shapes of a registered model, of timm or open_clip."""
    with meta_device():
        config = open_clip.get_model_config(name)
        if config is None:
            model: nn.Module = timm.create_model(name, **options)
        else:
            model = (CustomTextCLIP if config.pop("custom_text", False) else CLIP)(**config)
    return model.state_dict()


def find(weights: dict[str, Tensor], **told: Any) -> Architecture:
    return find_architecture(weights, detect(weights), **told)


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm without the architectures of the fixtures."""
    names = [name for name in timm.list_models() if not name.startswith(("golden_", "names_"))]
    monkeypatch.setattr(timm, "list_models", lambda: names)


REAL = [
    "eva_giant_patch14_224", "eva_giant_patch14_336", "eva_giant_patch14_560", "eva_large_patch14_196", "eva_large_patch14_336",
    "eva02_tiny_patch14_224", "eva02_small_patch14_224", "eva02_base_patch14_224", "eva02_large_patch14_224",
    "eva02_tiny_patch14_336", "eva02_small_patch14_336", "eva02_base_patch14_448", "eva02_large_patch14_448",
    "eva_giant_patch14_clip_224", "eva02_base_patch16_clip_224", "eva02_large_patch14_clip_224", "eva02_large_patch14_clip_336",
    "eva02_enormous_patch14_clip_224", "vit_small_patch14_dinov2", "vit_base_patch14_reg4_dinov2", "deit3_small_patch16_224",
    "vitamin_small_224", "vit_base_patch32_384", "vit_nano_patch4_32", "EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336",
    "EVA02-E-14", "EVA02-E-14-plus", "EVA01-g-14", "EVA01-g-14-plus", "ViTamin-S",
]
SLOW = ("giant", "enormous", "vitamin", "E-14", "g-14")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * any(s in n for s in SLOW)) for n in REAL])
def test_a_published_model_is_found_by_names_and_shapes(name: str) -> None:
    weights = meta(name)
    found = find(weights)
    assert (found.name, found.exact) == (name, True)
    with meta_device():
        assert {key: value.shape for key, value in found.build().state_dict().items()} == {k: v.shape for k, v in weights.items()}


@pytest.mark.parametrize(("name", "other", "how"), [
    ("ViT-B-32", "ViT-B-32-quickgelu", "class QuickGELU, not GELU"),
    ("ViT-L-14", "ViT-L-14-quickgelu", "class QuickGELU, not GELU"),
    ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "class QuickGELU, not GELU"),
    ("vit_base_patch16_224", "deit_base_patch16_224", "mean .0.485"),
    ("beit_base_patch16_224", "beitv2_base_patch16_224", "mean .0.485"),
    ("vit_base_patch16_gap_224", "vit_base_patch16_siglip_gap_224", "num_heads 12, not 16"),
])
def test_models_that_differ_where_shapes_do_not_are_listed(name: str, other: str, how: str) -> None:
    for one in (name, other):
        with pytest.raises(UserError, match=rf"--architecture: .*{name}, .*{other} \(.*{how}"):
            find(meta(one))
        assert find(meta(one), name=one).name == one


def test_the_norm_s_place_and_the_head_come_from_the_weights() -> None:
    """A pretrained trunk, a classifier of other classes; where two names compute the same, the one that needs less said."""
    trunk = find(meta("eva02_base_patch14_224", num_classes=0, global_pool="token"))
    line = "timm.create_model('eva02_base_patch14_224', num_classes=0, global_pool='token', checkpoint_path='FILE')"
    assert trunk.client() == line
    assert trunk.exact
    assert find(meta("eva02_base_patch14_224", num_classes=7)).arguments == {"num_classes": 7}
    tower = find(meta("eva_giant_patch14_224", num_classes=1024, global_pool="token"))
    assert (tower.name, tower.arguments) == ("eva_giant_patch14_clip_224", {"num_classes": 1024})


def test_another_input_size_is_an_argument_when_it_is_told() -> None:
    weights = meta("eva02_tiny_patch14_224", img_size=280, num_classes=0)
    found = find(weights, image_size=280)
    assert (found.arguments["img_size"], found.image_size, found.grid, found.exact) == (280, (280, 280), (20, 20), False)
    assert found.name == "eva02_tiny_patch14_224"
    flat = find(meta("eva02_tiny_patch14_224", img_size=(140, 560), num_classes=0), grid=(10, 40))
    assert (flat.image_size, flat.grid, flat.arguments["img_size"]) == ((140, 560), (10, 40), (140, 560))
    with pytest.raises(UserError, match=r"say --image-size N, or name .*--architecture eva02_tiny_patch14_224 .*num_heads=N"):
        find(weights)
    with pytest.raises(UserError, match=r"images of \(224, 224\), not|pos_embed"):
        find(weights, name="eva02_tiny_patch14_224", image_size=224)


@pytest.mark.parametrize(("reference", "argument"), [(16, None), (None, (32, 32)), (24, (24, 24))])
def test_rotary_tables_of_the_source_decide_on_the_reference(reference: int | None, argument: tuple[int, int] | None) -> None:
    rope = Rope(64, reference)
    found = find(meta("eva02_base_patch14_448"), rope=rope)
    assert (found.name, found.arguments.get("ref_feat_shape")) == ("eva02_base_patch14_448", argument)
    model: Any = timm.create_model(found.name, depth=1, **found.arguments)
    sin, cos = model.rope.get_embed().chunk(2, -1)
    wanted = rope_tables(rope, (32, 32))
    assert (cos - wanted[0]).abs().max() < 1e-5
    assert (sin - wanted[1]).abs().max() < 1e-5


def test_rotary_tables_of_the_source_decide_on_the_heads(shared: Path) -> None:
    """golden_eva02_s_mim has these shapes, but 3 heads of 32."""
    weights = from_eva(checkpoint(shared, "eva02_s_mim")[0]).weights
    assert find(weights, rope=Rope(32), grid=(8, 8)).name == "golden_eva02_s_mim"
    with pytest.raises(UserError, match="no registered architecture"):
        find(weights, rope=Rope(24), grid=(8, 8))
    other = find(weights, rope=Rope(24), grid=(8, 8), name="golden_eva02_s_mim", arguments={"num_heads": 4})
    assert other.arguments["num_heads"] == 4


@pytest.mark.parametrize("name", ["eva01_mim", "eva02_s_mim", "eva02_b_mim"])
@torch.no_grad()
def test_a_masked_model_s_trunk(shared: Path, name: str) -> None:
    """Its tokens, with mask tokens put in by hand."""
    state, golden, _ = checkpoint(shared, name)
    done = from_eva(state)
    found = find(done.weights, rope=done.rope, grid=(8, 8))
    assert found.exact
    assert found.name.startswith(f"golden_{name}")
    model: Any = found.build()
    model.load_state_dict(done.weights)
    hidden = golden["in/mask"].flatten(1)[..., None]
    model.patch_embed.register_forward_hook(lambda _, __, patches: torch.where(hidden, done.outside["mask_token"], patches))
    tokens = model.forward_features(golden["in/image"])
    assert (tokens[:, -golden["out/final_norm_tokens"].shape[1] :] - golden["out/final_norm_tokens"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["eva01_cls", "eva02_s_cls", "eva02_b_cls", "evaL_cls"])
@torch.no_grad()
def test_a_classifier_that_nobody_has_registered(shared: Path, unregistered: None, name: str) -> None:
    state, golden, facts = checkpoint(shared, name)
    """By the way out that the error names: one of its kind and its sizes."""
    done, large = from_eva(state), facts.get("large_img_size")
    with pytest.raises(UserError, match="no registered architecture") as error:
        find(done.weights, rope=done.rope, image_size=112)
    kind, *options = re.findall(r"--(?:architecture|argument) (\S+)", str(error.value))
    sized = {key: yaml.safe_load(value) for key, value in (item.split("=") for item in options)}
    told: dict[str, Any] = {"name": kind, "arguments": sized | {"num_heads": facts["constructor"]["num_heads"]}}
    sizes: list[tuple[str, int]] = [("", 112), *([("large_", large)] if large else [])]
    for prefix, size in sizes:
        weights, _ = resize_trunk(done.weights, (8, 8), (size // 14,) * 2, positions="original", kernel="bicubic")  # type: ignore[arg-type]
        found = find(weights, rope=done.rope, image_size=size, **told)
        model = found.build()
        model.load_state_dict(weights)
        assert not model.training
        assert (model(golden[f"in/{prefix}image"]) - golden[f"out/{prefix}logits"]).abs().max() < 1e-5


@torch.no_grad()
def test_relative_positions_tell_the_heads(shared: Path) -> None:
    state, golden, _ = checkpoint(shared, "eva01_relpos")
    tuned = below(golden, "finetune/")
    for weights, grid in ((from_eva(state).weights, (8, 8)), (from_eva(tuned).weights, (12, 12))):
        found = find(weights, grid=grid)
        assert found.name in ("golden_eva01_relpos", "golden_eva01_relpos_cls")
        assert found.grid == grid
        found.build().load_state_dict(weights)
    assert found.arguments["img_size"] == 168


@torch.no_grad()
def test_post_norm_is_what_the_user_says(shared: Path) -> None:
    """Names and shapes are those of a pre-norm tower."""
    state, golden, _ = checkpoint(shared, "clip_bige_visual")
    weights = from_eva(state).weights
    answers = []
    for post in (True, False):
        sizes = {"embed_dim": 84, "depth": 2, "num_heads": 4, "mlp_ratio": 720 / 84}
        found = find(weights, image_size=84, name="eva_giant_patch14_224", arguments=sizes | {"use_post_norm": post})
        model = found.build()
        model.load_state_dict(weights)
        answers.append(bool((model(golden["in/image"]) - golden["out/image_embed"]).abs().max() < 1e-5))
    assert answers == [True, False]


@torch.no_grad()
def test_openai_s_tower_in_timm_needs_its_activation(shared: Path) -> None:
    state, golden, _ = checkpoint(shared, "openai_visual")
    weights = openai_to_timm(state).weights
    with pytest.raises(UserError, match=r"vit_base_patch16_clip_quickgelu_224 .OpenAI's"):
        find(weights, image_size=112)
    sizes = {"embed_dim": 80, "depth": 2, "num_heads": 5}
    vision = {"width": 80, "layers": 2, "head_width": 16}
    beside = Description(open_clip={"model_cfg": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": {}}})
    ways: list[dict[str, Any]] = [
        {"name": "vit_base_patch16_clip_quickgelu_224", "arguments": sizes, "image_size": 112},
        {"described": beside, "image_size": 112},
    ]
    for told in ways:
        model: Any = find(weights, **told).build()
        model.load_state_dict(weights)
        patches = model.head(model.forward_features(golden["in/image"])[:, 1:])
        assert (patches - golden["out/dense_features"]).abs().max() < 2e-5


CLIPS = ["clip_eva02_b", "clip_eva01_g", "clip_eva01_b_layerscale"]


def clip_config(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    options = facts["constructor"]
    text = {key: options["text_cfg"][key] for key in ("context_length", "vocab_size", "width", "heads", "layers")}
    vision = {"timm_model_name": f"names_{name}", "timm_pool": "token", "timm_proj": None,
              "image_size": options["vision_cfg"]["image_size"]}
    return {"embed_dim": options["embed_dim"], "vision_cfg": vision, "text_cfg": text, "custom_text": True}


@pytest.mark.parametrize("name", CLIPS)
@torch.no_grad()
def test_a_clip_model(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the configuration beside it, then by open_clip's list; its tower by timm's."""
    state, golden, facts = checkpoint(shared, name)
    weights = from_eva(state).weights
    with pytest.raises(UserError, match=r"no model of open_clip .*open_clip_config.json.*trunks/small.py.*--to timm"):
        find(weights)
    config = clip_config(name, facts)
    beside = find(weights, described=Description(open_clip={"model_cfg": config, "more": 1}))
    assert (beside.name, beside.exact) == ("", False)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f"names-{name}", config)
    listed = find(weights)
    assert (listed.name, listed.exact, listed.config) == (f"names-{name}", True, config)
    assert find(weights, described=Description(open_clip={"model_cfg": config})) == listed
    for found in (beside, listed):
        model: Any = found.build()
        model.load_state_dict(weights)
        image, text, _ = model(golden["in/image"], golden["in/text"])
        assert (image - golden["out/image_features"]).abs().max() < 1e-5
        assert (text - golden["out/text_features"]).abs().max() < 1e-5
        assert found.image_size == tuple(golden["in/image"].shape[2:])
    tower = visual_trunk(weights).weights
    alone = find(tower)
    assert (alone.name, alone.exact) == (f"names_{name}", True)
    trunk = alone.build()
    trunk.load_state_dict(tower)
    assert (normalize(trunk(golden["in/image"]), dim=1) - golden["out/image_features"]).abs().max() < 1e-5
    with pytest.raises(UserError, match=r"image tower, below visual\.trunk\."):
        find({f"visual.trunk.{key}": value for key, value in tower.items()})


@torch.no_grad()
def test_the_lines_and_the_configurations_for_clients_work(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, golden, _ = checkpoint(shared, "eva02_b_cls")
    done = from_eva(state)
    found = find(done.weights, rope=done.rope, image_size=112)
    path = tmp_path / "model.safetensors"
    save_file(done.weights, path)
    (tmp_path / "config.json").write_text(json.dumps(found.timm_config(tuple("abc"))))
    again = find(done.weights, described=describe(tmp_path))
    assert again == found
    for model in (eval(found.client(str(path))), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        assert (model.eval()(golden["in/image"]) - golden["out/logits"]).abs().max() < 1e-5
    state, golden, facts = checkpoint(shared, "clip_eva02_b")
    weights = from_eva(state).weights
    config, folder = clip_config("clip_eva02_b", facts), tmp_path / "clip"
    folder.mkdir()
    save_file(weights, folder / "open_clip_model.safetensors")
    unnamed = find(weights, described=Description(open_clip={"model_cfg": config}))
    (folder / "open_clip_config.json").write_text(json.dumps(unnamed.open_clip_config()))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "names-clip", config)
    named = find(weights, name="names-clip").client(str(folder / "open_clip_model.safetensors"))
    for line in (named, unnamed.client(str(folder))):
        model = eval(line)[0]
        assert (model.eval().encode_image(golden["in/image"], normalize=True) - golden["out/image_features"]).abs().max() < 1e-5


def test_files_beside_the_source_decide_between_equal_shapes() -> None:
    config = {"architecture": "deit_base_patch16_224", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    found = find(meta("vit_base_patch16_224"), described=Description(config=config))
    assert (found.name, found.mean, found.std) == ("deit_base_patch16_224", (0.1, 0.2, 0.3), (1, 1, 1))
    other = find(meta("vit_base_patch16_224"), name="vit_base_patch16_224", described=Description(config=config))
    assert other.mean == (0.5, 0.5, 0.5)
    hub = Description(config={"model_type": "vit"}, preprocessor={"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert find(meta("vit_base_patch16_224"), described=hub).mean == (0.5, 0.5, 0.5)
    for act, name in (("quick_gelu", "ViT-B-32-quickgelu"), ("gelu", "ViT-B-32"), (None, "ViT-B-32-quickgelu")):
        clips = {"model_type": "clip", "vision_config": {"hidden_act": act} if act else {}, "text_config": {}}
        assert find(meta("ViT-B-32"), described=Description(config=clips)).name == name
    tower = Description(open_clip={"model_cfg": open_clip.get_model_config("EVA02-B-16")})
    assert find(meta("eva02_base_patch16_clip_224"), described=tower).name == "eva02_base_patch16_clip_224"
    stage = Description(record={"settings": {"student": {"name": "vit_nano_patch4_32", "image_size": 64, "patch_size": None}}})
    small = find(meta("vit_nano_patch4_32", img_size=64), described=stage)
    assert (small.name, small.arguments["img_size"]) == ("vit_nano_patch4_32", 64)
    net = meta("convnet_nano_32", num_classes=3)
    found = find_architecture(net, None, name="convnet_nano_32")
    assert (found.arguments, found.image_size, found.grid) == ({"num_classes": 3}, (32, 32), None)


def mistakes() -> Iterator[tuple[str, dict[str, Any], str]]:
    base, b16 = "eva02_tiny_patch14_224", "EVA02-B-16"
    yield base, {"name": "eva02_tiny_patch14_242"}, "--architecture: timm has no .*did you mean .*eva02_tiny_patch14_224"
    yield base, {"name": "hf-hub:somebody/model"}, "timm has no 'hf-hub:somebody/model'"
    yield base, {"name": "eva02_small_patch14_224"}, r"not those of eva02_small_patch14_224: 1\d\d of other shapes \(cls_token"
    yield base, {"name": base, "grid": (8, 30)}, r"1 of other shapes \(pos_embed \(1, 257, 192\), not \(1, 241, 192\)\)"
    yield base, {"name": base, "grid": (8, 32), "image_size": 224}, r"a grid of \(8, 32\), not \(16, 16\)"
    yield base, {"name": base, "rope": Rope(32)}, "6 heads, not 3"
    yield base, {"name": base, "arguments": {"num_haeds": 3}}, "timm cannot build .* with .*num_haeds=3: .*num_haeds"
    yield base, {"name": base, "arguments": {"depth": 7}}, "12 blocks, but depth=7"
    yield base, {"arguments": {"checkpoint_path": "/etc/passwd"}}, "--argument checkpoint_path: not a size or part"
    yield base, {"arguments": {"num_heads": 10**9}}, "num_heads: 1000000000 is out of bounds"
    yield b16, {"arguments": {"num_heads": 4}}, "--argument num_heads: open_clip's configurations have no place"
    yield b16, {"name": "EVA02-B-61"}, "open_clip has no 'EVA02-B-61'; did you mean EVA02-B-16"
    yield b16, {"name": "EVA02-L-14"}, "not those of EVA02-L-14: text width 768, not 512"
    yield b16, {"name": "ViT-B-16"}, "not those of ViT-B-16: image tower of timm False, not True"
    arguments: list[tuple[Any, str]] = [
        ({"pretrained": True}, "model_args.pretrained: not a size"), ({"depth": 10**9}, "out of bounds"),
        ({"depth": 60_000}, "12 blocks, but depth=60000"), ({"act_layer": {"a": 1}}, "not a plain value"),
        ({"img_size": [[1]]}, "not a plain value"), ({"embed_dim": -1}, "timm cannot build"),
        ({"norm_layer": "os.system"}, "timm cannot build"), ({"img_size": float("nan")}, "out of bounds"),
    ]
    for given, message in arguments:
        yield base, {"described": Description(config={"architecture": base, "model_args": given})}, message
    yield base, {"described": Description(config={"architecture": "../x"})}, "beside the source: timm has no '../x'"
    good = open_clip.get_model_config(b16)
    towers: list[tuple[Any, str]] = [
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "image tower hf-hub:a/b, not one that timm has"),
        ({"vision_cfg": {"timm_model_name": 5}}, "image tower 5, not one"), ({"vision_cfg": []}, "image tower of timm False"),
        ({"text_cfg": good["text_cfg"] | {"hf_model_name": "a/b"}}, "hf_model_name: text towers of transformers"),
        ({"text_cfg": good["text_cfg"] | {"layers": 60_000}}, "text layers 60000, not 12"),
        ({"vision_cfg": good["vision_cfg"] | {"code": 1}}, "open_clip cannot build .*'code'"),
        ({"embed_dim": "x"}, "open_clip cannot build"),
    ]
    for change, message in towers:
        yield b16, {"described": Description(open_clip={"model_cfg": good | change})}, message


@pytest.mark.parametrize(("name", "told", "message"), mistakes())
def test_a_mistake_is_told_without_building_anything_large(name: str, told: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(meta(name), **told)


def test_weights_of_no_family_need_a_name() -> None:
    with pytest.raises(UserError, match="name its timm model with --architecture"):
        find_architecture(meta("convnet_nano_32"), None)
    with pytest.raises(UserError, match="--architecture vitamin_small_224"):
        find({key: value for key, value in meta("vitamin_small_224").items() if not key.startswith("blocks.13.")}, image_size=224)
