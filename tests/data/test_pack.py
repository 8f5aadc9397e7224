"""`eva-mim data pack`: nothing is lost or changed on the way into shards, and an interrupted command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from eva_mim.cli import main
from eva_mim.commands.data.index import every_split, read_data
from eva_mim.core.contracts import Sample
from tests.conftest import REPOSITORY, make_folder, picture, png
from tests.data.test_masks import as_folder, settings_of, values
from tests.tiny import environment


def labelled(root: Path) -> Path:
    """Two splits of three class folders, with captions beside some images; one PNG is called a JPEG."""
    make_folder(root / "train", {"ant": 5, "bee": 7, "cow": 3})
    make_folder(root / "val", {"ant": 2, "bee": 1, "cow": 1})
    (root / "train" / "bee" / "00006.txt").write_text("a bee\n")
    (root / "train" / "cow" / "00002.json").write_text('{"captions": ["a cow", "eine Kuh für Ümläute"]}')
    (root / "train" / "ant" / "00001.png").rename(root / "train" / "ant" / "a.b c.jpg")
    return root


def pack(what: Path, out: Path, *more: str) -> int:
    return main(["data", "pack", str(what), "--out", str(out), "--processes", "1", "--per-shard", "4", *more])


def samples(what: Path, split: str, *overrides: str) -> list[Sample]:
    source = dict(every_split(read_data(str(what), overrides)))[split]
    return [source.read(index) for index in range(len(source))]


def packed(out: Path, split: str = "train") -> list[Sample]:
    return samples(out, split, "data.train=train-*.tar", "data.val=val-*.tar", "data.classes=classes.txt")


def original_keys(out: Path, split: str = "train") -> list[str]:
    """As the shards' JSON has them."""
    keys = []
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    file = archive.extractfile(member)
                    assert file is not None
                    keys.append(json.load(file)["key"])
    return keys


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_every_record_arrives_as_it_was(tmp_path: Path) -> None:
    root, out = labelled(tmp_path / "data"), tmp_path / "shards"
    assert pack(root, out, "--processes", "2") == 0
    assert [path.name for path in sorted(out.iterdir())] == [
        "classes.txt", "pack.json", *(f"train-00000{number}.tar" for number in range(4)), "val-000000.tar"]
    for split in ("train", "val"):
        before = {sample.key: sample for sample in samples(root, split)}
        after = dict(zip(original_keys(out, split), packed(out, split), strict=True))
        assert after.keys() == before.keys()
        for key, sample in before.items():
            assert after[key].image.tobytes() == sample.image.tobytes()
            assert (after[key].label, after[key].captions) == (sample.label, sample.captions)
    assert (out / "classes.txt").read_text() == "ant\nbee\ncow\n"


def test_files_are_copied_and_named_by_what_they_are(tmp_path: Path) -> None:
    root, out = labelled(tmp_path / "data"), tmp_path / "shards"
    pack(root, out)
    found: dict[str, bytes] = {}
    for path in out.glob("train-*.tar"):
        with tarfile.open(path) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        for name, content in members.items():
            if name.endswith(".png"):
                found[json.loads(members[name[:-3] + "json"])["key"]] = content
    assert found == {str(path.relative_to(root / "train")): path.read_bytes() for path in (root / "train").rglob("*.[pj][np]g")}


def test_the_order_is_drawn_or_kept(tmp_path: Path) -> None:
    root = labelled(tmp_path / "data")
    kept = [sample.key for sample in samples(root, "train")]
    for seed in ("0", "1"):
        pack(root, tmp_path / seed, "--seed", seed)
        pack(root, tmp_path / f"{seed}-again", "--seed", seed)
        assert contents(tmp_path / seed) == contents(tmp_path / f"{seed}-again")
    pack(root, tmp_path / "kept", "--keep-order")
    orders = [original_keys(tmp_path / name) for name in ("0", "1", "kept")]
    assert orders[2] == kept
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(kept)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_like_another(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 150, "b": 150}, (200, 200))
    line = [sys.executable, "-m", "eva_mim.cli", "data", "pack", str(root), "--processes", "2", "--per-shard", "5"]
    subprocess.run([*line, "--out", str(tmp_path / "straight")], check=True, env=environment(), cwd=REPOSITORY)
    out = tmp_path / "killed"
    for _ in range(2):
        process = subprocess.Popen([*line, "--out", str(out)], env=environment(), cwd=REPOSITORY, start_new_session=True,
                                   stderr=subprocess.DEVNULL)
        before, late = len(list(out.glob("train-*.tar"))), time.time() + 60
        while len(list(out.glob("train-*.tar"))) < before + 10 and process.poll() is None and time.time() < late:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path in out.glob("train-*.tar"):  # under its own name every shard is whole
            assert path.read_bytes() == (tmp_path / "straight" / path.name).read_bytes()
    done = subprocess.run([*line, "--out", str(out)], check=True, env=environment(), cwd=REPOSITORY, stderr=subprocess.PIPE)
    assert b"shards are there already" in done.stderr
    assert contents(out) == contents(tmp_path / "straight")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = labelled(tmp_path / "data"), tmp_path / "shards"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert pack(root, out) == 2
    assert "is not empty (thesis.tex); choose another folder" in capsys.readouterr().err
    (out / "thesis.tex").unlink()
    assert pack(root, out) == 0
    before = contents(out)
    assert pack(root, out, "--seed", "1") == 2
    assert "holds shards of other data or other settings" in capsys.readouterr().err
    assert contents(out) == before


