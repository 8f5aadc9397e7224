"""The whole command on files that are made to do harm: exit code 2 or a correct result, soon, in little memory.

Nothing is written but the result, and nothing is left behind (`hostile.ends`).
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_mim.commands.convert import main
from tests.convert.hostile import (
    CLIP_SIZES,
    VIT,
    clean,
    clip_folder,
    contents,
    ends,
    example,
    hub_folder,
    keywords,
    random_state,
    refused,
    timm_folder,
)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/../../x", "{home}/x", "..", "a\\b", "blocks.0/../x", "x" * 501, ""])
def test_names_of_tensors_that_lead_out(home: Path, name: str) -> None:
    weights = random_state("vit_tiny_patch16_224", num_classes=3, **VIT) | {name.format(home=home): torch.zeros(1)}
    save_file(weights, home / "source" / "a.safetensors")
    torch.save({"module": weights}, home / "source" / "a.pt")
    for file in ("a.safetensors", "a.pt"):
        for to in ("safetensors", "eva"):
            code, _ = ends(home, home / "source" / file, *keywords("vit_tiny_patch16_224", VIT), to=to)
            assert code == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["timm", "open_clip", "transformers"])
def test_values_that_are_no_numbers(home: Path, kind: str, value: float) -> None:
    source, options, to = example(kind, home / "source")
    weights = next(source.glob("*.safetensors"))
    state = load_file(weights)
    first = next(name for name in state if name.endswith(("norm1.weight", "ln_1.weight", "layernorm_before.weight")))
    everywhere = {name: torch.full_like(one, value) for name, one in state.items()}
    for wrong in (state | {first: everywhere[first]}, everywhere):
        save_file(wrong, weights, metadata={"format": "pt"})
        refused(home, source, "NaN or infinite", *options, to=to)


CODE = ["__import__('os').system('touch witness')", "os.system", "lambda: 0", "eval", "../../x", "hf-hub:x/y", "a" * 150]
NUMBERS = [10**9, 65536, 0, -1, 0.5, True, [9] * 1000, {"a": 1}, "x" * 1000, None, float("nan")]
ANYTHING = [*NUMBERS, *CODE]


@pytest.mark.parametrize("architecture", [
    "../../etc/passwd", "/etc/passwd", "hf-hub:x/y", "hf_hub:x/y", "local-dir:/etc", "https://x/y", "vit_tiny_patch16_224.",
    "vit_tiny_patch16_224.x", "a" * 10**6, "resnet50", "vitamin_small_224", "beit_base_patch16_224",
    "vit_tiny_patch16_224\n", "\0",
])
def test_names_of_architectures(home: Path, architecture: str) -> None:
    refused(home, timm_folder(home / "source" / "a", architecture=architecture), "error: ")
    refused(home, timm_folder(home / "source" / "b"), "error: ", "--architecture", architecture[:1000])


@pytest.mark.parametrize("changes", [
    *({key: NUMBERS} for key in (
        "depth", "embed_dim", "img_size", "patch_size", "num_heads", "reg_tokens", "mlp_ratio", "drop_rate",
    )),
    *({key: CODE} for key in ("act_layer", "norm_layer", "mlp_layer", "attn_layer", "block_fn", "weight_init", "embed_layer")),
    {"global_pool": CODE}, {"pretrained": [True]}, {"checkpoint_path": ["/etc/passwd"]}, {"cache_dir": ["/"]},
    {"pretrained_cfg": [{"url": "http://x"}]},
    {"pretrained_cfg_overlay": [{"file": "/etc/passwd"}]}, {"features_only": [True]}, {"scriptable": [True]}, {"no such": [1]},
], ids=lambda changes: next(iter(changes)))
def test_arguments_of_a_configuration(home: Path, changes: dict[str, list[Any]]) -> None:
    source = timm_folder(home / "source" / "a")
    for key, value in ((key, value) for key, values in changes.items() for value in values):
        configure(source / "config.json", {"model_args": VIT | {key: value}})
        ends(home, source)
        clean(home)


def configure(path: Path, changes: dict[str, Any]) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes", [
    *({key: NUMBERS} for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
                                 "patch_size", "num_channels", "layer_norm_eps", "model_type", "architectures", "id2label")),
    {"hidden_act": CODE}, {"auto_map": [{"AutoModel": "x--y.Z"}]}, {"attn_implementation": ["x/y"]}, {"_name_or_path": ["/etc"]},
    {"id2label": [{str(number): "x" for number in range(100_000)}]}, {"torch_dtype": ["eval"]},
], ids=lambda changes: next(iter(changes)))
def test_configurations_of_transformers(home: Path, changes: dict[str, list[Any]]) -> None:
    source = hub_folder(home / "source" / "a")
    for key, value in ((key, value) for key, values in changes.items() for value in values):
        configure(source / "config.json", {key: value})
        ends(home, source, *keywords("vit_tiny_patch16_224", VIT))
        clean(home)


UNREAD = [("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_tokenizer_name"), ("", "multimodal_cfg"), ("", "quick_gelu")]
"""Keys of open_clip's with which a model is converted whatever they say: three values, and the others in the long tier."""


