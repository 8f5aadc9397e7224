"""A conversion: what goes in comes out bit for bit whatever the way, changes are those that were asked for, and failures leave
nothing behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.weights.files.read import open_checkpoint
from eva_mim.weights.names.eva import from_eva
from tests.convert.golden_files import (
    CLIPS,
    GOLDEN,
    clip_config,
    close,
    converted,
    golden,
    known_to_open_clip,
    same,
    tensors,
    written,
)


def opened(record: dict[str, Any]) -> Any:
    """timm's model, by the line of the record."""
    return eval(record["open_with"], {"timm": timm}).eval()


def left(folder: Path) -> set[str]:
    """Names of everything in a folder, hidden files too."""
    return {item.name for item in folder.iterdir()}


@pytest.fixture
def classifier(shared: Path, tmp_path: Path) -> Path:
    """eva02_b_cls: of 33 classes, 112 px, patches of 14; a registered architecture has its names and shapes."""
    return written(golden(shared, "eva02_b_cls"), tmp_path)


# containers


@pytest.mark.parametrize("name", GOLDEN)
def test_every_container_holds_the_same_tensors(shared: Path, tmp_path: Path, name: str) -> None:
    """Of every golden checkpoint; `module.` in front of names is what a data-parallel wrapper leaves."""
    for kind, (tree, container) in containers(golden(shared, name).state).items():
        path = tmp_path / kind
        save_file(tree, path) if kind == "flat" else torch.save(tree, path)
        found = open_checkpoint(path, container)
        assert found.container == ("bare" if kind == "flat" else kind)
        assert same(dict(found), golden(shared, name).state)


def containers(state: dict[str, Tensor]) -> dict[str, tuple[dict[str, Any], str | None]]:
    """By their name, (what holds a state dict, and others that are not meant, which container is asked for)."""
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    return {
        "bare": (state, None),
        "module": ({"module": state, "epoch": 1}, None),
        "model": ({"model": state, "model_ema": other, "optimizer": {"state": {}}}, None),
        "model_ema": ({"model": other, "model_ema": state}, "model_ema"),
        "state_dict": ({"state_dict": {f"module.{key}": value for key, value in state.items()}}, None),
        "mine": ({"mine": state, "model": other}, "mine"),
        "flat": (state, None),
    }


def test_the_container_that_is_asked_for_is_converted(shared: Path, tmp_path: Path, classifier: Path) -> None:
    state = golden(shared, "eva02_b_cls").state
    _, right = converted(classifier, "timm", tmp_path)
    for kind in ("model_ema", "state_dict"):
        tree, container = containers(state)[kind]
        torch.save(tree, tmp_path / f"{kind}.pt")
        record, dst = converted(tmp_path / f"{kind}.pt", "timm", tmp_path, container=container)
        assert record["source"]["container"] == kind
        assert dst.read_bytes() == right.read_bytes()
    with pytest.raises(UserError, match=r"no container 'model_ema'\. It holds tensors in: 'module'"):
        converted(classifier, "timm", tmp_path, container="model_ema", overwrite=True)


# there and back

OPENAI: dict[str, Any] = {
    "embed_dim": 24, "quick_gelu": True,
    "vision_cfg": {"image_size": 28, "patch_size": 7, "width": 48, "head_width": 12, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 90, "width": 32, "heads": 4, "layers": 2},
}
@pytest.mark.parametrize(("name", "journey"), [
    ("evaL_cls", ["timm", "hf", "eva", "safetensors", "timm", "safetensors", "eva", "hf", "timm"]),
    ("evaL_mae", ["timm", "hf", "eva", "timm"]),
    pytest.param("clip_eva02_b", ["open_clip", "hf", "eva", "safetensors", "open_clip", "safetensors", "eva", "hf", "open_clip"],
                 marks=pytest.mark.slow),
    ("openai", ["open_clip", "transformers", "hf", "eva", "safetensors", "transformers", "open_clip"]),
])
def test_a_journey_through_all_formats_ends_where_it_began(shared: Path, tmp_path: Path, name: str, journey: list[str]) -> None:
    """Each file is the source of the next."""
    config = OPENAI if name == "openai" else clip_config(golden(shared, name)) if name in CLIPS else {}
    with known_to_open_clip(tmp_path, **({"traveller": config} if config else {})):
        if name == "openai":
            here = tmp_path / "start.pt"
            torch.save({"state_dict": drawn(open_clip.create_model("traveller"))}, here)
        else:
            here = written(golden(shared, name), tmp_path)
        start = tensors(here)
        for number, to in enumerate(journey):
            (tmp_path / str(number)).mkdir()
            _, here = converted(here, to, tmp_path / str(number))
            assert same(tensors(here), start)


