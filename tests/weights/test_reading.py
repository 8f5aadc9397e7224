"""Checkpoints of every kind, made here and read back: values equal, nothing read before it is asked for."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.core.files import write_json, write_weights
from eva_mim.core.run_folder import RunFolder
from eva_mim.run import checkpoints as snapshot
from eva_mim.weights.files.allowlist import HARMLESS
from eva_mim.weights.files.read import Checkpoint, open_checkpoint
from tests import tiny
from tests.ranks import on_ranks
from tests.weights import zero_run

WEIGHTS = {
    "cls_token": torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(1)),
    "blocks.0.norm.weight": torch.arange(6.0, dtype=torch.float16),
    "blocks.0.mlp.weight": torch.arange(12.0, dtype=torch.bfloat16).view(3, 4),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Names in order, dtypes, shapes and values."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name], value), name


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def test_a_torch_file_reads_as_torch_reads_it(tmp_path: Path) -> None:
    storage = torch.arange(20.0)
    hard = WEIGHTS | {
        "view": storage[3:9], "transposed": storage.view(4, 5).T, "expanded": storage[:1].expand(3, 2), "tied": storage[3:9],
        "parameter": torch.nn.Parameter(torch.ones(2)), "complex": torch.complex(storage[:2], storage[2:4]),
        "f8": storage[:3].to(torch.float8_e4m3fn).view(torch.uint8), "u16": torch.tensor([65535], dtype=torch.uint16),
    }
    path = saved(tmp_path / "a.pth", hard)
    opened = open_checkpoint(path)
    same(opened, torch.load(path, weights_only=True))
    assert opened.shapes() == {name: tuple(value.shape) for name, value in hard.items()}
    assert opened.dtypes()["blocks.0.mlp.weight"] == "bfloat16"
    assert (opened.kind, opened.container) == ("torch", "bare")


def test_a_tensor_is_its_reader_s_own(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", WEIGHTS)
    before = path.read_bytes()
    opened = open_checkpoint(path)
    opened["cls_token"].zero_()
    assert torch.equal(opened["cls_token"], WEIGHTS["cls_token"])
    assert path.read_bytes() == before


def test_containers(tmp_path: Path) -> None:
    """EVA's AMP layout with its pickled arguments, which weights_only refuses."""
    old, new = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    tree = {
        "model": old, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 9, "scaler": {}, "model_ema": new,
        "args": argparse.Namespace(model="eva_g_patch14", input_size=224, out=Path("/x"), lr=float("nan")),
        "best": np.float64(0.5), "array": np.arange(3), "counts": Counter("ab"),
    }
    path = saved(tmp_path / "checkpoint-9.pth", tree)
    with pytest.raises(Exception, match="Unsupported global"):
        torch.load(path, weights_only=True)
    opened = open_checkpoint(path)
    assert (opened.container, opened.containers) == ("model", ("model", "model_ema"))
    same(opened, old)
    same(open_checkpoint(path, "model_ema"), new)
    wanted = {"epoch": 9, "args.model": "eva_g_patch14", "args.input_size": 224, "args.lr": "nan"}
    assert {name: opened.facts[name] for name in wanted} == wanted
    with pytest.raises(UserError, match=r"no container 'state_dict'. It holds tensors in: 'model', 'model_ema'"):
        open_checkpoint(path, "state_dict")


def test_the_wrapper_s_prefix_is_left_out(tmp_path: Path) -> None:
    wrapped = {"state_dict": {f"module.{name}": value for name, value in WEIGHTS.items()}}
    same(open_checkpoint(saved(tmp_path / "epoch_1.pt", wrapped)), WEIGHTS)


def test_ema_alone_and_unknown_containers(tmp_path: Path) -> None:
    assert open_checkpoint(saved(tmp_path / "a.pt", {"model_ema": WEIGHTS})).container == "model_ema"
    assert open_checkpoint(saved(tmp_path / "b.pt", {"teacher": WEIGHTS, "epoch": 1})).container == "teacher"
    both = saved(tmp_path / "c.pt", {"teacher": WEIGHTS, "student": WEIGHTS})
    with pytest.raises(UserError, match=r"which part shall be read. It holds tensors in: 'teacher', 'student'"):
        open_checkpoint(both)
    same(open_checkpoint(both, "student"), WEIGHTS)
    mixed = open_checkpoint(saved(tmp_path / "d.pt", WEIGHTS | {"epoch": 3, "extra": None}))
    same(mixed, WEIGHTS)
    assert mixed.ignored == ("epoch", "extra")


