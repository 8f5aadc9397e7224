"""Semantic masks: the same maps from a folder, a list and shards; drawn maps; masks and settings that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eva_mim.core.errors import UserError
from eva_mim.core.settings import as_tree, parse
from eva_mim.data import DataSettings
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.masks import mask_classes, read_mask_classes, segment_names
from eva_mim.data.sources.scenes import COLOURS, SHAPES, SceneSource
from eva_mim.data.splits import open_splits
from tests.conftest import picture, png, write_tar

NAMES = ("wall", "sky", "tree", "sea")
SIZE = (8, 6)


def values(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns [6, 8] values of a mask, as ADE20K has them: 0 for other things, classes from 1."""
    return np.random.default_rng(number).integers(0, 5, SIZE[::-1]).astype(np.uint8)


def mask(number: int) -> bytes:
    return png(Image.fromarray(values(number)))


def as_folder(root: Path, count: int) -> dict[str, Any]:
    for split, first in (("training", 0), ("validation", 100)):
        for part in ("images", "annotations"):
            (root / part / split / "deep").mkdir(parents=True)
        for number in range(first, first + count):
            name = f"{split}/{'deep/' if number % 2 else ''}{number:03d}.png"
            (root / "images" / name).write_bytes(png(picture(number, SIZE)))
            (root / "annotations" / name).write_bytes(mask(number))
    maps = {"train": "annotations/training", "val": "annotations/validation"}
    return {"source": "folder", "train": "images/training", "val": "images/validation", "segmentation": maps}


def as_list(root: Path, count: int) -> dict[str, Any]:
    for split, first in (("train", 0), ("val", 100)):
        rows = []
        for number in range(first, first + count):
            (root / f"{number}.png").write_bytes(png(picture(number, SIZE)))
            (root / f"{number}-mask.png").write_bytes(mask(number))
            rows.append(json.dumps({"image": f"{number}.png", "truth": f"{number}-mask.png"}))
        (root / f"{split}.jsonl").write_text("\n".join(rows))
    return {"source": "list", "train": "train.jsonl", "val": "val.jsonl", "columns": {"mask": "truth"}}


def as_shards(root: Path, count: int) -> dict[str, Any]:
    for split, first in (("train", 0), ("val", 100)):
        members = list[tuple[str, bytes]]()
        for number in range(first, first + count):
            members += [(f"{number:03d}.png", png(picture(number, SIZE))),
                        (f"{number:03d}.{'seg' if number % 2 else 'mask'}.png", mask(number))]
        write_tar(root / f"{split}-0.tar", members)
    return {"source": "shards", "train": "train-*.tar", "val": "val-*.tar"}


def settings_of(root: Path, tree: dict[str, Any], **maps: Any) -> DataSettings:
    (root / "classes.txt").write_text("".join(f"{number}: {name}\n" for number, name in enumerate(NAMES, start=1)))
    chosen = {"classes": "classes.txt", "ignore": 0} | tree.get("segmentation", {}) | maps
    return parse(DataSettings, tree | {"root": str(root), "segmentation": chosen}, "data")


@pytest.mark.parametrize("layout", [as_folder, as_list, as_shards])
def test_maps_of_each_source(layout: Any, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, layout(tmp_path, 4))
    assert segment_names(settings) == NAMES
    splits = open_splits(settings)
    for source, first in zip(splits, (0, 100), strict=True):
        found = {sample.image.tobytes(): sample.segmentation for sample in map(source.read, range(4))}
        for number in range(first, first + 4):
            segmentation = found[picture(number, SIZE).tobytes()]
            assert segmentation is not None
            assert segmentation.dtype == np.int16
            assert np.array_equal(segmentation, values(number).astype(int) - 1)
    tree = as_tree(settings)
    tree["segmentation"]["ignore"] = 4
    other = parse(DataSettings, tree, "data")
    assert open_splits(other).train.fingerprint != splits.train.fingerprint  # the same files mean other maps
    tree |= {"segmentation": None, **({"columns": {}} if layout is as_list else {})}
    assert open_splits(parse(DataSettings, tree, "data")).train.read(0).segmentation is None


def test_drawn_maps_are_where_the_things_are() -> None:
    """Where the map says ground, the picture has the ground's colour; the label is the larger thing's class."""
    for labels, names in (("coarse", 7), ("fine", 25)):
        settings = SceneSettings(size=48, labels=labels)
        data = parse(DataSettings, {"source": "scenes", "scenes": {"size": 48, "labels": labels}, "segmentation": {}}, "data")
        assert len(segment_names(data)) == names
        plain, mapped = SceneSource(settings, "val"), SceneSource(settings, "val", maps=True)
        for index in range(20):
            sample, before = mapped.read(index), plain.read(index)
            assert before.segmentation is None
            assert sample.image.tobytes() == before.image.tobytes()
            assert sample.segmentation is not None
            assert sample.label is not None
            counts = np.bincount(sample.segmentation.flat, minlength=names)
            assert counts[1:].argmax() == sample.label
            assert (counts > 0).sum() in (2, 3)
            pixels = np.asarray(sample.image).astype(int)
            ground = pixels[sample.segmentation == 0]
            spread = np.abs(ground - np.median(ground, axis=0)).max(axis=1)
            assert (spread <= 45).mean() > 0.93  # the rest are edges, which are averages of both
            colours = np.array(list(COLOURS.values()))
            things = pixels[sample.segmentation == sample.label + 1]
            nearest = np.abs(things[:, None] - colours).sum(2).min(1)
            plainly = sample.captions[0].split()
            if "plain" in plainly:
                assert np.median(nearest) == 0, index
    assert data.segmentation is not None
    assert set(SHAPES) < set(segment_names(parse(DataSettings, {"source": "scenes", "scenes": {"labels": "coarse"},
                                                               "segmentation": {}}, "data")))


