"""Files that are damaged, or made to do harm: each ends in one UserError, soon, in little memory, and leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eva_mim.config import UserError
from eva_mim.convert.reading import open_checkpoint
from tests.conftest import REPOSITORY

TENSORS = {"a": torch.arange(300.0), "b.weight": torch.ones(2, 3), "b.bias": torch.zeros(3, dtype=torch.float16)}
SEED = 3


def make(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save({"model": TENSORS, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """What torch.save would write around a pickle of ours."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        for name, value in records.items():
            file.writestr(f"archive/data/{name.removeprefix('r')}", value)
    return path


def header(path: Path, text: str | bytes, data: bytes = b"") -> Path:
    text = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused(path: Path, match: str) -> str:
    """When it is opened or its tensors are read: one line, soon, and nothing new in the folder."""
    before, started = sorted(path.parent.rglob("*")), time.perf_counter()
    with pytest.raises(UserError, match=match) as caught:
        dict(open_checkpoint(path))
    assert time.perf_counter() - started < 10
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert sorted(path.parent.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_anywhere(tmp_path: Path, kind: str) -> None:
    content = make(tmp_path / "a.pt", kind).read_bytes()
    rng, cut = random.Random(SEED), tmp_path / "b.pt"
    for length in [0, 1, 4, 8, 9, 20, len(content) - 1, *rng.sample(range(len(content)), 40)]:
        cut.write_bytes(content[:length])
        refused(cut, "b.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_one_bit_flipped(tmp_path: Path, kind: str) -> None:
    """At 50 places anywhere and 50 in the descriptions. A zip has checksums: there no other value ever comes out."""
    content = make(tmp_path / "a.pt", kind).read_bytes()
    rng, flipped, ends = random.Random(SEED), tmp_path / "b.pt", 0
    places = [rng.randrange(8 * len(content)) for _ in range(50)] + [rng.randrange(8 * 300) for _ in range(50)]
    for place in places:
        wrong = bytearray(content)
        wrong[place // 8] ^= 1 << place % 8
        flipped.write_bytes(wrong)
        try:
            found = dict(open_checkpoint(flipped))
        except UserError:
            ends += 1
            continue
        if kind == "zip":
            assert found.keys() == TENSORS.keys()
            assert all(torch.equal(found[name], value) for name, value in TENSORS.items()), place
    assert ends > 30


@pytest.mark.parametrize(("content", "match"), [
    (b"", "empty"),
    (b"\x7fELF" + bytes(100), "neither a safetensors file nor"),
    (b"GGUF" + bytes(100), "neither"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "neither.*version"),
    (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    (b"PK\x03\x04" + bytes(200), "without its directory"),
    (b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + b"\xff" * 18, "damaged"),
])
def test_wrong_magic(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", match)


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_runs_something_is_refused_by_name(tmp_path: Path, protocol: int, legacy: bool) -> None:
    witness = tmp_path / "witness"
    commands = {"posix.system": (os.system, f"touch {witness}"), "builtins.eval": (eval, f"open({str(witness)!r}, 'w')"),
                "subprocess.check_output": (subprocess.check_output, ["touch", str(witness)])}
    for name, call in commands.items():
        path = tmp_path / "a.pt"
        torch.save({"model": TENSORS, "extra": Evil(*call)}, path, pickle_protocol=protocol,
                   _use_new_zipfile_serialization=not legacy)
        said = refused(path, f"asks for '{name}', which is refused")
        assert "safetensors.torch.save_file" in said
        assert not witness.exists()
        torch.load(path, weights_only=False)
        assert name == "builtins.eval" or witness.exists()  # the file is really evil
        witness.unlink(missing_ok=True)


def test_other_names(tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.pt", b"\x80\x02c__torch__.clip\nCLIP\n."), "TorchScript program.*torch.jit.load")
    refused(archive(tmp_path / "a.pt", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R."), "builtins.bytearray")
    refused(archive(tmp_path / "a.pt", b"\x80\x02cnumpy\ndtype\n)Rcposix\nsystem\nb."), "posix.system")
    refused(archive(tmp_path / "a.pt", b"\x80\x02K\x01K\x02\x85R."), "asks to call a int")


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuJ\x04\0\0\0tQ"


def tensor(offset: bytes, shape: bytes, stride: bytes) -> bytes:
    """A pickle of one tensor "a" in a storage of 4 floats."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + shape + stride + b"\x89)tR"
    return b"\x80\x02}X\x01\0\0\0a" + call + b"s."


FAR = b"\x8a\x07" + (2**50).to_bytes(7, "little")


@pytest.mark.parametrize(("content", "match"), [
    (tensor(b"K\x01", b"K\x04\x85", b"K\x01\x85"), "reaches behind its 4 stored elements"),
    (tensor(b"K\0", FAR + b"\x85", b"K\0\x85"), "larger than the file"),
    (tensor(b"K\0", FAR + b"\x85", b"K\x01\x85"), "reaches behind"),
    (tensor(b"K\0", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "not a list of sizes"),
    (tensor(b"K\0", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "not a list of sizes"),
    (tensor(b"K\0", b"K\x02K\x02\x86", b"K\x01\x85"), "without strides"),
    (b"\x80\x02}" + b"]" * 10 + b".", "holds a list, not a state dict"),
    (b"\x80\x02" + b")" + b"\x85" * 200_000 + b"q\x00}h\x00Ns.", "a tuple as the key of a dict"),
    (b"\x80\x02" + b")" + b"q\x00h\x00\x86" * 60 + b"}q\x01h\x01h\x00Ns.", "a tuple as the key of a dict"),
    (b"\x80\x02}" + b"2" * 5, "instruction 50"),
    (b"\x80\x02N" + b"r\xff\xff\xff\x7f.", "holds a NoneType"),
    (b"\x80\x02X\xff\xff\xff\x7fa.", "ends too early"),
    (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "more than 64 bits"),
    (b"\x80\x02cos.path\n" + b"x" * 2000 + b"\n.", "a global without an end"),
    (b"\x80\x02(K\x01K\x02K\x03K\x04K\x05tQ.", "stored tensor that is not supported"),
])
def test_hand_made_pickles(tmp_path: Path, content: bytes, match: str) -> None:
    refused(archive(tmp_path / "a.pt", content, r0=bytes(16)), match)


@pytest.mark.slow
def test_too_many_instructions(tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.pt", b"\x80\x02" + b"]" * 8_000_001 + b"."), "more than 8,000,000 pickle instructions")


def test_the_hand_made_tensor_is_whole(tmp_path: Path) -> None:
    """The form that is spoilt above is right."""
    path = archive(tmp_path / "a.pt", tensor(b"K\x01", b"K\x03\x85", b"K\x01\x85"), r0=struct.pack("<4f", 1, 2, 3, 4))
    assert open_checkpoint(path)["a"].tolist() == [2, 3, 4]


def test_zip_bombs(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", tensor(b"K\0", b"K\x04\x85", b"K\x01\x85"), zipfile.ZIP_DEFLATED, r0=bytes(50_000_000))
    assert path.stat().st_size < 100_000
    refused(path, "is compressed, which torch.save never does")
    content = bytearray(archive(tmp_path / "b.pt", pickle.dumps({}), r0=bytes(16)).read_bytes())
    where = content.rindex(b"PK\x01\x02")
    content[where + 20 : where + 28] = struct.pack("<2L", 2**31, 2**31)
    (tmp_path / "b.pt").write_bytes(content)
    refused(tmp_path / "b.pt", "says 2147483648 bytes, more than the file has")
    refused(archive(tmp_path / "c.pt", pickle.dumps({}, 2)), "which part shall be read. It holds tensors in: nothing")


def test_many_tensors_of_the_same_elements(tmp_path: Path) -> None:
    base = torch.zeros(10_000)
    torch.save({f"w{number}": base[: 10_000 - number] for number in range(100)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "more than 16 times as large as its")


@pytest.mark.parametrize(("text", "match"), [
    ("{", "damaged safetensors header"),
    ("[1]", "neither"),
    ('{"a": 1}', "damaged safetensors header"),
    ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "does not fit its shape"),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "does not fit its shape"),
    ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}', "not a number"),
    ('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "not a number"),
    ('{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', "X9"),
    ('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}', "does not fit its shape"),
    ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "truncated or damaged"),
    ("{" + '"a":[' * 100_000, "damaged safetensors header"),
    ('{"a": ' + "9" * 10_000 + "}", "damaged safetensors header"),
    ("{}", "18 bytes, but its header says 10"),
])
def test_hand_made_headers(tmp_path: Path, text: str, match: str) -> None:
    refused(header(tmp_path / "a.safetensors", text, bytes(8)), match)


@pytest.mark.parametrize("metadata", ["[1]", "3", '"x"', '{"a": [1]}', "null"])
def test_strange_metadata(tmp_path: Path, metadata: str) -> None:
    one = '"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
    opened = open_checkpoint(header(tmp_path / "a.safetensors", f'{{"__metadata__": {metadata}, {one}}}', bytes(4)))
    assert (opened["a"].item(), opened.facts) == (0.0, {})


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../b", "a\\b", "a\nb", "\x1b[2J", "", "x" * 501, "a//b"])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.zeros(1)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a tensor is named")
    save_file({name: torch.zeros(1)}, tmp_path / "b.safetensors")
    refused(tmp_path / "b.safetensors", "a tensor is named")


def test_too_many_tensors(tmp_path: Path) -> None:
    one = '"%d": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
    refused(header(tmp_path / "a.safetensors", "{" + ", ".join([one % 1] * 1_000_001) + "}"), "more than 1,000,000 tensors")
    path = tmp_path / "b.safetensors"
    path.write_bytes((600_000_000).to_bytes(8, "little") + b"{")
    os.truncate(path, 700_000_000)  # ten million names, as far as the file says
    refused(path, "a header of 600000000 bytes")


@pytest.mark.slow
def test_200_000_tensors_in_2_gigabytes(tmp_path: Path) -> None:
    """In a process of its own, whose memory is limited; a minute would be a hang (measured: 5.5 s)."""
    base = torch.arange(200_000.0)
    tensors = {f"blocks.{number}.weight": base[number : number + 1].clone() for number in range(len(base))}
    torch.save(tensors, tmp_path / "a.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    code = (
        "import sys\nfrom eva_mim.convert.reading import open_checkpoint\n"
        "opened = open_checkpoint(sys.argv[1])\nassert len(opened) == 200_000 and 'torch' not in sys.modules\n"
        "entry = opened.entries['blocks.1234.weight']\nassert entry.shape == (1,)\n"
    )
    for name in ("a.pt", "a.safetensors"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30)), check=False,
        )
        assert done.returncode == 0, done.stderr[-800:]
        assert open_checkpoint(tmp_path / name)["blocks.1234.weight"].item() == 1234