def test_a_zip_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        same(open_checkpoint(saved(tmp_path / "a.pt", WEIGHTS)), WEIGHTS)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_protocols(tmp_path: Path, protocol: int) -> None:
    same(open_checkpoint(saved(tmp_path / "a.pt", {"model": WEIGHTS}, pickle_protocol=protocol)), WEIGHTS)


class Inner(torch.nn.Module):
    """All that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3).half())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("table", torch.randn(4, 2).T, persistent=False)
        self.register_parameter("none", None)
        self.plain, self.sizes, self.rates, self.name = torch.ones(3), [1, 2], {"a": 0.5}, "x"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum() + self.plain.sum() + self.table.sum() + self.count + self.sizes[0] + self.rates["a"]


class Outer(torch.nn.Module):
    """Modules in a list, one of them in two places, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        self.inner, self.again, self.tied = Inner(), self.layers[0], torch.nn.Linear(2, 2, bias=False)
        self.tied.weight = self.layers[1].weight
        self.norm = torch.nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.inner(self.again(self.tied(self.norm(x))))  # type: ignore[no-any-return]


def vit() -> torch.nn.Module:
    return VisionTransformer(img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2, num_classes=3).half()


def clip() -> torch.nn.Module:
    vision = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(16, vision, text, quick_gelu=True)  # type: ignore[arg-type]


IMAGES = torch.zeros(1, 3, 28, 28)


@pytest.mark.parametrize(("make", "inputs"), [
    (Outer, None), (Outer, (torch.ones(1, 2),)), (vit, (IMAGES.half(),)), (clip, (IMAGES, torch.zeros(1, 8, dtype=torch.long))),
])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript(tmp_path: Path, make: Callable[[], torch.nn.Module], inputs: tuple[Tensor, ...] | None) -> None:
    """Scripted and traced: the names and values of torch.jit.load's own state dict."""
    model = make().eval()
    program = torch.jit.script(model) if inputs is None else torch.jit.trace(model, inputs, check_trace=False)
    torch.jit.save(program, tmp_path / "a.pt", _extra_files={"note": "x" * 1000})
    wanted = torch.jit.load(tmp_path / "a.pt").state_dict()
    opened = open_checkpoint(tmp_path / "a.pt")
    assert (opened.kind, opened.container, opened.facts) == ("TorchScript", "bare", {})
    same(dict(sorted(opened.items())), dict(sorted(wanted.items())))
    assert wanted.keys() >= model.state_dict().keys()
    if make is Outer:
        assert wanted.keys() - model.state_dict().keys() == {"inner.table"}  # TorchScript saves all buffers


def test_safetensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "a.bin", metadata={"format": "pt"})  # told by content
    opened = open_checkpoint(tmp_path / "a.bin")
    assert (opened.kind, opened.facts) == ("safetensors", {"format": "pt"})
    same(dict(sorted(opened.items())), dict(sorted(load_file(tmp_path / "a.bin").items())))


def sharded(folder: Path) -> Path:
    folder.mkdir()
    names = list(WEIGHTS)
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: WEIGHTS[name] for name in part}, folder / f"model-{number}.safetensors")
    table = {name: f"model-{int(name in names[3:])}.safetensors" for name in names}
    index = folder / "model.safetensors.index.json"
    write_json(index, {"metadata": {"total_size": 1}, "weight_map": table})
    return index


def test_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path / "hf")
    same(open_checkpoint(index), WEIGHTS)
    opened = open_checkpoint(tmp_path / "hf")
    same(opened, WEIGHTS)
    assert opened.kind == "safetensors, 2 shards"
    (tmp_path / "hf" / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"the shard 'model-1.safetensors' is missing"):
        open_checkpoint(index)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "..", "x/../../a", "..\\a", 3])
def test_shards_stay_in_their_folder(tmp_path: Path, shard: Any) -> None:
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    index = sharded(tmp_path / "hf")
    tree = json.loads(index.read_text())
    tree["weight_map"]["steps"] = shard
    write_json(index, tree)
    with pytest.raises(UserError, match="outside its folder"):
        open_checkpoint(index)