@pytest.mark.parametrize(("tower", "key", "values"), [
    *(("vision_cfg", key, ANYTHING) for key in ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio",
                                                "pool_type", "patch_dropout", "timm_model_name")),
    *(("text_cfg", key, ANYTHING) for key in ("context_length", "vocab_size", "width", "heads", "layers", "pool_type",
                                              "hf_model_name")),
    *(("", key, ANYTHING) for key in ("embed_dim", "custom_text", "vision_cfg", "text_cfg")),
    *((tower, key, ANYTHING[::6]) for tower, key in UNREAD),
    *(pytest.param(*place, ANYTHING, marks=[pytest.mark.slow, pytest.mark.long]) for place in UNREAD),
], ids=lambda part: str(len(part)) if isinstance(part, list) else part)
def test_configurations_of_open_clip(home: Path, tower: str, key: str, values: list[Any]) -> None:
    source = clip_folder(home / "source" / "a")
    for value in values:
        changed = {tower: CLIP_SIZES[tower] | {key: value}} if tower else {key: value}
        configure(source / "open_clip_config.json", {"model_cfg": CLIP_SIZES | changed})
        ends(home, source, to="hf")
        clean(home)


@pytest.mark.parametrize("text", [
    b"[" * 10**5 + b"]" * 10**5, b'{"architecture":' * 10**5, b"", b"\0", b"\xff\xfe", b"[]", b"null", b"1e999",
    b'{"architecture": 1' + b"0" * 5000 + b"}", b'{"model_args": {"depth": ' + b"9" * 5000 + b"}}", b" " * 11_000_000,
    b'{"a": "' + b"x" * 11_000_000 + b'"}', b'{"model_type": "vit"}',
], ids=lambda text: text[:12].decode(errors="replace").strip() or "blank")
def test_configurations_that_are_none(home: Path, text: bytes) -> None:
    for make, name, to in ((timm_folder, "config.json", "timm"), (clip_folder, "open_clip_config.json", "hf")):
        source = make(home / "source" / name)
        (source / name).write_bytes(text)
        (source / "lineage.json").write_bytes(text)
        (source / "preprocessor_config.json").write_bytes(text)
        ends(home, source, to=to)
        clean(home)


def test_shards_and_links_that_lead_out(home: Path) -> None:
    secret = home / "here" / "secret.safetensors"
    save_file(random_state("vit_tiny_patch16_224", num_classes=3, **VIT), secret)
    source = timm_folder(home / "source" / "a")
    (source / "model.safetensors").unlink()
    index = source / "model.safetensors.index.json"
    for shard in ("../../here/secret.safetensors", str(secret), "..", "."):
        index.write_text(json.dumps({"weight_map": {"cls_token": shard}}))
        refused(home, source, "outside its folder" if shard != "." else "error", to="safetensors")
    index.unlink()
    for target in ("/dev/zero", "/dev/stdin", str(home), str(source), "nowhere", "model.safetensors", "/proc/self/mem"):
        for name in ("model.safetensors", "config.json"):
            (source / name).unlink(missing_ok=True)
            (source / name).symlink_to(target)
            ends(home, source, to="safetensors")
            clean(home)
            (source / name).unlink()
    os.mkfifo(source / "model.safetensors")
    refused(home, source, "no checkpoint", to="safetensors")


@pytest.mark.parametrize(("to", "name", "target"), [
    ("hf", "result", "kept"), ("timm", "result.safetensors", "kept/model.safetensors"), ("hf", "result", "nowhere"),
])
def test_a_link_in_the_place_of_the_result(home: Path, to: str, name: str, target: str) -> None:
    """What it points to is not touched."""
    source, kept = timm_folder(home / "source" / "a"), timm_folder(home / "here" / "kept")
    (kept / "convert.json").write_text("{}")
    (home / "out" / name).symlink_to(home / "here" / target)
    before = contents(home / "here")
    with redirect_stderr(io.StringIO()) as said, redirect_stdout(said):
        assert main([str(source), str(home / "out" / name), "--to", to, "--overwrite"]) in (0, 2)
    assert contents(home / "here") == before


def test_places_where_nothing_can_be_written(home: Path) -> None:
    source = timm_folder(home / "source" / "a")
    (home / "out" / "file").write_text("x")
    out = home / "out"
    for dst in (out / "file" / "r.safetensors", Path("/proc/r.safetensors"), out / ("x" * 300 + ".safetensors")):
        refused(home, source, "error: ", dst=dst)
    damaged = home / "source" / "b.safetensors"
    damaged.write_bytes((source / "model.safetensors").read_bytes()[:-1])
    refused(home, damaged, "error: ", dst=home / "out" / "new" / "deep" / "r.safetensors")
    state = load_file(source / "model.safetensors")
    save_file({name: value * torch.nan for name, value in state.items()}, source / "model.safetensors")
    refused(home, source, "NaN", dst=home / "out" / "new" / "deep" / "r.safetensors")


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_bombs(home: Path, record: str) -> None:
    path = home / "source" / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr(f"archive/{record}", bytes(200_000_000))
    refused(home, path, "error: ")
