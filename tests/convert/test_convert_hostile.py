"""The whole command on files that are damaged, or made to do harm: exit code 2 or a correct result, soon, in little memory; nothing
is written but the result, and nothing is left behind."""

from __future__ import annotations

import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor

from eva_mim.convert.command import main
from eva_mim.convert.names import from_eva, to_eva
from eva_mim.convert.tables import Rope
from tests.conftest import REPOSITORY

SECONDS, MEMORY = 10, 2 * 2**30
VIT: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}
EVA02: dict[str, Any] = VIT | {"ref_feat_shape": 2, "num_classes": 0}
CLIP_SIZES: dict[str, Any] = {
    "embed_dim": 8, "quick_gelu": True,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
}
PIXELS = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3}
ATTEMPTS: list[Any] = []
"""To reach the network."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All that a run could touch: source and result, the working folder, HOME, the temporary folder. No network."""

    def refuse(*given: Any, **_: Any) -> None:
        ATTEMPTS.append(given)
        raise OSError("no network")

    for name in ("source", "out", "here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    torch.manual_seed(0)
    yield tmp_path
    assert ATTEMPTS == []


def contents(folder: Path) -> dict[str, Any]:
    """Every path, with what it holds."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (
            os.readlink(path) if path.is_symlink() else "folder" if path.is_dir()
            else path.read_bytes() if status.st_size < 10_000_000 else (status.st_size, status.st_mtime_ns)
        )
    return found


def resident(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))


def ends(home: Path, source: Path, *options: str, to: str = "timm", dst: Path | None = None) -> tuple[int, str]:
    """(exit code, what was said) of one run that kept all promises."""
    dst = dst or home / "out" / ("result.pt" if to == "eva" else "result.safetensors" if to in ("timm", "open_clip") else "result")
    before, said = contents(home), io.StringIO()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    at_first, started = resident("VmRSS"), time.process_time()
    with redirect_stderr(said), redirect_stdout(said):
        code = main(["--to", to, *options, "--", str(source), str(dst)])
    assert time.process_time() - started < SECONDS
    assert resident("VmHWM") - at_first < MEMORY
    after, text = contents(home), said.getvalue()
    if code:
        assert (code, text[:7]) == (2, "error: ")
        assert {path: kind for path, kind in after.items() if before.get(path) != kind} == {}
        assert after.keys() == before.keys()
    else:
        mine = (str(dst), f"{dst}.convert.json")
        assert all(after.get(path) == kind for path, kind in before.items() if not path.startswith(mine))
        assert all(path in before or path in mine or path.startswith(f"{dst}/") for path in after)
    return code, text


def refused(home: Path, source: Path, match: str, *options: str, **more: Any) -> None:
    code, text = ends(home, source, *options, **more)
    assert code == 2, text
    assert match in text
    assert len(text) < 3000


def clean(home: Path) -> None:
    for path in sorted((home / "out").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def random_state(name: str, **arguments: Any) -> dict[str, Tensor]:
    return {key: torch.randn_like(value) for key, value in timm.create_model(name, **arguments).state_dict().items()}


def keywords(architecture: str, arguments: dict[str, Any]) -> list[str]:
    given = [f"--argument={key}={value}" for key, value in arguments.items() if key != "num_classes"]
    return [f"--architecture={architecture}", *given]


def timm_folder(folder: Path, weights: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir()
    save_file(weights or random_state("vit_tiny_patch16_224", num_classes=3, **VIT), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": VIT, "pretrained_cfg": PIXELS} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def clip_folder(folder: Path, sizes: dict[str, Any] = CLIP_SIZES, weights: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir()
    state = weights or {key: torch.randn_like(value) for key, value in CLIP(**CLIP_SIZES).state_dict().items()}
    save_file(state | {"logit_scale": torch.tensor(1.0)}, folder / "open_clip_model.safetensors")
    pixels = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": pixels}))
    return folder


def hub_folder(folder: Path, **changes: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    settings = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
                                      patch_size=4, num_labels=3, layer_norm_eps=1e-6)
    transformers.ViTForImageClassification(settings).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


def original() -> dict[str, Tensor]:
    """EVA-02 under the original names, with rotary tables."""
    state = random_state("eva02_base_patch14_224", **EVA02)
    return {key: value.clone() for key, value in to_eva(state, grid=(2, 2), rope=Rope(4, 2)).weights.items()}


def example(kind: str, folder: Path) -> tuple[Path, list[str], str]:
    """(a whole checkpoint, options, target)."""
    if kind == "safetensors":
        save_file(random_state("vit_tiny_patch16_224", num_classes=3, **VIT), folder / "a.safetensors")
        return folder / "a.safetensors", keywords("vit_tiny_patch16_224", VIT), "hf"
    if kind in ("zip", "legacy"):
        torch.save({"module": original(), "epoch": 3}, folder / "a.pt", _use_new_zipfile_serialization=kind == "zip")
        return folder / "a.pt", keywords("eva02_base_patch14_224", EVA02), "timm" if kind == "zip" else "eva"
    if kind == "timm":
        return timm_folder(folder / "a"), [], "safetensors"
    if kind == "open_clip":
        return clip_folder(folder / "a"), [], "hf"
    return hub_folder(folder / "a"), [], "timm"


KINDS = ["safetensors", "zip", "legacy", "timm", "open_clip", "transformers"]


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
    right = from_eva(original()).weights.keys()
    wanted = None
    outcomes = [0, 0]
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choice(parts(source))
        whole = bytearray(path.read_bytes())
        near = rng.choice([len(whole), min(len(whole), 1500)])
        at = rng.randrange(near) * rng.choice([1, -1])
        whole[at] ^= 1 << rng.randrange(8)
        kept, _ = path.read_bytes(), path.write_bytes(whole)
        code, _ = ends(home, source, *options, to=to)
        outcomes[code // 2] += 1
        path.write_bytes(kept)
        if kind == "zip" and code == 0:  # it has checksums: no other value ever comes out
            if wanted is None:
                wanted = dict(load_file(home / "out" / "result.safetensors"))
            found = load_file(home / "out" / "result.safetensors")
            assert found.keys() == right
            given = from_eva(torch.load(source, weights_only=True)["module"]).weights
            assert all(torch.equal(found[name], given[name]) for name in right), seed
        clean(home)
    assert outcomes[1] > 0


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


CODE = ["__import__('os').system('touch witness')", "os.system", "lambda: 0", "eval", "../../x", "hf-hub:x/y", "a" * 150]


@pytest.mark.parametrize(("architecture", "match"), [
    ("../../etc/passwd", "timm has no"), ("/etc/passwd", "timm has no"), ("hf-hub:x/y", "timm has no"), ("hf_hub:x/y", "timm has no"),
    ("local-dir:/etc", "timm has no"), ("https://x/y", "timm has no"), ("vit_tiny_patch16_224.", "timm"), ("", "error"),
    ("a" * 10**6, "timm has no"), ("resnet50", "error"), ("vit_tiny_patch16_224\n", "timm has no"), ([], ""), (10**400, ""), (None, ""),
])
def test_names_of_architectures(home: Path, architecture: Any, match: str) -> None:
    source = timm_folder(home / "source" / "a", architecture=architecture)
    code, text = ends(home, source)
    assert match in text
    assert code == 2 or not isinstance(architecture, str)
    for words in (("--architecture", str(architecture)[:1000]),):
        assert ends(home, timm_folder(home / "source" / "b", architecture="vit_tiny_patch16_224"), *words)[0] == 2


@pytest.mark.parametrize("changes", [
    *({key: value} for key in ("depth", "embed_dim", "img_size", "patch_size", "num_heads", "reg_tokens")
      for value in (10**9, 65536, 0, -1, 0.5, True, [9] * 1000, {"a": 1}, "x" * 1000, None)),
    *({key: value} for key in ("act_layer", "norm_layer", "mlp_layer", "attn_layer", "block_fn", "weight_init", "global_pool", "embed_layer")
      for value in CODE),
    {"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"cache_dir": "/"}, {"pretrained_cfg": {"url": "http://x"}},
    {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}, {"features_only": True}, {"scriptable": True}, {"no such": 1},
    {f"a{number}": 1 for number in range(10000)},
])
def test_arguments_of_a_configuration(home: Path, changes: dict[str, Any]) -> None:
    source = timm_folder(home / "source" / "a", model_args=VIT | changes)
    ends(home, source)


@pytest.mark.parametrize(("architecture", "arguments"), [
    ("convnext_tiny", {"depths": [65536] * 4}), ("resnet50", {"layers": [65536] * 4}), ("swin_tiny_patch4_window7_224", {"depths": [65536] * 4}),
    ("swin_tiny_patch4_window7_224", {"window_size": 4096, "img_size": 65536}), ("maxvit_tiny_rw_224", {"img_size": 65536}),
    ("efficientnet_b0", {"channel_multiplier": 65536.0, "depth_multiplier": 65536.0}), ("mixer_s16_224", {"num_blocks": 65536}),
    ("beit_base_patch16_224", {"img_size": 65536}), ("vit_base_patch16_224", {"depth": 65536}), ("crossvit_tiny_240", {"img_scale": [65536] * 2}),
    ("vitamin_small_224", {"img_size": 65536}), ("tnt_s_patch16_224", {"depth": 65536}), ("coat_tiny", {"serial_depths": [65536] * 4}),
])
def test_networks_of_any_size(home: Path, architecture: str, arguments: dict[str, Any]) -> None:
    """Of other architectures, whose keywords for the depth have other names."""
    source = timm_folder(home / "source" / "a", architecture=architecture, model_args=arguments)
    assert ends(home, source)[0] == 2