def test_a_lost_tensor_of_an_index(tmp_path: Path) -> None:
    index = sharded(tmp_path / "hf")
    tree = json.loads(index.read_text())
    tree["weight_map"]["lost"] = "model-0.safetensors"
    write_json(index, tree)
    with pytest.raises(UserError, match=r"model-0.safetensors does not hold 'lost'"):
        open_checkpoint(index)


def test_only_headers_are_read(tmp_path: Path) -> None:
    """A file of 200 GB (on paper): opened at once, and one small tensor out of it."""
    shape, end = [50_000, 1_000_000], 200_000_000_000
    header = json.dumps({
        "big": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]},
    }).encode()
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(end, 1)
        file.write(np.array([3, 4], dtype="<f4").tobytes())
    opened = open_checkpoint(path)
    assert opened.shapes() == {"big": tuple(shape), "small": (2,)}
    assert opened["small"].tolist() == [3, 4]


def test_a_tensor_of_a_zip_is_touched_only_when_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.full((1000,), 1.5), "b": torch.ones(3)})
    content = path.read_bytes()
    where = content.index(torch.full((2,), 1.5).numpy().tobytes())
    path.write_bytes(content[:where] + b"\xff" + content[where + 1 :])
    opened = open_checkpoint(path)
    assert "a" in opened
    assert opened["b"].tolist() == [1, 1, 1]
    with pytest.raises(UserError, match="recorded checksum"):
        opened["a"]


def test_folders_of_weights(tmp_path: Path) -> None:
    """Ours: the trunk, unless another file is named."""
    head = {"lm_head.weight": torch.ones(2, 2)}
    write_weights(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    write_weights(tmp_path / "head.safetensors", head)
    opened = open_checkpoint(tmp_path)
    assert (opened.container, opened.containers, list(opened)) == ("model", ("head", "model"), ["a"])
    same(open_checkpoint(tmp_path, "head"), head)
    (tmp_path / "model.safetensors").rename(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"several weight files; name one: head.safetensors, x.safetensors"):
        open_checkpoint(tmp_path)
    same(open_checkpoint(tmp_path, "head"), head)
    save_file(WEIGHTS, tmp_path / "open_clip_model.safetensors")
    assert set(open_checkpoint(tmp_path)) == set(WEIGHTS)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint that is known here"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "x.pt")


def write_step(out: Path, step: int, value: Tensor) -> None:
    """A checkpoint with weights, a moment and an average."""
    parts = {name: snapshot.kept_here({"a": value + place}) for place, name in enumerate(("module", "exp_avg", "ema"))}
    tiny.save(out, step, parts, {}, keep_last=3)


def test_a_run_s_newest_whole_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_step(tmp_path, step, torch.full((2,), float(step)))
    broken = RunFolder(tmp_path).checkpoint(3)
    (broken / "exp_avg.safetensors").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert open_checkpoint(path)["a"].tolist() == [2, 2]
    assert open_checkpoint(RunFolder(tmp_path).checkpoint(1))["a"].tolist() == [1, 1]
    with pytest.raises(UserError, match="not whole"):
        open_checkpoint(broken)
    assert open_checkpoint(tmp_path, "ema")["a"].tolist() == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "frozen"), [(0, []), (1, []), (2, []), (3, []), (1, ["patch_embed"]), (2, ["patch_embed"])])
def test_deepspeed_s_own_checkpoints(tmp_path: Path, stage: int, frozen: list[str]) -> None:
    """Two real processes. Some parameters may be frozen."""
    on_ranks(2, zero_run.save, stage, tmp_path, *frozen)
    wanted = load_file(tmp_path / "wanted.safetensors")
    opened: Checkpoint = open_checkpoint(tmp_path / "engine")
    assert opened.kind == ("DeepSpeed ZeRO 0" if stage == 0 else f"DeepSpeed ZeRO {stage}, 2 ranks")
    same(dict(sorted(opened.items())), dict(sorted(wanted.items())))


def test_what_may_be_in_a_pickle_runs_nothing() -> None:
    """The list of harmless names holds no function that does anything but make its own value."""
    functions = {"_codecs.encode", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
                 "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
                 *(name for name in HARMLESS if name.startswith("torch.jit._pickle."))}  # stand for lists
    for name in HARMLESS - functions:
        module, _, leaf = name.rpartition(".")
        found = getattr(sys.modules.get(module), leaf, None)
        assert found is None or isinstance(found, type), name
