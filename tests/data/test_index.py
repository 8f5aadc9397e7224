"""The index of a data set: what it says, when it is made again, who makes it, and what it costs a worker."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from eva_mim.cli import main
from eva_mim.core import distributed
from eva_mim.core.errors import UserError
from eva_mim.core.settings import digest
from eva_mim.data import DataSettings
from eva_mim.data.source_settings import ColumnSettings
from eva_mim.data.sources import folder as folder_module
from eva_mim.data.sources import shards as shards_module
from eva_mim.data.sources.decode import SUFFIXES
from eva_mim.data.sources.folder import FolderSource
from eva_mim.data.sources.index import Content, Index, Texts, cache_folder, read_index, write_index
from eva_mim.data.sources.lists import open_list
from eva_mim.data.sources.shards import ShardSource
from eva_mim.data.splits import open_splits
from eva_mim.data.subset import Complement, Subset
from tests.conftest import make_folder, make_shards, picture, png, write_tar
from tests.ranks import on_ranks
from tests.tiny import write_recipe

TREE = ["b/2.png", "b/10.PNG", "b.png", "b-1/x.jpg", "a/c/d/e.webp", "a/c.png", "a/c-d.png", "ü/é ñ.jpeg", "z/y.bmp",
        "a.b/c.tif"]
OTHERS = ["b/2.txt", "b/notes", "z/.png", "a/c/list.csv"]


def settle(root: Path) -> None:
    """Let the tree be an hour old: an index of folders that changed just now is not trusted."""
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, (os.stat(folder).st_mtime - 3600,) * 2)


def keys(source: FolderSource | ShardSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def made(capsys: pytest.CaptureFixture[str]) -> int:
    """How many indexes were made since the last call."""
    return capsys.readouterr().err.count("  indexed ")


# ---- what it says


def test_a_tree_is_listed_as_pathlib_sorts_it(tmp_path: Path) -> None:
    for name in TREE + OTHERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()  # not an image
    found = [path for path in sorted(tmp_path.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    expected = [path.relative_to(tmp_path).as_posix() for path in found]
    assert sorted(expected) == sorted(TREE)
    source = FolderSource(tmp_path, None)
    assert keys(source) == expected
    assert source.fingerprint == digest(expected)
    assert list(source.stems()) == [path.relative_to(tmp_path).with_suffix("").as_posix() for path in found]


def test_names_that_are_no_text_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(png(picture(3)))
    source = FolderSource(tmp_path, None)
    assert source.key(0) == name
    assert source.read(0).image.tobytes() == picture(3).tobytes()


def test_images_beside_class_folders_are_strangers(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1, "": 2, "b": 1})
    with pytest.raises(UserError, match=r": 00000\.png, 00001\.png: not among the 2 training classes"):
        FolderSource(tmp_path, ("a", "b"))


def test_texts_of_any_kind_come_back(tmp_path: Path) -> None:
    given = ["", "a", "é\n", "", "\udce9", "\ud800", "𝄞" * 9, ""]
    texts = Texts()
    for text in given:
        texts.add(text)
    index = write_index(tmp_path / "x.index", _content(texts))
    assert index.texts("t") == given
    assert index["t.ends"].dtype == np.uint32


def _content(texts: Texts, fingerprint: str = "one") -> Content:
    return Content(texts.columns("t"), {"fingerprint": fingerprint})


# ---- when it is made again


def test_a_folder_is_walked_again_only_when_it_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"a/deep": 2, "b": 1})
    settle(tmp_path)
    first = keys(FolderSource(tmp_path, None))
    assert made(capsys) == 1
    assert keys(FolderSource(tmp_path, None)) == first
    assert made(capsys) == 0
    for change in ("a/deep/new.png", "a/empty/", "b/other.png"):
        if change.endswith("/"):
            (tmp_path / change).mkdir()
        else:
            (tmp_path / change).write_bytes(png(picture(0)))
        expected = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
        assert keys(FolderSource(tmp_path, None)) == expected
        assert made(capsys) == 1
    (tmp_path / "a/deep/00000.png").unlink()
    assert len(FolderSource(tmp_path, None)) == len(expected) - 1


def test_a_change_within_the_clock_of_the_file_system_is_seen(tmp_path: Path) -> None:
    """The folder keeps its time, as with a file that came in the same tick as the walk."""
    make_folder(tmp_path, {"": 1})
    assert len(FolderSource(tmp_path, None)) == 1
    before = tmp_path.stat().st_mtime_ns
    (tmp_path / "more.png").write_bytes(png(picture(1)))
    os.utime(tmp_path, ns=(before, before))
    assert len(FolderSource(tmp_path, None)) == 2


def test_a_rewritten_shard_is_read_again_and_the_others_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make_shards(tmp_path, f"x-{number}.tar", first=3 * number, count=3) for number in range(3)]
    names = tuple("abc")
    first = ShardSource(paths, names)
    assert made(capsys) == 1
    assert ShardSource(paths, names).fingerprint == first.fingerprint
    assert made(capsys) == 0
    times = {path.name: path.stat().st_mtime_ns for path in cache_folder().iterdir()}
    make_shards(tmp_path, "x-1.tar", first=100, count=4)
    second = ShardSource(paths, names)
    assert made(capsys) == 1
    assert len(second) == 10
    assert [second.read(index).image.tobytes() for index in (2, 3, 6, 7)] == [picture(n).tobytes() for n in (2, 100, 103, 6)]
    assert second.fingerprint != first.fingerprint
    changed = [path for path in cache_folder().iterdir() if times.get(path.name) != path.stat().st_mtime_ns]
    assert len(changed) == 2  # of this shard, and of all


def test_a_changed_list_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"i": 3})
    settings = DataSettings(source="list", root=tmp_path, train="a.csv", columns=ColumnSettings(captions="said"))
    (tmp_path / "a.csv").write_text("image,said\ni/00001.png,one\n")
    source = open_list(settings, "train")
    assert source is not None
    assert source.read(0).captions == ("one",)
    assert made(capsys) == 1
    assert open_list(settings, "train") is not None
    assert made(capsys) == 0
    (tmp_path / "a.csv").write_text("image,said\ni/00001.png,one\ni/00002.png,two\n")
    source = open_list(settings, "train")
    assert source is not None
    assert [source.read(index).captions for index in range(2)] == [("one",), ("two",)]


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    make_folder(tmp_path, {"": 5})
    settle(tmp_path)
    path = FolderSource(tmp_path, None).index.path
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-3], "header": b"\xff" * 8 + whole[8:], "empty": b""}[damage])
    assert read_index(path) is None
    assert keys(FolderSource(tmp_path, None)) == [f"{number:05d}.png" for number in range(5)]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "data", {"": 1})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVA_MIM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set EVA_MIM_CACHE to"):
        FolderSource(tmp_path / "data", None)


def test_long_work_says_how_far_it_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process (3 shards) and in several (9); a quick one says nothing but its end."""
    make_folder(tmp_path / "f", {"a": 3, "b": 4})
    many = [make_shards(tmp_path / "s", f"{number}.tar", count=1, first=number) for number in range(9)]
    ShardSource(many[:2], None)
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr("eva_mim.core.log.SAY_EVERY", 0.0)
    FolderSource(tmp_path / "f", None)
    walk = [line.partition(",")[0] + line.partition(":")[2].partition(",")[0]
            for line in capsys.readouterr().err.splitlines() if "walking" in line]
    assert walk == [f"  walking {tmp_path}/f {count} so far" for count in (3, 7)]
    for count in (3, 9):
        ShardSource(many[:count], None)
        told = [line.partition(", ")[0] for line in capsys.readouterr().err.splitlines() if "indexing" in line]
        assert told == [f"  indexing shards in {tmp_path}/s: {done} of {count}" for done in range(1, count + 1)]


