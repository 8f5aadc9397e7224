"""Files that ask for more than anyone has: in processes of their own, with a minute of the processor and 2 GB each."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from open_clip.model import CLIP

from eva_mim.trunks.meta import meta_device
from eva_mim.weights.files.formats import MAX_HEADER, MAX_TENSORS
from tests.convert.hostile import CLIP_SIZES, MEMORY, SECONDS, VIT, clip_folder, contents, keywords, timm_folder
from tests.ranks import Launched, script, zygote

pytestmark = pytest.mark.slow
SERVER = f"""
import io, json, os, resource, sys, time
from contextlib import redirect_stderr, redirect_stdout
from eva_mim.commands.convert import main
import eva_mim.convert.convert
for words in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if not (child := os.fork()):
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + {SECONDS}, used + {SECONDS}))
        resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
        with redirect_stderr(io.StringIO()) as said, redirect_stdout(said):
            try:
                code = main(words)
            except BaseException as error:
                code = repr(error)[:300]
        os.write(write, json.dumps([code, said.getvalue()[:500]]).encode())
        os._exit(0)
    os.close(write)
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([*json.loads(os.read(read, 10**5) or '["killed", ""]'), usage.ru_maxrss * 1024]), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def _zygote() -> None:
    """Started before `home` says where temporary files are to lie."""
    zygote()
    forkserver.ensure_running()


def limited(home: Path, runs: dict[str, list[str]]) -> dict[str, tuple[Any, str]]:
    """(exit code or what went wrong, what was said) of each run, in a process of its own with limits; nothing is left behind."""
    before = contents(home)
    with tempfile.NamedTemporaryFile(mode="r", dir=home.parent) as said:
        assert Launched(script, SERVER, json.dumps(list(runs.values())), log=said.name).wait(400) == 0, said.read()[-2000:]
        lines = said.read().splitlines()
    found = {}
    for name, line in zip(runs, lines, strict=True):
        code, text, peak = json.loads(line)
        found[name] = (code if peak < MEMORY else f"{peak:,} bytes", text)
    after = contents(home)
    killed = [name for name, (code, _) in found.items() if code == "killed"]
    assert killed or {path: kind for path, kind in after.items() if "/out/" not in path} == before
    return found


def sparse(path: Path, model: torch.nn.Module) -> None:
    """A safetensors file of zeros that takes no place on the disk."""
    header, end = {}, 0
    for name, value in model.state_dict().items():
        start, end = end, end + value.nbytes
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


@pytest.mark.parametrize("networks", [
    {"vit_tiny_patch16_224": "depth"},
    pytest.param({"convnext_tiny": "depths", "resnet50": "layers", "coat_tiny": "serial_depths"}, marks=pytest.mark.long),
])
def test_networks_of_any_depth(home: Path, networks: dict[str, str]) -> None:
    """Of architectures whose keywords for it have other names."""
    runs = {}
    for architecture, key in networks.items():
        depth = 65536 if key == "depth" else [65536] * 4
        source = timm_folder(home / "source" / architecture, architecture=architecture, model_args={key: depth})
        runs[architecture] = [str(source), str(home / "out" / f"{architecture}.safetensors"), "--to", "timm"]
    assert {name: found for name, found in limited(home, runs).items() if found[0] != 2} == {}


def test_weights_that_fit_a_model_that_nobody_can_run(home: Path) -> None:
    """Some megabytes at most whose tokens, tables or images would take minutes or terabytes."""
    trunks: dict[str, tuple[str, dict[str, Any]]] = {
        "tokens": ("vit_tiny_patch16_224", {"patch_size": 1, "img_size": 256}),
        "many tokens": ("vit_tiny_patch16_224", {"patch_size": 1, "img_size": 1024}),
        "rotary tables": ("eva02_base_patch14_224", {"patch_size": 1, "img_size": 1024}),
        "registers": ("vit_tiny_patch16_224", {"reg_tokens": 65536}),
        "indices": ("beit_base_patch16_224", {"patch_size": 1, "img_size": 256}),
        "pixels": ("vit_tiny_patch16_224", {"patch_size": 8192, "img_size": 8192}),
    }
    runs = {}
    for name, (architecture, changes) in trunks.items():
        arguments = VIT | changes | {"num_classes": 0}
        folder = home / "source" / name
        folder.mkdir()
        with meta_device():
            sparse(folder / "model.safetensors", timm.create_model(architecture, **arguments))
        (folder / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": arguments}))
        runs[name] = [str(folder), str(home / "out" / f"{name}.safetensors"), "--to", "timm"]
    for name, changes in {"context": {"context_length": 60000}, "words": {"vocab_size": 65536}}.items():
        sizes = CLIP_SIZES | {"text_cfg": CLIP_SIZES["text_cfg"] | changes}
        with meta_device():
            model = CLIP(**sizes)
        folder = clip_folder(home / "source" / name, sizes)
        sparse(folder / "open_clip_model.safetensors", model)
        runs[name] = [str(folder), str(home / "out" / name), "--to", "hf"]
    assert {name: found for name, found in limited(home, runs).items() if found[0] not in (0, 2)} == {}


@pytest.mark.parametrize("form", ["blocks.%d.norm1.weight", pytest.param("%d", marks=pytest.mark.long)])
def test_as_many_names_as_are_read_and_more(home: Path, form: str) -> None:
    one = '"' + form + '":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    paths = {count: home / "source" / f"{count}.safetensors" for count in (MAX_TENSORS, MAX_TENSORS + 1)}
    for count, path in paths.items():
        text = ("{" + ",".join(one % (number, 4 * number, 4 * number + 4) for number in range(count)) + "}").encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + 4 * count)
    endless = home / "source" / "endless.safetensors"
    some = (",".join(one % (number, 0, 0) for number in range(100_000)) + ",").encode()
    endless.write_bytes(struct.pack("<Q", MAX_HEADER) + b"{" + some * (MAX_HEADER // len(some)))
    os.truncate(endless, 8 + MAX_HEADER)
    words = ["--to", "safetensors"]
    most, more = (str(path) for path in paths.values())
    runs = {"alone": [most, str(home / "out" / "a"), *words],
            "named": [most, str(home / "out" / "b"), *words, *keywords("vit_tiny_patch16_224", VIT)],
            "more": [more, str(home / "out" / "c"), *words],
            "endless": [str(endless), str(home / "out" / "d"), *words]}
    found = limited(home, runs)
    assert {name: code for name, (code, _) in found.items()} == dict.fromkeys(runs, 2)
    assert "a model has at most 100,000" in found["alone"][1]
    assert all("more than 300,000 tensors" in found[name][1] for name in ("more", "endless"))
