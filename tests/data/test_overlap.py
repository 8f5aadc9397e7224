"""No source trains on what it holds out."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_mim.core.errors import UserError
from eva_mim.data import DataSettings
from eva_mim.data.overlap import hashes
from eva_mim.data.sources.index import Texts
from eva_mim.data.splits import open_splits
from tests.conftest import make_folder, make_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number, name in enumerate(("train-0.tar", "train-1.tar", "test-0.tar")):
        make_shards(tmp_path, name, first=6 * number, captions=False)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    return tmp_path


def opened(root: Path, **settings: Any) -> tuple[int, int]:
    splits = open_splits(DataSettings.model_validate({"root": root, **settings}))
    return len(splits.train), len(splits.val)


def refused(root: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(root, **settings)
    return str(error.value)


def test_shards(shards: Path) -> None:
    own = {"source": "shards", "classes": "classes.txt"}
    assert opened(shards, **own, train="train-*", val="test-*") == (12, 6)
    for train, val, names in ((None, "test-*", "test-0.tar"), ("*.tar", "test-*", "test-0.tar"),
                              ("train-*", "train-*", "train-0.tar, .*train-1.tar"), ("train-*", "t*-1.tar", "train-1.tar")):
        said = refused(shards, **own, train=train, val=val)
        assert "data.train and data.val share" in said
        assert all(name.strip(" .*") in said for name in names.split(","))
        assert "what is held out would be trained on" in said
    said = refused(shards, **own)
    assert "has test-0.tar beside other shards" in said
    assert "data.train='train-*'" in said
    assert opened(shards, **own, train="*.tar*", val_share=0.25) == (14, 4)  # as the message says
    for path in shards.glob("train-*"):
        path.unlink()
    assert opened(shards, **own, val_share=0.5) == (3, 3)  # all are called so: nothing tells them apart


def test_a_link_to_a_shard_is_the_shard(shards: Path) -> None:
    (shards / "held.tar").symlink_to(shards / "train-1.tar")
    assert "share" in refused(shards, source="shards", classes="classes.txt", train="train-*", val="held.tar")


def test_folders(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a": 6, "train/b": 4, "holdout/a": 3, "holdout/b": 2})
    assert opened(tmp_path, train="train", val="holdout") == (10, 5)
    for val in ("train", "./train/../train"):
        assert f"data.train and data.val share {tmp_path / 'train'}:" in refused(tmp_path, train="train", val=val)
    (tmp_path / "again").symlink_to(tmp_path / "train")
    assert "share" in refused(tmp_path, train="train", val="again")


def test_a_class_folder_with_the_name_of_a_split_is_asked_about(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 4, "dog": 4, "test": 4})
    said = refused(tmp_path)
    assert "has a sub-folder 'test' beside others" in said
    assert opened(tmp_path, train=".", val_share=0.5) == (6, 6)  # as the message says
    make_folder(tmp_path / "fine", {"tests": 4, "value": 4, "devil": 4})
    assert opened(tmp_path / "fine", val_share=0.5) == (6, 6)


def test_other_datasets_and_mixtures(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", {"a": 6})
    make_folder(tmp_path / "two", {"a": 8})
    one, two = ({"root": str(tmp_path / name), "val_share": 0.5} for name in ("one", "two"))
    with pytest.raises(UserError, match=rf"data\.train and data\.held_out share {tmp_path / 'one'}:"):
        open_splits(DataSettings.model_validate({"root": tmp_path / "one", "held_out": {"root": tmp_path / "one"}}))
    assert len(open_splits(DataSettings.model_validate({"mixture": [one, two]})).val) == 7
    with pytest.raises(UserError, match=r"data\.mixture\.0\.train and data\.mixture\.1\.val share"):
        open_splits(DataSettings.model_validate({"mixture": [one, one]}))


def test_lists(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", {"a": 40})
    (tmp_path / "other").mkdir()
    names = [f"images/a/{number:05d}.png" for number in range(40)]
    lists = {"train.csv": names[:30], "val.csv": names[30:], "mixed.csv": names[29:], "other/moved.csv": ["../" + names[3]],
             "other/apart.csv": ["../" + names[33]], "dots.csv": ["./" + names[2]], "twice.csv": ["images//a/00004.png"],
             "back.csv": ["images/b/../a/00005.png"], "fine.csv": ["./images/b/../a/00035.png"]}
    for name, rows in lists.items():
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([["image"], *([row] for row in rows)])
    own = {"source": "list", "columns": {"image": "image"}, "train": "train.csv"}
    assert opened(tmp_path, **own, val="val.csv") == (30, 10)
    assert opened(tmp_path, **own, val="other/apart.csv") == (30, 1)
    assert f"share {names[29]}:" in refused(tmp_path, **own, val="mixed.csv")
    assert f"share {names[3]}:" in refused(tmp_path, **own, val="other/moved.csv")
    assert f"share {names[0]}, {names[1]}, {names[2]}, {names[3]} and 26 more:" in refused(tmp_path, **own, val="train.csv")
    for spelled, name in (("dots.csv", names[2]), ("twice.csv", names[4]), ("back.csv", names[5])):
        (tmp_path / "images" / "b").mkdir(exist_ok=True)
        assert f"share {name}:" in refused(tmp_path, **own, val=spelled)
        assert f"share {name}:" in refused(tmp_path, **own | {"train": spelled}, val="train.csv")
    assert opened(tmp_path, **own, val="fine.csv") == (30, 1)
    said = refused(tmp_path, **own, held_out={"root": str(tmp_path / "images")})
    assert "data.train and data.held_out share" in said


def test_hashes_are_those_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, in pieces of any size, with empty texts; 100,000 paths that differ in one digit have as many hashes."""
    texts = ["", "a", "b", "ab", "ba", "", "ä/ö", "x" * 300]
    column = Texts()
    for text in texts:
        column.add(text)
    columns = column.columns("t")
    by_hand = [sum((byte + 1) * 0x100000001B3**place for place, byte in enumerate(text.encode(), 1)) % 2**64 for text in texts]
    for chunk in (1, 3, 8, 100):
        monkeypatch.setattr("eva_mim.data.overlap.CHUNK", chunk)
        assert hashes(columns["t"], columns["t.ends"]).tolist() == by_hand
    monkeypatch.undo()
    many = Texts()
    for number in range(100_000):
        many.add(f"n{number // 1000:05d}/n{number:08d}.JPEG")
    columns = many.columns("t")
    assert len(np.unique(hashes(columns["t"], columns["t.ends"]))) == 100_000