# ---- shards


def test_names_that_stand_twice_in_a_shard_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", png(picture(1))), ("b.png", png(picture(2))), ("a.png", png(picture(3)))])
    source = ShardSource([path], None)
    assert [source.read(index).image.tobytes() for index in range(2)] == [picture(3).tobytes(), picture(2).tobytes()]
    assert "1 members have the name of another one" in capsys.readouterr().err


def test_a_member_too_large_for_a_picture_is_a_broken_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eva_mim.data.sources.tar_index.MAX_MEMBER_BYTES", 10_000)
    path = write_tar(tmp_path / "x.tar", [("a.png", bytes(10_001)), ("b.png", png(picture(2)))])
    source = ShardSource([path], None)
    with pytest.raises(ValueError, match="no image member"):
        source.read(0)
    assert source.read(1).image.tobytes() == picture(2).tobytes()


def test_few_shards_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_OPEN", 2)
    for number in range(6):
        make_shards(tmp_path, f"x-{number}.tar", first=number, count=1)
    source = ShardSource(sorted(tmp_path.glob("*.tar")), None)
    for index in (0, 5, 3, 3, 1, 0, 4, 2):
        assert source.read(index).image.tobytes() == picture(index).tobytes()
        opened = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert sum(name.startswith(str(tmp_path)) for name in opened) <= 2


# ---- which records are used


