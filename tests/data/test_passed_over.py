"""What lies beside the images is neither trained on nor passed over without a word; a folder one level too high is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from eva_mim.core.errors import UserError
from eva_mim.data import DataSettings
from eva_mim.data.splits import Splits, open_splits
from tests.conftest import make_folder, make_shards, picture, png, write_tar
from tests.tiny import CLASSIFY, CLIP, MIM, records, run, write_recipe

CLASSES = {"cat": 4, "dog": 4}


def opened(root: Path, **settings: Any) -> Splits:
    return open_splits(DataSettings.model_validate({"root": root, "val_share": 0.5, **settings}))


def keys(splits: Splits) -> list[str]:
    return sorted(source.key(index) for source in splits for index in range(len(source)))


def labels(splits: Splits) -> set[tuple[str, str]]:
    """Pairs of a record's folder and its class."""
    read = [source.read(index) for source in splits for index in range(len(source))]
    return {(sample.key.partition("/")[0], (splits.train.classes or ())[sample.label or 0]) for sample in read}


def test_hidden_files_and_other_formats_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, CLASSES | {"dog/.ipynb_checkpoints": 1, "__MACOSX/dog": 2, "cat/@eaDir/x": 1})
    for name in ("cat/._00000.png", "cat/a.gif", "cat/b.GIF", "cat/c.avif", "dog/d.jfif", "dog/e", "cat/00000.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(png(picture(7)))
    (tmp_path / "dog" / os.fsdecode(b"caf\xe9.gif")).write_bytes(b"")
    (tmp_path / "dog" / os.fsdecode(b"._caf\xe9.png")).write_bytes(b"")
    (tmp_path / "dog" / "gone").symlink_to(tmp_path / "nowhere")
    splits = opened(tmp_path)
    assert keys(splits) == [f"{name}/0000{number}.png" for name in CLASSES for number in range(4)]
    assert splits.train.classes == ("cat", "dog")
    said = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert said == [f"  {tmp_path}: passed over 3 .gif, 1 .avif, 1 .jfif, 1 without a suffix, 2 hidden (cat/._00000.png, "
                    f"dog/._caf{chr(92)}udce9.png), "
                    "1 links to nothing (dog/gone), folders __MACOSX, cat/@eaDir, dog/.ipynb_checkpoints"]
    opened(tmp_path)  # from the cache
    assert said == [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]


def test_a_folder_of_other_formats_names_them(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.heic").write_bytes(b"?")
    with pytest.raises(UserError, match=r"no images here \(looked for .*; there are 3 \.heic\)"):
        opened(tmp_path / "photos")


def test_links_to_class_folders_are_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_folder(tmp_path / "store", {"n01": 3, "n02": 3, "n03": 3})
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "ant").symlink_to(store / "n01")
    (chosen / "bee").symlink_to("../store/n03")
    splits = opened(chosen)
    assert keys(splits) == [f"{name}/0000{number}.png" for name in ("ant", "bee") for number in range(3)]
    assert labels(splits) == {("ant", "ant"), ("bee", "bee")}
    capsys.readouterr()
    for _ in range(2):  # new images of a linked folder are noticed
        (store / "n03" / "9.png").write_bytes(png(picture(9)))
        assert "bee/9.png" in keys(opened(chosen))


@pytest.mark.parametrize(("link", "target", "names"), [
    ("cow", "cat", "cow and cat"), ("dog/loop", ".", "dog/loop and the folder itself"), ("dog/up", "dog", "dog/up and dog")])
def test_a_folder_that_is_there_twice_is_refused(tmp_path: Path, link: str, target: str, names: str) -> None:
    make_folder(tmp_path, CLASSES)
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=f"{names} are one folder, by a link"):
        opened(tmp_path)