def test_classes_of_a_file(tmp_path: Path) -> None:
    """COCO's numbers have gaps; ADE20K's table has a header; names alone are numbered by line; groups; ignored classes."""
    path = tmp_path / "classes.txt"
    path.write_text("0\tunlabeled\n2\tbicycle\n17 sea lion\n")
    classes = read_mask_classes(path, 255)
    assert classes.names == ("unlabeled", "bicycle", "sea lion")
    assert classes.numbered(np.array([[0, 17, 2, 255]])).tolist() == [[0, 2, 1, -1]]
    assert read_mask_classes(path, 0).names == ("bicycle", "sea lion")
    assert read_mask_classes(path, 0).numbered(np.array([[0, 17, 2]])).tolist() == [[-1, 1, 0]]
    grouped = read_mask_classes(path, 255, {"animal": ["sea lion"], "thing": ["bicycle"]})
    assert grouped.names == ("animal", "thing")
    assert grouped.numbered(np.array([[0, 17, 2, 255]])).tolist() == [[-1, 0, 1, -1]]
    for mask, text in (([[3]], "values 3 belong to none"), ([[-5, 2**31]], "values -5, 2147483648 belong")):
        with pytest.raises(ValueError, match=text):
            classes.numbered(np.array(mask))
    path.write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1576\t11664\t1172\twall\n2\t0.1072\t6046\t612\tbuilding, edifice\n")
    assert read_mask_classes(path, 0) == (("wall", "building, edifice"), {1: 0, 2: 1, 0: -1})
    path.write_text("wall\nsky\n")
    assert read_mask_classes(path, 255) == (("wall", "sky"), {0: 0, 1: 1, 255: -1})
    for text, message in (("1 a\n1 b\n", "the values 1 stand there twice"), ("1 a\nb\n", "'b' has no value before the name"),
                          ("", "no classes"), ("255 void\n", "no classes")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_mask_classes(path, 255)
    path.write_text("a\nb\nc\n")
    for groups, message in (({"x": ["d"]}, "has no class 'd'"), ({"x": ["a"], "y": ["a"]}, "a: twice in it")):
        with pytest.raises(UserError, match=message):
            read_mask_classes(path, 255, groups)


def test_shards_without_masks(tmp_path: Path) -> None:
    tree = as_shards(tmp_path, 2)
    write_tar(tmp_path / "train-0.tar", [("0.png", png(picture(0, SIZE)))])
    with pytest.raises(UserError, match=r"no record of .* has a mask \(KEY\.seg\.png, KEY\.mask\.png\)"):
        open_splits(settings_of(tmp_path, tree))


@pytest.mark.parametrize(("tree", "text"), [
    ({"source": "scenes", "segmentation": {"classes": "x"}}, "segmentation.classes has no effect with data.source=scenes"),
    ({"source": "shards", "segmentation": {"classes": "x", "train": "y"}}, "segmentation.train has no effect with data.source"),
    ({"source": "shards", "segmentation": {}}, "segmentation.classes must be given"),
    ({"source": "folder", "segmentation": {"classes": "x"}}, "segmentation.train must be given"),
    ({"source": "folder", "val": "v", "segmentation": {"classes": "x", "train": "y"}}, "either both are given, or none"),
    ({"source": "list", "train": "a.csv", "segmentation": {"classes": "x"}}, "data.columns.mask=None: a list has it"),
    ({"source": "list", "train": "a.csv", "columns": {"mask": "m"}}, "data.columns.mask=m: a list has it"),
    ({"source": "shards", "exif": True, "segmentation": {"classes": "x"}}, "data.exif=true would turn images and not their"),
    ({"source": "scenes", "segmentation": None}, None),
])  # fmt: skip
def test_settings_that_do_not_fit(tree: dict[str, Any], text: str | None, tmp_path: Path) -> None:
    tree = tree | ({} if tree["source"] == "scenes" else {"root": str(tmp_path)})
    if text is None:
        settings = parse(DataSettings, tree, "data")
        with pytest.raises(UserError, match=r"data\.segmentation must be given"):
            segment_names(settings)
        return
    with pytest.raises(UserError) as raised:
        parse(DataSettings, tree, "data")
    assert text in str(raised.value)
    assert mask_classes(parse(DataSettings, {"source": "scenes"}, "data")) is None


def test_photographs_with_masks(shared: Path) -> None:
    """Real masks of COCO: every value in them is in its list, and 0 is ignored."""
    tree = {"source": "shards", "root": str(shared / "data" / "coco_small"), "train": "*train*.tar", "val": "*val*.tar",
            "segmentation": {"classes": "segmentation_classes.txt", "ignore": 0}}
    settings = parse(DataSettings, tree, "data")
    train, val = open_splits(settings)
    assert (len(train), len(val)) == (70, 68)
    names, seen = segment_names(settings), set[int]()
    for index in range(len(val)):
        sample = val.read(index)
        assert sample.segmentation is not None
        assert sample.segmentation.shape == sample.image.size[::-1]
        seen |= set(np.unique(sample.segmentation).tolist())
    assert max(seen) < len(names)
    assert {"person", "sky-other-merged"} <= {names[number] for number in seen if number >= 0}