def test_all_but_a_few(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        total = int(generator.integers(1, 40))
        left_out = np.sort(generator.permutation(total)[: generator.integers(0, total + 1)])
        expected = np.setdiff1d(np.arange(total), left_out)
        found = Complement(len(expected), left_out)
        assert [int(found[place]) for place in range(len(found))] == expected.tolist()
        assert found[np.arange(len(found))].tolist() == expected.tolist()


def test_a_selection_keeps_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of all positions, as it was when they were held in memory."""
    monkeypatch.setattr("eva_mim.data.subset.CHUNK", 3)
    source = FolderSource(make_folder(tmp_path, {"a": 4, "b": 7}), ("a", "b"))
    kept = np.array([0, 1, 3, 4, 5, 6, 8, 9, 10], dtype=np.int64)
    for groups in (None, {"y": ["b"], "x": ["a"]}):
        found = Subset(source, Complement(9, np.array([2, 7])), groups).fingerprint
        assert found == digest([source.fingerprint, kept.tobytes().hex(), groups])


# ---- processes


def test_a_worker_is_handed_the_path_of_the_index(tmp_path: Path) -> None:
    source = FolderSource(make_folder(tmp_path, {"a": 300}, size=(1, 1)), ("a",))
    sent = pickle.dumps(source)
    assert len(sent) < 1000 < source.index.path.stat().st_size
    there = pickle.loads(sent)
    assert keys(there) == keys(source)
    with pytest.raises(ValueError, match="read-only"):
        there.index["name"][0] = 0


def test_an_index_that_became_another_one_is_refused(tmp_path: Path) -> None:
    texts = Texts()
    texts.add("a")
    sent = pickle.dumps(write_index(tmp_path / "x.index", _content(texts, "one")))
    assert isinstance(pickle.loads(sent), Index)
    write_index(tmp_path / "x.index", _content(texts, "two"))
    with pytest.raises(UserError, match="the data set changed"):
        pickle.loads(sent)


def on_this_rank(root: Path, own: str | None = None) -> list[str]:
    """What a rank has of a folder; `own`: it is on another host, with a cache of its own, where its folder may differ."""
    if own:
        os.environ["EVA_MIM_CACHE"] += os.environ["RANK"]
        os.environ["LOCAL_RANK"] = "0"
    said, scan = [], folder_module._scan

    def counted(root: Path, *more: Any) -> Any:
        time.sleep(1)
        said.append(f"walked {distributed.rank()}")
        if own == "differ" and distributed.rank():
            (root / "more.png").write_bytes(b"")
        return scan(root, *more)

    with patch.object(folder_module, "_scan", counted):
        try:
            source = FolderSource(root, None)
            said.append(f"rank {distributed.rank()} has {len(source)}: {source.key(1)}")
        except UserError as error:
            said.append(f"refused {distributed.rank()}: {error}")
    return said


def ranks(root: Path, own: str | None = None) -> list[str]:
    """What two ranks have, sorted."""
    return sorted(line for said in on_ranks(2, on_this_rank, root, own) for line in said)


@pytest.mark.slow
def test_one_rank_makes_the_index_and_all_read_it(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 2})
    settle(root)
    both = ["rank 0 has 2: a/00001.png", "rank 1 has 2: a/00001.png"]
    assert ranks(root) == [*both, "walked 0"]
    assert ranks(root) == both
    assert ranks(root, "hosts") == [*both, "walked 0", "walked 1"]


@pytest.mark.slow
def test_a_failure_of_one_rank_stops_all(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    first, second, walked = ranks(tmp_path / "empty")
    assert first.startswith(f"refused 0: {tmp_path}/empty: no images here")
    assert second.startswith(f"refused 1: rank 0: {tmp_path}/empty: no images here")
    assert walked == "walked 0"
    root = make_folder(tmp_path / "data", {"a": 2})
    found = ranks(root, "differ")
    assert sum("hosts see different files" in line for line in found) == 2


# ---- the command


def test_the_command_makes_the_index_that_a_run_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "train", {"ant": 3, "bee": 2})
    make_folder(tmp_path / "val", {"bee": 1})
    settle(tmp_path)
    assert main(["data", "index", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.err.count("  indexed ") == 2
    assert [line.split() for line in told.out.splitlines()] == [
        ["train", "5", "images,", "2", "classes:", "ant,", "bee"], ["val", "1", "images,", "2", "classes:", "ant,", "bee"]
    ]
    splits = open_splits(DataSettings(root=tmp_path, train="train", val="val"))
    assert (len(splits.train), len(splits.val)) == (5, 1)
    assert made(capsys) == 0
    recipe = write_recipe(tmp_path, {"data": {"root": str(tmp_path), "train": "train"}, "run": {"epochs": 3}})
    assert main(["data", "index", str(recipe), "data.val=val"]) == 0
    assert capsys.readouterr().out == told.out
    assert main(["data", "index", str(recipe), "data.root=/nonexistent"]) == 2
    assert "/nonexistent/train is not a folder" in capsys.readouterr().err


def test_the_command_knows_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path, "a.tar", count=4)
    make_shards(tmp_path, "b.tar.gz", count=3)
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    assert main(["data", "index", str(tmp_path), "data.classes=classes.txt"]) == 0
    assert capsys.readouterr().out.split() == ["train", "7", "images,", "3", "classes:", "x,", "y,", "z"]