def test_held_out_links_into_the_training_folder_are_seen(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/cat": 4, "train/dog": 4, "val/dog": 2})
    (tmp_path / "val" / "cat").symlink_to(tmp_path / "train" / "cat")
    with pytest.raises(UserError, match=r"share .*/train/cat: what is held out would be trained on"):
        opened(tmp_path, train="train", val="val")


@pytest.mark.parametrize(("tree", "settings", "root", "held_out"), [
    ({"data/train/cat": 2, "data/train/dog": 2, "data/val/cat": 2}, {}, "data", "val"),
    ({"a/b/train/cat": 2, "a/b/test/cat": 2}, {}, "a/b", "test"),
    ({"all/train/cat": 2, "all/validation/cat": 2}, {"train": "all"}, "all", "validation"),
    ({"paris/train/cat": 2, "paris/val/cat": 2, "rome/train/cat": 2}, {}, "paris", "val"),
])
def test_splits_one_level_below_are_refused(
    tmp_path: Path, tree: dict[str, int], settings: dict[str, str], root: str, held_out: str
) -> None:
    make_folder(tmp_path, tree)
    with pytest.raises(UserError, match=f"set data.root={tmp_path / root} data.train=train data.val={held_out}; if they are"):
        opened(tmp_path, **settings)
    inner = opened(tmp_path / root, train="train", val=held_out)  # as the message says
    assert {key.partition("/")[0] for key in keys(inner)} <= {"cat", "dog"}
    assert opened(tmp_path / root, train=".").train.classes == tuple(sorted({"train", held_out}))  # so does this


def test_one_folder_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a classifier has a loss of 0 and is right in 100 % of the images."""
    make_folder(tmp_path, {"pets/cat": 4, "pets/dog": 4})
    assert opened(tmp_path).train.classes is None
    recipe = write_recipe(tmp_path / "recipes", CLASSIFY | {"data": {"root": str(tmp_path)}})
    (tmp_path / "recipes").rename(tmp_path.parent / "recipes")
    done = run("classify", tmp_path.parent / "recipes" / recipe.name, tmp_path.parent / "out", code=2)
    assert f"{tmp_path} has no labels" in done.stderr
    assert f"its only folder is pets; did you mean data.root={tmp_path / 'pets'}?" in done.stderr
    capsys.readouterr()


def test_classes_whose_images_lie_deeper_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path, {"part1/cat": 2, "part1/dog": 2, "part2/cat": 2, "part2/dog": 2})
    assert opened(tmp_path).train.classes == ("part1", "part2")
    assert "the classes are part1, part2, not the folders below them (part1/cat, part1/dog, part2/cat and 1 more)" in (
        capsys.readouterr().err)
    make_folder(tmp_path / "fine", {"cat/new": 2, "cat": 2, "dog/new": 2})
    opened(tmp_path / "fine")
    assert "the classes are" not in capsys.readouterr().err


def test_shards_say_what_has_no_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [(f"./{number}.png", png(picture(number))) for number in range(6)]
    members += [("./._0.png", b"mac"), ("__MACOSX/0.png", b"mac"), ("7.gif", b"gif"), ("7.cls", b"0"), ("README.md", b"read")]
    write_tar(tmp_path / "train-0.tar", members)
    for _ in range(2):  # made, and from the cache
        assert len(keys(opened(tmp_path, source="shards"))) == 8
        assert (f"  {tmp_path}: passed over 2 hidden members; 2 records have no image that can be read, such as "
                "train-0.tar/7: gif, cls\n") in capsys.readouterr().err


# ---- records without a label


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shards some or none of whose records have a label."""
    found = {}
    for name, labelled in (("some", 20), ("none", 0)):
        root = tmp_path_factory.mktemp(name)
        members: list[tuple[str, bytes]] = []
        for number in range(24):
            members += [(f"{number:02d}.png", png(picture(number))), (f"{number:02d}.txt", b"a picture")]
            members += [(f"{number:02d}.cls", str(number % 2).encode())] if number < labelled else []
        write_tar(root / "train-0.tar", members)
        make_shards(root, "val-0.tar", count=8, first=100, classes=2)
        (root / "classes.txt").write_text("a\nb\n")
        found[name] = root
    return found


def recipe(folder: Path, tree: dict[str, Any], root: Path, **data: Any) -> Path:
    settings = {"source": "shards", "root": str(root), "train": "train-*", "val": "val-*", "classes": "classes.txt", "workers": 0}
    return write_recipe(folder, tree | {"data": settings | data, "run": tree["run"] | {"epochs": 1, "global_batch": 8}})


@pytest.mark.parametrize(("name", "said"), [
    ("some", "4 of the 24 training records have no label, such as train-0.tar/20; a classifier needs one for each (KEY.cls"),
    ("none", "none of the 24 training records has a label; a classifier needs one")])
def test_a_classifier_needs_labels(without: dict[str, Path], tmp_path: Path, name: str, said: str) -> None:
    done = run("classify", recipe(tmp_path, CLASSIFY, without[name]), tmp_path / "out", code=2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_records_that_are_not_used_need_no_label(without: dict[str, Path]) -> None:
    root = without["some"]
    shards = {"source": "shards", "train": "train-*", "val": "val-*", "classes": "classes.txt"}
    assert opened(root, **shards).without_labels()
    assert not opened(root, **shards, limit=20).without_labels()
    share = opened(root, **shards | {"val": None, "val_share": 0.25})
    found = {source.key(place) for source in share for place in source.unlabelled()}
    assert found == {f"train-0.tar/{number}" for number in range(20, 24)}
    listed = root / "quarantine.jsonl"
    listed.write_text("")
    part = {"root": root, **shards, "weight": 1.0}
    mixed = open_splits(DataSettings.model_validate({"mixture": [part | {"limit": 10}, part]}))
    assert [mixed.train.key(place) for place in mixed.train.unlabelled()] == [f"1:train-0.tar/{n}" for n in range(20, 24)]


@pytest.mark.parametrize("name", ["some", "none"])
def test_masked_stages_need_none(without: dict[str, Path], tmp_path: Path, name: str) -> None:
    done = run("mim", recipe(tmp_path, MIM, without[name]), tmp_path / "out")
    assert "of the 24 training records" in done.stderr
    assert "no k-NN and ridge figures" in done.stderr
    (measured,) = records(tmp_path / "out", "eval")
    assert "cosine" in measured
    assert not any("knn" in key for key in measured)


def test_clip_measures_zero_shot_only_with_labels(without: dict[str, Path], tmp_path: Path) -> None:
    path = recipe(tmp_path, CLIP, without["some"], train="val-*", val="train-*")
    done = run("clip", path, tmp_path / "out")
    assert "4 of the 24 held-out records have no label, such as train-0.tar/20: no zero-shot figures" in done.stderr
    (found,) = records(tmp_path / "out", "eval")
    assert not any("zeroshot" in key for key in found)
    assert "image_to_text_r1" in found
