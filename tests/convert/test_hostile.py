"""Files that are damaged, or made to do harm: each ends in one UserError, soon, in little memory, and leaves nothing behind."""

from __future__ import annotations

import functools
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

from eva_mim.core.errors import UserError
from eva_mim.weights.files.formats import MAX_TENSORS
from eva_mim.weights.files.read import open_checkpoint
from tests.conftest import REPOSITORY

TENSORS = {"a": torch.arange(300.0), "b.weight": torch.ones(2, 3), "b.bias": torch.zeros(3, dtype=torch.float16)}
SEED = 3


def make(path: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save({"model": TENSORS, "epoch": 3}, path)
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
    """When it is opened or its tensors are read: one line, in 10 seconds of the processor, and nothing new in the folder."""
    before, started = sorted(path.parent.rglob("*")), time.process_time()
    with pytest.raises(UserError, match=match) as caught:
        dict(open_checkpoint(path))
    assert time.process_time() - started < 10
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600
    assert sorted(path.parent.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_truncated_anywhere(tmp_path: Path, kind: str) -> None:
    content = make(tmp_path / "a.pt", kind).read_bytes()
    rng, cut = random.Random(SEED), tmp_path / "b.pt"
    for length in [0, 1, 4, 8, 9, 20, len(content) - 1, *rng.sample(range(len(content)), 40)]:
        cut.write_bytes(content[:length])
        refused(cut, "b.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
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


def test_a_file_of_torch_before_1_6_is_refused_with_a_way_on(tmp_path: Path) -> None:
    torch.save({"model": TENSORS}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "a.pt", "a.pt: in the format of torch before 1.6, which is not read; save it again with a newer torch")


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_runs_something_is_refused_by_name(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    commands = {"posix.system": (os.system, f"touch {witness}"), "builtins.eval": (eval, f"open({str(witness)!r}, 'w')"),
                "subprocess.check_output": (subprocess.check_output, ["touch", str(witness)])}
    for name, call in commands.items():
        path = tmp_path / "a.pt"
        torch.save({"model": TENSORS, "extra": Evil(*call)}, path, pickle_protocol=protocol)
        said = refused(path, f"asks for '{name}', which is refused")
        assert "safetensors.torch.save_file" in said
        assert not witness.exists()
        torch.load(path, weights_only=False)
        assert name == "builtins.eval" or witness.exists()  # the file is really evil
        witness.unlink(missing_ok=True)


def test_other_names(tmp_path: Path) -> None:
    refused(archive(tmp_path / "a.pt", b"\x80\x02c__torch__.clip\nCLIP\n."), "holds a Stub, not a state dict")
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
    refused(tmp_path / "b.pt", "declares 2147483648 bytes, more than the file has")
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
    ("{}", "18 bytes, but the header declares 10"),
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
    refused(header(tmp_path / "a.safetensors", "{" + ", ".join([one % 1] * (MAX_TENSORS + 1)) + "}"), "more than 300,000 tensors")
    path = tmp_path / "b.safetensors"
    path.write_bytes((600_000_000).to_bytes(8, "little") + b"{")
    os.truncate(path, 700_000_000)  # ten million names, as far as the file says
    refused(path, "a header of 600000000 bytes")


def limits() -> None:
    """2 GB, and a minute of the processor."""
    resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [
    ("zip", 40_000), *(pytest.param(*more, marks=pytest.mark.long) for more in (("safetensors", MAX_TENSORS), ("zip", 200_000))),
])
def test_as_many_tensors_as_allowed(tmp_path: Path, kind: str, count: int) -> None:
    """In a process of its own with limits."""
    path, numbers = tmp_path / "a", torch.arange(float(count))
    if kind == "zip":
        torch.save({f"blocks.{number}.weight": one.clone() for number, one in enumerate(numbers.split(1))}, path)
    else:
        one = '"blocks.%d.weight":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
        text = ",".join(one % (number, 4 * number, 4 * number + 4) for number in range(count))
        header(path, f"{{{text}}}", numbers.numpy().tobytes())
    code = (
        "import sys\nfrom eva_mim.weights.files.read import open_checkpoint\nopened = open_checkpoint(sys.argv[1])\n"
        "assert len(opened) == int(sys.argv[2]) and 'torch' not in sys.modules\n"
        "assert opened.entries['blocks.1234.weight'].shape == (1,)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(count)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=limits, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    assert open_checkpoint(path)["blocks.1234.weight"].item() == 1234


def module(inside: bytes, kind: bytes = b"M") -> bytes:
    """Instructions that make an instance of a TorchScript class and fill its attributes."""
    return b"c__torch__\n" + kind + b"\n)\x81}(" + inside + b"ub"


def name(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def script(path: Path, inside: bytes, code: bytes = b'class M(Module):\n  __parameters__ = ["a", ]\n', **places: bytes) -> Path:
    """A TorchScript archive around a pickle, with its code compressed as torch does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02" + inside + b".")
        file.writestr("m/constants.pkl", b"\x80\x02).")
        file.writestr("m/data/0", struct.pack("<4f", 1, 2, 3, 4))
        if code:
            file.writestr("m/code/__torch__.py", code, zipfile.ZIP_DEFLATED)
        for place, content in places.items():
            file.writestr(f"m/{place}", content, zipfile.ZIP_DEFLATED)
    return path


LEAF = name("a") + tensor(b"K\x01", b"K\x03\x85", b"K\x01\x85").partition(b"a")[2][:-2]
DEEP = functools.reduce(lambda inside, _: name("m") + module(inside), range(100), LEAF)
WIDE = functools.reduce(  # each holds the one before twice: 2 to the power of 60 names
    lambda inside, n: name("l") + module(inside) + b"q" + bytes([n]) + name("r") + b"h" + bytes([n]), range(60), LEAF
)


def test_the_hand_made_script_is_whole(tmp_path: Path) -> None:
    opened = open_checkpoint(script(tmp_path / "a.pt", module(LEAF + name("m") + module(LEAF) + name("x") + module(LEAF, b"X"))))
    assert {key: value.tolist() for key, value in opened.items()} == {"a": [2, 3, 4], "m.a": [2, 3, 4]}


@pytest.mark.parametrize(("inside", "match"), [
    (b"c__torch__\nM\n)\x81q\x00}(" + name("m") + b"h\x00ub", "modules inside modules without end"),
    (b"c__torch__\nM\n)\x81q\x00}(" + name("m") + b"h\x00" + name("n") + b"h\x00ub", "modules inside modules without end"),
    (module(DEEP), "modules inside modules without end"),
    (module(WIDE), "modules inside modules without end"),
    (module(b"K\x01" + module(b"")), "whose name is no text"),
    (module(name("x" * 501) + module(b"")), "longer than 500"),
    (module(name("m") + b"c__torch__.other\nM\n)\x81}(ub"), "the code of '__torch__.other', .* is missing"),
    (module(name("m") + b"cposix\nsystem\n)\x81"), "asks for 'posix.system'"),
    (module(b""), "holds tensors in: nothing"),
    (b"}", "holds a dict where its module should be"),
])
def test_hostile_scripts(tmp_path: Path, inside: bytes, match: str) -> None:
    refused(script(tmp_path / "a.pt", inside), match)


def test_bombs_in_a_script(tmp_path: Path) -> None:
    """Only code may be compressed, only what a module needs of it is read, and never more than is said."""
    assert len(open_checkpoint(script(tmp_path / "a.pt", module(LEAF), **{"code/x.py": bytes(50_000_000)}))) == 1
    refused(script(tmp_path / "a.pt", module(LEAF), bytes(70_000_000)), "a TorchScript program of more than 67,108,864 bytes")
    refused(script(tmp_path / "a.pt", module(LEAF), **{"data/1": bytes(50_000_000)}), "data/1' is compressed, which torch.save")
    content = bytearray(script(tmp_path / "a.pt", module(LEAF), b"#" * 50_000_000).read_bytes())
    where = content.rindex(b"PK\x01\x02")
    content[where + 24 : where + 28] = struct.pack("<L", 100)
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", "does not have its recorded size and checksum")