def test_unreadable_and_listed_records_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out, listed = labelled(tmp_path / "data"), tmp_path / "shards", tmp_path / "list.json"
    (root / "train" / "bee" / "00003.png").write_bytes(png(picture(8))[:-60])  # only decoding finds it
    main(["data", "verify", str(root), "--out", str(listed)])
    capsys.readouterr()
    (root / "train" / "cow" / "00001.png").write_text("no image")
    assert pack(root, out, f"data.quarantine={listed}") == 0
    captured = capsys.readouterr()
    assert "left out: cow/00001.png: UnidentifiedImageError" in captured.err
    assert "13 of 15 records, 1 in quarantine, 1 unreadable" in captured.out
    files = {str(path.relative_to(root / "train")) for path in (root / "train").rglob("*.[pj][np]g")}
    assert set(original_keys(out)) == files - {"bee/00003.png", "cow/00001.png"}


def test_files_that_have_lost_their_content_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = make_folder(tmp_path / "data", {"a": 60}), tmp_path / "shards"
    main(["data", "index", str(root)])
    for path in (root / "a").iterdir():
        path.write_bytes(b"")
    assert main(["data", "pack", str(root), "--out", str(out), "--per-shard", "40"]) == 2
    assert "11 records cannot be read, more than data.max_broken=1.00% of a shard" in capsys.readouterr().err
    assert not list(out.glob("*.tar"))
    assert not list(out.glob(".*"))


def test_drawn_scenes_have_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {source: scenes}\n")
    assert pack(recipe, tmp_path / "out") == 2
    assert "data.source=scenes has no image files to pack" in capsys.readouterr().err


def test_labels_are_not_lost_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards whose class list has another name, and the same shards with it; in its usual place it is found."""
    first, again = tmp_path / "first", tmp_path / "again"
    pack(labelled(tmp_path / "data"), first)
    capsys.readouterr()
    assert pack(first, tmp_path / "found") == 0
    (first / "classes.txt").rename(first / "names.txt")
    assert pack(first, again) == 2
    assert "its records have labels, which would be lost: set data.classes" in capsys.readouterr().err
    assert not again.exists()
    settings = ["data.train=train-*.tar", "data.val=val-*.tar", "data.classes=names.txt"]
    assert pack(first, again, "--keep-order", *settings) == 0
    (first / "names.txt").rename(first / "classes.txt")
    one, other = packed(first), packed(again)
    assert [(s.label, s.captions, s.image.tobytes()) for s in one] == [(s.label, s.captions, s.image.tobytes()) for s in other]


def test_masks_travel_with_their_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "data", tmp_path / "shards"
    settings = settings_of(root, as_folder(root, 3))
    (root / "annotations" / "training" / "000.png").write_bytes(b"no mask")
    maps = [f"data.segmentation.{name}={value}" for name, value in settings.segmentation or () if value not in (None, ".png")]
    told = ["data.source=folder", "data.train=images/training", "data.val=images/validation", *maps]
    assert pack(root, out, *told) == 0
    printed = capsys.readouterr()
    assert "1 unreadable" in printed.out
    after = samples(out, "val", *[word.strip("'") for word in printed.out.split("data.root=")[1].split()[1:]])
    for key, sample in zip(original_keys(out, "val"), after, strict=True):
        assert sample.segmentation is not None
        assert (sample.segmentation == values(int(Path(key).stem)).astype(int) - 1).all()