def drawn(module: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of which none is constant, at scales that keep outputs near 1; counts and integers stay."""
    noise, made = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, value in module.state_dict().items():
        draw = torch.randn(value.shape, generator=noise)
        scale = 1.2 / value[0].numel() ** 0.5 if value.ndim > 1 and "token" not in name and "pos" not in name else 0.2
        one = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
        made[name] = (1 + draw.abs() if "running_var" in name else scale * draw + one) if value.is_floating_point() else value
    return made


# changes


@pytest.mark.parametrize(("to", "dtype"), [
    ("timm", "float16"), ("timm", "float32"), ("eva", "float16"), ("eva", "bfloat16"), ("hf", "bfloat16"),
])
def test_dtype_rounds_floats_and_nothing_else(shared: Path, tmp_path: Path, to: str, dtype: str) -> None:
    found = golden(shared, "eva01_relpos")  # has tables of integers
    record, dst = converted(written(found, tmp_path), to, tmp_path, dtype=dtype)
    assert record["rules"]["dtype"] == dtype
    wide = from_eva(found.state).weights
    expected = {name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
                for name, value in (found.state if to == "eva" else wide).items()}
    file = dst / "model.safetensors" if to == "hf" else dst
    loaded = torch.load(file, weights_only=True)["module"] if to == "eva" else load_file(file)
    assert same(loaded, expected)
    assert torch.int64 in {value.dtype for value in loaded.values()} or to != "eva"


def test_counts_of_batch_norms_stay_whole_numbers(tmp_path: Path) -> None:
    """A convolutional network: of no family, so that its name is asked for."""
    torch.manual_seed(0)
    weights = {name: value.detach() for name, value in timm.create_model("convnet_nano_32").state_dict().items()}
    weights = {name: torch.tensor(70_001) if name.endswith("num_batches_tracked") else value for name, value in weights.items()}
    save_file(weights, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match="name its model with --architecture"):
        converted(tmp_path / "net.safetensors", "timm", tmp_path)
    record, dst = converted(tmp_path / "net.safetensors", "timm", tmp_path, architecture="convnet_nano_32", dtype="bfloat16")
    rounded = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
    assert same(load_file(dst), rounded)
    counts = {int(value) for name, value in opened(record).state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts == {70_001}


RULES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "timm": lambda image, size: F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False),
    "original": lambda image, size: F.interpolate(image, size, mode="bicubic", antialias=False, align_corners=False),
    "eva-clip": lambda image, size: F.interpolate(image, size, mode="bicubic", antialias=False, align_corners=True),
}


@pytest.mark.parametrize(("rule", "size"), [
    ("timm", (168, 168)), ("timm", (84, 84)), ("timm", (112, 168)), ("original", (84, 84)), ("eva-clip", (112, 168)),
])
def test_positions_are_resized_by_the_rule(shared: Path, tmp_path: Path, rule: str, size: tuple[int, int]) -> None:
    """Up, down, and to a rectangle. Nothing else changes."""
    found = golden(shared, "eva02_b_cls")
    record, dst = converted(written(found, tmp_path), "timm", tmp_path, image_size=size, positions=rule)
    table, grid = found.state["pos_embed"], (size[0] // 14, size[1] // 14)
    image = table[:, 1:].reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
    resized = RULES[rule](image, grid).permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    result = load_file(dst)
    close(result["pos_embed"], torch.cat([table[:, :1], resized], dim=1), 1e-6)
    before = from_eva(found.state).weights
    assert same(*({name: value for name, value in part.items() if name != "pos_embed"} for part in (result, before)))
    assert (tuple(record["image_size"]), tuple(record["grid"])) == (size, grid)
    assert record["keys"]["resized"] == ["pos_embed"]
    assert record["keys"]["reasons"]["pos_embed"] == f"[1, 65, 96] to [1, {1 + grid[0] * grid[1]}, 96], rule {rule}"
    assert record["rules"]["positions"] == rule
    model = opened(record)
    assert model(torch.zeros(1, 3, *size)).shape == (1, 33)
    assert len(record["answers_after_change"]) == 4
    assert all(0.5 < value < 1 for value in record["answers_after_change"])


@pytest.mark.parametrize("name", ["eva01_cls", "eva02_b_cls", "evaL_cls"])
@torch.inference_mode()
def test_a_larger_image_as_the_original_code_does_it(shared: Path, tmp_path: Path, name: str) -> None:
    """The fixtures' logits at 168 or 154 pixels."""
    found = golden(shared, name)
    side = found.facts["large_img_size"]
    record, _ = converted(written(found, tmp_path), "timm", tmp_path, name, image_size=(side, side),
                          grid=(8, 8), positions="original")
    model = opened(record)
    close(model(found.tensors["in/large_image"]), found.tensors["out/large_logits"], 1e-5)
    close(model.pos_embed, found.tensors["out/large_pos_embed"], 1e-5)


@pytest.mark.parametrize(("kind", "size"), [("large", (168, 168)), ("rect", (112, 168))])
@torch.inference_mode()
def test_a_teacher_s_larger_image(shared: Path, tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    found = golden(shared, "openai_visual")
    record, _ = converted(written(found, tmp_path), "timm", tmp_path, "openai_visual", image_size=size, grid=(8, 8),
                          positions="original")
    model = opened(record)
    tokens = model.forward_features(found.tensors[f"in/{kind}_image"])
    close(model.head(tokens[:, 1:]), found.tensors[f"out/{kind}_dense_features"], 1e-5)


def test_the_classifier_of_relative_positions_on_a_larger_grid(shared: Path, tmp_path: Path) -> None:
    """One table for all blocks, 8 x 8 to 12 x 12 patches: the reference's own result, before it is copied to each block."""
    found = golden(shared, "eva01_relpos")
    _, dst = converted(written(found, tmp_path), "timm", tmp_path, image_size=(168, 168))
    wanted = found.tensors["finetune/blocks.0.attn.relative_position_bias_table"]
    close(load_file(dst)["rel_pos_bias.relative_position_bias_table"], wanted, 1e-5)


@pytest.mark.parametrize("kernel", ["bicubic", "pseudo-inverse"])
def test_another_patch_size(shared: Path, tmp_path: Path, kernel: str) -> None:
    """14 to 16 pixels at 112: 7 x 7 patches. The pseudo-inverse answers to a resized picture as before."""
    found = golden(shared, "evaL_cls")
    record, dst = converted(written(found, tmp_path), "timm", tmp_path, patch_size=16, kernel=kernel)
    result, old = load_file(dst)["patch_embed.proj.weight"], found.state["patch_embed.proj.weight"]
    assert sorted(record["keys"]["resized"]) == ["patch_embed.proj.weight", "pos_embed"]
    assert record["grid"] == [7, 7]
    if kernel == "bicubic":
        close(result, F.interpolate(old, (16, 16), mode="bicubic", align_corners=False), 1e-6)
    else:
        patch = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(0))
        larger = F.interpolate(patch, (16, 16), mode="bicubic", antialias=True, align_corners=False)
        close(torch.einsum("dchw,nchw->nd", result, larger), torch.einsum("dchw,nchw->nd", old, patch), 1e-3)
    assert opened(record).patch_embed.proj.kernel_size == (16, 16)


@pytest.mark.parametrize("norm", ["copy", "drop"])
@torch.inference_mode()
def test_the_norm_of_a_masked_model_for_a_classifier(shared: Path, tmp_path: Path, norm: str) -> None:
    found = golden(shared, "eva02_s_mim")
    record, dst = converted(written(found, tmp_path), "timm", tmp_path, norm=norm)
    result, width = load_file(dst), 96
    assert "norm.weight" not in result
    new = {"fc_norm.weight": torch.ones(width), "fc_norm.bias": torch.zeros(width)}
    old = {f"fc_norm.{leaf}": found.state[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    assert same({name: result[name] for name in new}, new if norm == "drop" else old)
    keys = record["keys"]
    assert sorted(keys["new"]) == (sorted(new) if norm == "drop" else [])
    assert {"norm.weight", "norm.bias"} <= set(keys["ignored"]) or norm == "copy"
    model = opened(record)
    mean = model.forward_features(found.images)[:, 1:].mean(1)
    close(model(found.images), F.layer_norm(mean, (width,), result["fc_norm.weight"], result["fc_norm.bias"], 1e-6), 2e-5)


def test_a_clip_model_on_another_grid(shared: Path, tmp_path: Path) -> None:
    """open_clip has its tower at one size alone: the error says so. OpenAI's architecture takes any."""
    with known_to_open_clip(tmp_path, traveller=OPENAI):
        model = open_clip.create_model("traveller")
        weights = drawn(model)
        torch.save(weights, tmp_path / "small.pt")
        record, dst = converted(tmp_path / "small.pt", "hf", tmp_path, image_size=(42, 42), positions="timm")
    model.load_state_dict(weights)
    larger = open_clip.create_model(f"local-dir:{dst}")
    table = weights["visual.positional_embedding"]
    image = table[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    resized = RULES["timm"](image, (6, 6)).permute(0, 2, 3, 1).reshape(36, -1)
    close(larger.state_dict()["visual.positional_embedding"], torch.cat([table[:1], resized]), 1e-6)
    assert record["keys"]["resized"] == ["visual.positional_embedding"]


# the record


def test_the_record(shared: Path, tmp_path: Path, classifier: Path) -> None:
    record, dst = converted(classifier, "hf", tmp_path)
    record = json.loads(json.dumps(record))
    assert json.loads((dst / "convert.json").read_text()) == record
    assert record["source"] == {
        "path": str(classifier), "kind": "torch", "container": "module", "names": "eva",
        "tensors": len(golden(shared, "eva02_b_cls").state), "sha256": hashlib.sha256(classifier.read_bytes()).hexdigest(),
    }
    assert record["files"] == {f"{dst.name}/{name}": hashlib.sha256((dst / name).read_bytes()).hexdigest()
                               for name in ("config.json", "model.safetensors")}
    assert left(dst) == {"config.json", "model.safetensors", "convert.json"}
    assert record["architecture"] == {
        "library": "timm", "name": "golden_eva02_b_mim", "arguments": {"num_classes": 33}, "config": None,
    }
    assert (record["family"]["name"], record["family"]["width"], record["to"]) == ("EVA-02", 96, "hf")
    assert record["rules"] == {"positions": "timm", "kernel": "pseudo-inverse", "norm": "keep", "dtype": None}
    assert record["versions"]["timm"] == timm.__version__
    parity = record["parity"]["source and result"]
    assert (parity["passed"], parity["bound"], record["answers_after_change"]) == (True, 2e-5, None)
    assert parity["outputs"]["answer"]["shape"] == [4, 33]
    assert parity["outputs"]["answer"]["largest"] == 0
    assert left(tmp_path) == {classifier.name, dst.name}
    file_record, file = converted(classifier, "timm", tmp_path)
    assert json.loads((tmp_path / f"{file.name}.convert.json").read_text())["files"] == file_record["files"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    }


def test_the_same_conversion_gives_the_same_bytes(tmp_path: Path, classifier: Path) -> None:
    for to in ("timm", "eva"):
        first = converted(classifier, to, tmp_path)[1].read_bytes()
        assert converted(classifier, to, tmp_path, overwrite=True)[1].read_bytes() == first
