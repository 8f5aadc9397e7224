"""Lists of images: the formats say the same, and every mistake is named with its place."""

from __future__ import annotations

import builtins
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.data import DataSettings
from eva_mim.data.source_settings import ColumnSettings
from eva_mim.data.sources.lists import open_list
from eva_mim.data.splits import open_splits
from tests.conftest import make_folder, picture

ROWS: list[dict[str, Any]] = [
    {"path": "i/00002.png", "title": 'two, "quoted"', "more": "zwei", "kind": "dog"},
    {"path": "i/00000.png", "title": "null\nnext line", "more": "0", "kind": "ant"},
    {"path": "i/00003.png", "title": " three é ", "more": "drei", "kind": "dog"},
]
COLUMNS = {"image": "path", "captions": ["title", "more"], "label": "kind"}


def delimited(delimiter: str) -> Callable[[Path, list[dict[str, Any]]], None]:
    def write(path: Path, rows: list[dict[str, Any]]) -> None:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    return write


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)


FORMATS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.csv": delimited(","), "tabs.csv": delimited("\t"), "semicolons.csv": delimited(";"), "a.tsv": delimited("\t"),
    "a.jsonl": jsonl, "a.parquet": parquet,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_folder(tmp_path, {"i": 6})
    return tmp_path


def opened(root: Path, train: str, columns: dict[str, Any], split: str = "train", **more: Any) -> Source:
    source = open_list(DataSettings(source="list", root=root, train=train, columns=ColumnSettings(**columns), **more), split)
    assert source is not None
    return source


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("first", ["image", "title"])
def test_stray_quotes_take_in_no_rows(root: Path, suffix: str, first: str) -> None:
    """One quote at the beginning of a caption and one at the end of a later one: between them lie six rows. Captions of several
    lines stay what they are."""
    mark = {".csv": ",", ".tsv": "\t"}[suffix]
    columns = {"captions": "title"}

    def written(titles: dict[int, str]) -> None:
        rows = [("image", "title"), *((f"i/{number:05d}.png", titles.get(number, f"title {number}")) for number in range(24))]
        lines = [mark.join(row if first == "image" else row[::-1]) for row in rows]
        (root / f"a{suffix}").write_text("".join(f"{line}\n" for line in lines))

    written({3: '"A cat', 9: 'a dog"'})
    with pytest.raises(UserError, match=rf"a{suffix}:5: a field in quotes ends in line 11 and holds what looks like another row"):
        opened(root, f"a{suffix}", columns)
    written({3: '"two\nlines, with\tmarks\nand a ""quote"" of cat.png"', 4: 'a 3" pipe'})
    source = opened(root, f"a{suffix}", columns)
    assert len(source) == 24
    assert source.read(3).captions == ('two\nlines, with\tmarks\nand a "quote" of cat.png',)
    assert source.read(4).captions == ('a 3" pipe',)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_say_the_same(root: Path, name: str) -> None:
    FORMATS[name](root / name, ROWS)
    source = opened(root, name, COLUMNS)
    assert source.classes == ("ant", "dog")
    expected = [(2, ('two, "quoted"', "zwei"), 1), (0, ("null\nnext line", "0"), 0), (3, ("three é", "drei"), 1)]
    for index, (seed, captions, label) in enumerate(expected):
        sample = source.read(index)
        assert (sample.image.tobytes(), sample.captions, sample.label) == (picture(seed).tobytes(), captions, label)
        assert sample.key == source.key(index) == f"i/{seed:05d}.png"
    alone = opened(root, name, {"image": "path", "captions": "more"})
    assert alone.classes is None
    assert [alone.read(index)[2:4] for index in range(3)] == [(None, ("zwei",)), (None, ("0",)), (None, ("drei",))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_cell_may_hold_several_captions(root: Path, name: str) -> None:
    FORMATS[name](root / name, [{"image": "i/00001.png", "said": ["a", "b ", "c"]}, {"image": "i/00002.png", "said": ["d"]}])
    source = opened(root, name, {"captions": "said"})
    assert [source.read(index).captions for index in range(2)] == [("a", "b", "c"), ("d",)]


def test_paths_are_relative_to_the_list_and_stay_below_the_root(root: Path) -> None:
    (root / "lists").mkdir()
    jsonl(root / "lists" / "a.jsonl", [{"image": "../i/00004.png"}, {"image": str(root / "i" / "00005.png")}])
    source = opened(root, "lists/a.jsonl", {})
    assert [source.read(index).image.tobytes() for index in range(2)] == [picture(4).tobytes(), picture(5).tobytes()]
    for outside in ("../../secret.png", "/etc/passwd", "x/../../../secret.png", str(root) + "-other/a.png"):
        jsonl(root / "lists" / "a.jsonl", [{"image": "../i/00004.png"}, {"image": outside}])
        with pytest.raises(UserError, match=r"a\.jsonl:2: .* is outside data\.root="):
            opened(root, "lists/a.jsonl", {})
    jsonl(root / "lists" / "a.jsonl", [{"image": "../i/00004.png"}])
    with pytest.raises(UserError, match=r"outside data\.root"):
        opened(root / "lists", "a.jsonl", {})


def labels(root: Path, values: list[Any], **more: Any) -> tuple[tuple[str, ...] | None, list[int | None]]:
    jsonl(root / "a.jsonl", [{"image": f"i/{n:05d}.png", "label": value} for n, value in enumerate(values)])
    source = opened(root, "a.jsonl", {"label": "label"}, **more)
    return source.classes, [source.read(index).label for index in range(len(values))]


def test_labels_are_names_or_numbers(root: Path) -> None:
    assert labels(root, ["b", "c", "a", "b"]) == (("a", "b", "c"), [1, 2, 0, 1])
    assert labels(root, [10, 9, 2, 10]) == (("2", "9", "10"), [2, 1, 0, 2])  # by number, not by letter
    (root / "classes.txt").write_text("zebra\nant\nbee\n")
    given = ("zebra", "ant", "bee")
    assert labels(root, ["ant", "zebra"], classes="classes.txt") == (given, [1, 0])
    assert labels(root, [2, 0, "1"], classes="classes.txt") == (given, [2, 0, 1])
    (root / "classes.txt").write_text("5\n7\n")
    assert labels(root, [7, 5], classes="classes.txt") == (("5", "7"), [1, 0])  # names that look like numbers are names


def test_the_training_list_decides_the_labels_of_both(root: Path) -> None:
    jsonl(root / "train.jsonl", [{"image": f"i/0000{n}.png", "label": label} for n, label in enumerate(("cat", "ant", "bee"))])
    jsonl(root / "val.jsonl", [{"image": "i/00005.png", "label": "cat"}])
    data = {"source": "list", "root": root, "train": "train.jsonl", "val": "val.jsonl", "columns": {"label": "label"}}
    train, val = open_splits(DataSettings.model_validate(data))
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert val.read(0).label == 2
    jsonl(root / "val.jsonl", [{"image": "i/00005.png", "label": "catt"}])
    with pytest.raises(UserError, match=r"val\.jsonl:1: label 'catt' is none of the 3 classes; did you mean cat\?"):
        open_splits(DataSettings.model_validate(data))


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("path,title\ni/00000.png,a\n", {}, r"data\.columns\.image: .* no column 'image'; columns: path, title"),
        ("image,title\ni/00000.png,a\n", {"captions": "titel"}, r"data\.columns\.captions: .*'titel'; did you mean title\?"),
        ("image,title\ni/00000.png,a\n", {"label": "Title"}, r"data\.columns\.label: .*did you mean title\?"),
        ("image,title\ni/00000.png,a\ni/00001.png,\n", {"captions": "title"}, r"a\.csv:3: an empty caption \(title\)"),
        ("image,title\ni/00000.png,a,b\n", {"captions": "title"}, r"a\.csv:2: 3 fields under 2 columns"),
        ("image,kind\ni/00000.png,\n", {"label": "kind"}, r"a\.csv:2: no label \(kind\)"),
        ("image,kind\n,x\n", {}, r"a\.csv:2: no image path \(''\)"),
        ("image\n", {}, r"no images in this list"),
        ("", {}, r"no column 'image'"),
        ("image,title\nmissing.png,a\n", {}, r"none of its first 1 images exists.*missing\.png"),
        ('image,title\ni/00000.png,"a\n', {}, r"not a readable list"),
    ],
)
def test_mistakes_of_a_csv_are_named(root: Path, text: str, columns: dict[str, Any], message: str) -> None:
    (root / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(root, "a.csv", columns)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "i/00000.png", "t": "a"}\n{"image": "i/00001.png"}\n', r"a\.jsonl:2: no captions \(t\)"),
        ('{"image": "i/00000.png", "t": ["a", ""]}\n', r"a\.jsonl:1: an empty caption \(t\)"),
        ('{"image": "i/00000.png", "t": 3}\n', r"a\.jsonl:1: a caption must be a text, found int"),
        ('{"image": "i/00000.png", "t": "a"}\n{"image"\n', r"a\.jsonl:2: not a line of JSON"),
        ('{"image": "i/00000.png", "t": "a"}\n[]\n', r"a\.jsonl:2: expected \{column: value\}, found list"),
        ('{"image": null, "t": "a"}\n', r"a\.jsonl:1: no image path \(None\)"),
        ("\n", r"no images in this list"),
        ('\n{"image": "i/00000.png", "text": "a"}\n', r"data\.columns\.captions: .*no column 't'"),
    ],
)
def test_mistakes_of_json_lines_are_named(root: Path, text: str, message: str) -> None:
    (root / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(root, "a.jsonl", {"captions": "t"})


def test_lists_that_are_none_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the list .*b\.csv does not exist"):
        opened(root, "b.csv", {})
    with pytest.raises(UserError, match=r"a list must be \.csv, \.tsv, \.jsonl or \.parquet"):
        opened(root, "i/00000.png", {})
    with pytest.raises(UserError, match=r"data\.train must name"):
        open_list(DataSettings(source="list", root=root), "train")
    (root / "b.parquet").write_bytes(b"x")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"Parquet needs pyarrow; .*pip install 'eva-mim\[parquet\]'"):
        opened(root, "b.parquet", {})


def test_a_broken_parquet_file_is_refused(root: Path) -> None:
    pytest.importorskip("pyarrow")
    (root / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match=r"b\.parquet: not a readable Parquet file"):
        opened(root, "b.parquet", {})
