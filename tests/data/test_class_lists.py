"""Class lists: timm's own tables and maps agree, a list is named or its neighbours are, and mistakes are told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import timm
from timm.data import ImageNetInfo

from eva_mim.commands import labels as label_check
from eva_mim.core.errors import UserError
from eva_mim.data.class_lists import (
    LAYOUTS,
    WINTER21,
    class_hash,
    describe,
    layout_classes,
    layout_of,
    layouts_with,
    matches,
    positions,
    read_classes,
)
from tests.conftest import make_folder, make_shards, write_tar

INFO = Path(timm.__file__).parent / "data" / "_info"


@pytest.mark.parametrize(
    ("layout", "subset", "count"),
    [
        ("imagenet-1k", "imagenet-1k", 1000),
        ("imagenet-12k", "imagenet-12k", 11_821),
        ("imagenet-21k-fall11", "imagenet-22k", 21_841),
        ("imagenet-21k-google", "imagenet-21k-goog", 21_843),
        ("imagenet-21k-p-fall11", "imagenet-21k-miil", 11_221),
        ("imagenet-22k-ms", "imagenet-22k-ms", 21_842),
    ],
)
def test_layouts_are_timms(layout: str, subset: str, count: int) -> None:
    assert list(layout_classes(layout)) == list(ImageNetInfo(subset).label_names())
    assert len(layout_classes(layout)) == count
    assert layouts_with(count) == [layout]


def test_the_cleaned_winter_list_has_its_published_size() -> None:
    assert len(layout_classes("imagenet-21k-p-winter21")) == 10_450
    assert layouts_with(19_167) == [WINTER21]


@pytest.mark.parametrize(
    ("wanted", "among", "file"),
    [
        ("imagenet-12k", "imagenet-21k-fall11", "imagenet22k_to_12k_indices.txt"),
        ("imagenet-12k", "imagenet-21k-google", "imagenet21k_goog_to_12k_indices.txt"),
        ("imagenet-12k", "imagenet-22k-ms", "imagenet22k_ms_to_12k_indices.txt"),
        ("imagenet-21k-fall11", "imagenet-22k-ms", "imagenet22k_ms_to_22k_indices.txt"),
        ("imagenet-a", "imagenet-1k", "imagenet_a_indices.txt"),
        ("imagenet-r", "imagenet-1k", "imagenet_r_indices.txt"),
        ("mini-imagenet", "imagenet-1k", "mini_imagenet_indices.txt"),
    ],
)
def test_index_maps_are_timms(wanted: str, among: str, file: str) -> None:
    expected = [int(number) for number in (INFO / file).read_text().split()]
    assert positions(layout_classes(wanted), layout_classes(among)) == expected


@pytest.mark.parametrize("among", ["imagenet-21k-fall11", "imagenet-21k-p-winter21", "imagenet-12k", "imagenet-22k-ms"])
def test_classes_of_1k_in_a_larger_list(among: str) -> None:
    """Against a search through the list; fall11 lacks one class of 1k."""
    target, larger = layout_classes("imagenet-1k"), list(layout_classes(among))
    found = positions(target, larger)
    for name, place in zip(target[::37], found[::37], strict=True):
        assert place == (larger.index(name) if name in larger else None)
    absent = [name for name, place in zip(target, found, strict=True) if place is None]
    assert len(absent) == {"imagenet-21k-fall11": 1, "imagenet-21k-p-winter21": 9, "imagenet-12k": 7, "imagenet-22k-ms": 0}[among]
    assert ("n04399382" in absent) == (among != "imagenet-22k-ms")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_named(layout: str) -> None:
    assert layout_of(layout_classes(layout)) == layout
    assert layout_of([f"{name} some words" for name in layout_classes(layout)]) == layout
    assert matches(layout_classes(layout))[0].layout == layout


def test_what_is_nearly_a_layout_says_how_nearly() -> None:
    classes = list(layout_classes("imagenet-21k-fall11"))
    changed = [*classes[3:], "n99999999"]
    assert layout_of(changed) is None
    nearest = matches(changed)[0]
    assert nearest.layout == "imagenet-21k-fall11"
    assert nearest.missing == tuple(sorted(classes[:3]))
    assert nearest.extra == ("n99999999",)
    assert "nearest: imagenet-21k-fall11 (3 classes missing, 1 extra), " in describe(changed)
    random.Random(0).shuffle(classes)
    assert "nearest: imagenet-21k-fall11 in another order" in describe(classes)
    assert describe(["cat", "dog"]) == "no layout of ImageNet"


def test_winter21_is_told_by_its_size_and_its_cleaned_part() -> None:
    core = layout_classes("imagenet-21k-p-winter21")
    others = sorted(set(layout_classes("imagenet-21k-fall11")) - set(core))
    winter = sorted([*core, *others[: 19_167 - len(core)]])
    assert layout_of(winter) == WINTER21
    assert layout_of(winter[:-1]) is None
    assert layout_of([*winter[1:], winter[0]]) is None
    assert layout_of(sorted({*winter, "n99999999"} - {core[0]})) is None
    with pytest.raises(UserError, match="timm has no list of it"):
        layout_classes(WINTER21)


def test_the_hash_knows_classes_and_their_order() -> None:
    plain = ["n01440764", "n01443537"]
    assert class_hash(plain) == class_hash(["n01440764 tench", "n01443537 goldfish, Carassius auratus"])
    assert len({class_hash(names) for names in (plain, plain[::-1], plain[:1], ["tench", "goldfish"])}) == 4


def test_a_name_that_stands_for_two_classes_is_refused() -> None:
    """Two of the 1k classes are called crane."""
    assert positions(["kite"], ["crane", "kite", "crane"]) == [1]
    with pytest.raises(UserError, match="crane: the name of several classes"):
        positions(["kite", "crane"], ["crane", "kite", "crane"])


def test_class_lists_are_read_from_whatever_holds_them(tmp_path: Path) -> None:
    names = ("n01440764", "n01443537")
    folders = make_folder(tmp_path / "folders", {"b": 1, "a": 1})
    assert read_classes(folders) == ("a", "b")
    make_folder(tmp_path / "splits" / "train", {"n01443537": 1, "n01440764": 1})
    assert read_classes(tmp_path / "splits") == names
    for name in names:
        write_tar(tmp_path / "tars" / f"{name}.tar", [])
    assert read_classes(tmp_path / "tars") == names
    lines = tmp_path / "lines.txt"
    lines.write_text("0\tn01440764\ttench\n\n1\tn01443537\tgoldfish\n")
    assert read_classes(lines) == ("n01440764 tench", "n01443537 goldfish")
    lines.write_text("0\tcat\n1\tsea lion\n")
    assert read_classes(lines) == ("cat", "sea lion")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "config.json").write_text(json.dumps({"architecture": "x", "label_names": {"1": "b", "0": "a"}}))
    assert read_classes(tmp_path / "stage") == ("a", "b")
    make_shards(tmp_path / "shards")
    with pytest.raises(UserError, match=r"labels and no class names; put classes\.txt"):
        read_classes(tmp_path / "shards")
    (tmp_path / "shards" / "classes.txt").write_text("x\ny\nz\n")
    assert read_classes(tmp_path / "shards") == ("x", "y", "z")


def test_what_holds_no_class_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean imagenet-21k-fall11\?"):
        read_classes("imagenet21k-fall11")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_classes(tmp_path / "broken.json")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="expected class names by label"):
        read_classes(tmp_path / "numbers.json")
    with pytest.raises(UserError, match="no class names here"):
        read_classes(make_folder(tmp_path / "flat", {"": 2}))


def test_the_command_names_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mini-imagenet's folders without one, then whole; the code of --expect."""
    names = layout_classes("mini-imagenet")
    for name in names[1:]:
        (tmp_path / name).mkdir()
    assert label_check.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "classes   99, " in text
    assert "nearest: mini-imagenet (1 classes missing, 0 extra)" in text
    assert f"  missing {names[0]}\n" in text
    assert "imagenet-1k 99 of its 1000 classes, without " in text
    assert label_check.main([str(tmp_path), "--expect", "mini-imagenet"]) == 2
    assert "not mini-imagenet, but no known layout; nearest: mini-imagenet (1 " in capsys.readouterr().err
    (tmp_path / names[0]).mkdir()
    assert label_check.main([str(tmp_path), "--expect", "mini-imagenet"]) == 0
    assert f"hash      {class_hash(names)}\nlayout    mini-imagenet\n" in capsys.readouterr().out
    assert label_check.main([str(tmp_path), "--expect", "imagenet-2k"]) == 2
    assert "layout 'imagenet-2k': not known; did you mean" in capsys.readouterr().err
