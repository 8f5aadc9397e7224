"""A file has its name only when it is complete and on the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eva_mim.core.files import replacing, weights_sha256, write_json, write_text, write_weights
from eva_mim.core.log import RunLog

WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, ["new"]),
    "weights": lambda path: write_weights(path, {"new": torch.ones(2)}),
    "metrics": lambda path: RunLog(path.parent, 0).close(),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_on_the_disk_before_it_has_its_name(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, path = [], tmp_path / "metrics.jsonl"
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append(("flushed", os.fstat(number).st_ino)), fsync(number)))
    monkeypatch.setattr(
        Path, "replace", lambda old, new: (events.append(("named", old.stat().st_ino)), replace(old, new))[1]
    )
    WRITERS[kind](path)
    assert events == [("flushed", path.stat().st_ino), ("named", path.stat().st_ino)]
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["metrics.jsonl"]


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            assert temporary.parent == tmp_path
            raise KeyboardInterrupt

    def nothing() -> None:
        with replacing(path):
            pass

    for work, error in ((half, KeyboardInterrupt), (nothing, FileNotFoundError)):
        with pytest.raises(error):
            work()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path, writer=".host.1") as one, replacing(path, writer=".host.2") as two:
        one.write_text("1")
        two.write_text("2")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "1")]


def test_weights_come_back(tmp_path: Path) -> None:
    """A tensor that is a view, too."""
    write_weights(tmp_path / "w", {"a": torch.arange(6.0).reshape(2, 3).T})
    assert torch.equal(load_file(tmp_path / "w")["a"], torch.arange(6.0).reshape(2, 3).T)


def test_weights_are_hashed_by_name_and_value() -> None:
    """Of bytes as they lie in memory: bf16, views, scalars and empty tensors, too; and not of their order."""
    weights = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(2.0, dtype=torch.bfloat16), "c": torch.empty(0)}
    said = b"a" + b"\x00\x40" + b"b" + torch.tensor([0.0, 3, 1, 4, 2, 5]).numpy().tobytes() + b"c"
    assert weights_sha256(weights) == hashlib.sha256(said).hexdigest()
    assert weights_sha256(dict(reversed(weights.items()))) == weights_sha256(weights)
    assert weights_sha256({**weights, "c": torch.zeros(1)}) != weights_sha256(weights)
