"""The whole command on files that are damaged, or made to do harm: exit code 2 or a correct result, soon, in little memory.

Nothing is written but the result, and nothing is left behind (`hostile.ends`).
"""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_mim.commands.convert import main
from eva_mim.weights.names.eva import from_eva
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

KINDS = ["safetensors", "zip", "timm", "open_clip", "transformers"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_are_whole(home: Path, kind: str) -> None:
    source, options, to = example(kind, home / "source")
    code, text = ends(home, source, *options, to=to)
    assert code == 0, text


def parts(source: Path) -> list[Path]:
    return [path for path in sorted(source.iterdir()) if path.is_file()] if source.is_dir() else [source]


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_anywhere(home: Path, kind: str) -> None:
    source, options, to = example(kind, home / "source")
    for path in parts(source):
        whole = path.read_bytes()
        for length in [0, 1, 8, 9, len(whole) - 1, *random.Random(3).sample(range(len(whole)), 8)]:
            path.write_bytes(whole[:length])
            code, text = ends(home, source, *options, to=to)
            assert code == 2 or path.suffix == ".json", text  # a JSON file may end with a line break that nothing needs
            clean(home)
        path.write_bytes(whole)


def flip(home: Path, kind: str, seeds: range) -> None:
    """Half of the bits in the first and last 1500 bytes of a file, where headers, directories and JSON are."""
    source, options, to = example(kind, home / "source")
    right = from_eva(torch.load(source, weights_only=True)["module"]).weights if kind == "zip" else {}
    refusals = 0
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choice(parts(source))
        whole = path.read_bytes()
        wrong = bytearray(whole)
        wrong[rng.randrange(rng.choice([len(whole), min(len(whole), 1500)])) * rng.choice([1, -1])] ^= 1 << rng.randrange(8)
        path.write_bytes(wrong)
        code, _ = ends(home, source, *options, to=to)
        refusals += code == 2
        if kind == "zip" and code == 0:  # it has checksums: no other value ever comes out
            found = load_file(home / "out" / "result.safetensors")
            assert found.keys() == right.keys(), seed
            assert all(torch.equal(found[name], value) for name, value in right.items()), seed
        path.write_bytes(whole)
        clean(home)
    assert refusals > len(seeds) / 10


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_flipped(home: Path, kind: str) -> None:
    flip(home, kind, range(40))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_flipped_at_more_places(home: Path, kind: str) -> None:
    flip(home, kind, range(40, 240))


def test_one_bit_of_a_tensor_in_a_zip(home: Path) -> None:
    source, options, to = example("zip", home / "source")
    whole = source.read_bytes()
    for value in torch.load(source, weights_only=True)["module"].values():
        if value.numel() > 4:
            wrong = bytearray(whole)
            wrong[whole.index(value.numpy().tobytes()) + 5] ^= 16
            source.write_bytes(wrong)
            refused(home, source, "checksum", *options, to=to)


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
    for number, (key, value) in enumerate((key, value) for key, values in changes.items() for value in values):
        ends(home, timm_folder(home / "source" / f"a{number}", model_args=VIT | {key: value}))
        clean(home)


@pytest.mark.parametrize("changes", [
    *({key: NUMBERS} for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
                                 "patch_size", "num_channels", "layer_norm_eps", "model_type", "architectures", "id2label")),
    {"hidden_act": CODE}, {"auto_map": [{"AutoModel": "x--y.Z"}]}, {"attn_implementation": ["x/y"]}, {"_name_or_path": ["/etc"]},
    {"id2label": [{str(number): "x" for number in range(100_000)}]}, {"torch_dtype": ["eval"]},
], ids=lambda changes: next(iter(changes)))
def test_configurations_of_transformers(home: Path, changes: dict[str, list[Any]]) -> None:
    for number, (key, value) in enumerate((key, value) for key, values in changes.items() for value in values):
        ends(home, hub_folder(home / "source" / f"a{number}", **{key: value}), *keywords("vit_tiny_patch16_224", VIT))
        clean(home)


@pytest.mark.parametrize(("tower", "key"), [
    *(("vision_cfg", key) for key in ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "pool_type",
                                      "patch_dropout", "timm_model_name", "timm_model_pretrained")),
    *(("text_cfg", key) for key in ("context_length", "vocab_size", "width", "heads", "layers", "pool_type",
                                    "hf_model_name", "hf_tokenizer_name")),
    ("", "embed_dim"), ("", "quick_gelu"), ("", "custom_text"), ("", "vision_cfg"), ("", "multimodal_cfg"), ("", "text_cfg"),
])
def test_configurations_of_open_clip(home: Path, tower: str, key: str) -> None:
    for number, value in enumerate([*NUMBERS, *CODE]):
        changed = {tower: CLIP_SIZES[tower] | {key: value}} if tower else {key: value}
        ends(home, clip_folder(home / "source" / f"a{number}", CLIP_SIZES | changed), to="hf")
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
