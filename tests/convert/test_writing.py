"""Files that are written tensor by tensor, read by the libraries they are meant for."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eva_mim.core.errors import UserError
from eva_mim.weights.files import write as writing
from eva_mim.weights.files.lazy import Deferred, deferred
from eva_mim.weights.files.read import open_checkpoint
from eva_mim.weights.files.write import FLOATING, write_safetensors, write_torch
from tests.conftest import REPOSITORY

DRAWN = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
WEIGHTS = {
    "odd": torch.arange(3, dtype=torch.uint8), "matrix": DRAWN, "turned": DRAWN.T, "part": DRAWN[1:, ::2],
    "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False, True]), "count": torch.tensor(-7), "half": DRAWN.half(),
    "bf16": DRAWN.bfloat16(), "double": DRAWN.double(), "complex": torch.complex(DRAWN, DRAWN), "é \"quoted\"": DRAWN[0],
    "f8": DRAWN.to(torch.float8_e4m3fn), "f8 wide": DRAWN.to(torch.float8_e5m2), "u16": torch.tensor([65535], dtype=torch.uint16),
    "parameter": torch.nn.Parameter(DRAWN), "i16": torch.arange(-3, 3).short(),
}
WRITERS: list[Callable[..., None]] = [write_safetensors, write_torch]


def bits(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, tuple(value.shape), value.detach().reshape(-1).contiguous().view(torch.uint8).tolist()


def same(found: Any, wanted: dict[str, Tensor]) -> None:
    assert {name: bits(found[name]) for name in found} == {name: bits(value) for name, value in wanted.items()}


def test_safetensors_are_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, WEIGHTS, metadata={"name": "é", "format": "np"})
    same(load_file(path), WEIGHTS)
    same(open_checkpoint(path), WEIGHTS)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"name": "é", "format": "pt"}
    save_file({name: value.clone().contiguous() for name, value in WEIGHTS.items()}, tmp_path / "b", metadata={"format": "pt"})
    assert abs(path.stat().st_size - (tmp_path / "b").stat().st_size) < 100
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("container", [None, "model"])
def test_torch_files_are_what_torch_reads(tmp_path: Path, container: str | None) -> None:
    path = tmp_path / "a.pt"
    write_torch(path, WEIGHTS, container=container)
    for options in ({}, {"mmap": True}):
        tree = torch.load(path, weights_only=True, **options)
        assert list(tree) == (list(WEIGHTS) if container is None else ["model"])
        found = tree if container is None else tree["model"]
        same(found, WEIGHTS)
        assert all(value.is_contiguous() and not value.requires_grad for value in found.values())
    opened = open_checkpoint(path)
    assert opened.container == (container or "bare")
    same(opened, WEIGHTS)
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        assert archive.testzip() is None
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            assert (record.header_offset + 30 + name + extra) % 64 == 0
            assert record.compress_type == zipfile.ZIP_STORED
        size = sum(value.nbytes for value in WEIGHTS.values())
        assert path.stat().st_size < size + writing.RECORD * (len(WEIGHTS) + 4)


def test_one_tensor_under_many_names_is_stored_once(tmp_path: Path) -> None:
    table = torch.arange(1000.0)
    weights = {f"blocks.{number}.table": table for number in range(20)} | {"other": table.clone()}
    write_torch(tmp_path / "a.pt", weights)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    same(found, weights)
    assert len({id(value) for value in found.values()}) == 2
    assert 2 * table.nbytes < (tmp_path / "a.pt").stat().st_size < 4 * table.nbytes
    write_safetensors(tmp_path / "a.safetensors", weights)
    same(load_file(tmp_path / "a.safetensors"), weights)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_floating_tensors_alone_are_cast(tmp_path: Path, write: Callable[..., None], dtype: str) -> None:
    write(tmp_path / "a", WEIGHTS, dtype=dtype)
    kind = getattr(torch, dtype)
    same(open_checkpoint(tmp_path / "a"), {n: v.to(kind) if v.is_floating_point() else v for n, v in WEIGHTS.items()})


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_takes_the_place_of_the_one_it_is_read_from(tmp_path: Path, write: Callable[..., None]) -> None:
    torch.save({"model": {"a": DRAWN, "b": DRAWN[0]}}, tmp_path / "a")
    weights = deferred(open_checkpoint(tmp_path / "a"))
    write(tmp_path / "a", {"a": weights["a"].T, "c": torch.stack([weights["b"], weights["b"]])})
    same(open_checkpoint(tmp_path / "a"), {"a": DRAWN.T, "c": DRAWN[:1].expand(2, -1)})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def failing(error: BaseException) -> Tensor:
    def read() -> Tensor:
        raise error

    return Deferred(torch.empty(3, device="meta"), read)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), UserError("damaged"), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")]
)
def test_nothing_is_left_behind(tmp_path: Path, write: Callable[..., None], error: BaseException) -> None:
    (tmp_path / "a").write_text("older")
    with pytest.raises((KeyboardInterrupt, UserError), match=r"damaged|needs [\d,]+ bytes|cannot be written: broken|^$"):
        write(tmp_path / "a", {"a": DRAWN, "b": failing(error), "c": DRAWN})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "older")]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk(tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen before anything is read or written; or at the very end."""
    zeros = Deferred(torch.empty(10**6, device="meta"), lambda: torch.zeros(10**6))
    weights = {f"{number}": zeros + number for number in range(3)}
    free = shutil.disk_usage(tmp_path)._replace(free=11_999_999)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(UserError, match=r"needs 12,00\d,\d+ bytes, but 11,999,999 are free in .*; make room"):
            write(tmp_path / "a", {**weights, "last": failing(AssertionError())})
        write(tmp_path / "half", weights, dtype="float16")

    def flush(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(UserError, match=r"needs 12,00\d,\d+ bytes"):
        write(tmp_path / "a", weights)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    for write in WRITERS:
        with pytest.raises(UserError, match=r"dtype: 'fp16' is none of float64, float32, float16"):
            write(tmp_path / "a", WEIGHTS, dtype="fp16")
        with pytest.raises(UserError, match=r"cannot be written: No such file"):
            write(tmp_path / "none" / "a", WEIGHTS)
        with pytest.raises(UserError, match=r"x: tensors of type float8_e4m3fnuz cannot be written"):
            write(tmp_path / "a", {"x": DRAWN.to(torch.float8_e4m3fnuz)})
    with pytest.raises(UserError, match=r"wide: tensors of type complex128 cannot be written"):
        write_safetensors(tmp_path / "a", {"wide": DRAWN.to(torch.complex128)})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("write", ["write_torch", pytest.param("write_safetensors", marks=pytest.mark.long)])
def test_400_megabytes_in_100_of_memory(tmp_path: Path, write: str) -> None:
    """What a conversion adds to the memory that its imports took. (ru_maxrss would count what pytest had before.)"""
    path = tmp_path / "a.safetensors"
    save_file({f"blocks.{number}.weight": torch.full((2**11, 2**10), float(number)) for number in range(48)}, path)
    code = (
        "import sys\nfrom pathlib import Path\nfrom eva_mim.weights import resize\n"
        "from eva_mim.weights.files import lazy, read, write\n"
        "peak = lambda: print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "peak()\n"
        "weights = lazy.deferred(read.open_checkpoint(sys.argv[1]))\n"
        "weights = {name: (value * 2).T for name, value in weights.items()}\n"
        f"write.{write}(Path(sys.argv[1] + '.new'), weights, dtype='float32')\n"
        "peak()\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    plain, busy = map(int, subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.split())
    assert path.stat().st_size > 400e6
    assert 1024 * (busy - plain) < 100e6
    found = open_checkpoint(f"{path}.new")
    assert found.shapes()["blocks.47.weight"] == (2**10, 2**11)
    assert found["blocks.47.weight"].unique().tolist() == [94]
