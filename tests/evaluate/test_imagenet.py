"""Test sets of ImageNet in hand-made folders: what is right for each image, what competes, and what is counted."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from eva_mim.core.batches import LabelledBatch
from eva_mim.core.contracts import Sample
from eva_mim.core.errors import UserError
from eva_mim.data.class_lists import layout_classes
from eva_mim.data.views import EvalView
from eva_mim.evaluate.accuracy import Accuracy, as_csv, as_table, count
from eva_mim.evaluate.imagenet import Variant, columns, open_variant, without_border
from tests.conftest import picture, png

ONE_K = layout_classes("imagenet-1k")
IMAGE = png(picture(0, (10, 8)))


def folders(root: Path, names: Iterable[str], files: Iterable[str] = ("x.png",)) -> Path:
    """`root/NAME/FILE` for every name and file, all of them one picture."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            (root / name / file).write_bytes(IMAGE)
    return root


def answers(variant: Variant) -> dict[str, set[str]]:
    """Path of an image -> names of its right classes."""
    found = {}
    for index in range(len(variant.source)):
        label = variant.source.read(index).label
        assert label is not None
        found[variant.source.key(index)] = {variant.classes[right] for right in variant.answers[label]}
    return found


def test_folders_of_v2_are_numbers_of_classes(tmp_path: Path) -> None:
    """Sorted as text, "10" comes before "2"."""
    found = open_variant("v2", folders(tmp_path, map(str, range(1000))), ONE_K)
    assert found.classes == ONE_K
    assert answers(found) == {f"{number}/x.png": {name} for number, name in enumerate(ONE_K)}


@pytest.mark.parametrize(("name", "layout"), [("a", "imagenet-a"), ("r", "imagenet-r"), ("sketch", "imagenet-1k")])
def test_only_the_classes_of_a_set_compete(tmp_path: Path, name: str, layout: str) -> None:
    names = layout_classes(layout)
    found = open_variant(name, folders(tmp_path, names), ONE_K)
    assert answers(found) == {f"{synset}/x.png": {synset} for synset in names}
    assert [ONE_K[column] for column in columns(found, ONE_K)] == list(names)
    with pytest.raises(UserError, match=f"the head has no output for 1 of {len(names)} classes: {names[3]}"):
        columns(found, tuple(given for given in ONE_K if given != names[3]))
    (tmp_path / names[0] / "x.png").unlink()
    folders(tmp_path, ["n99999999"])
    with pytest.raises(UserError, match=f"expected {len(names)} .*; 1 missing: {names[0]}; 1 not known: n99999999"):
        open_variant(name, tmp_path, ONE_K)


def test_real_labels_follow_the_names_of_the_files(tmp_path: Path) -> None:
    """Sorted by path, the images stand in another order; one has no label, and one has three."""
    for number, folder in enumerate(("b", "a", "b", "a", "c")):
        folders(tmp_path, [folder], [f"ILSVRC2012_val_{number + 1:08d}.JPEG"])
    (tmp_path / "real.json").write_text(json.dumps([[3], [7, 5, 9], [], [3], [5]]))
    found = open_variant("real", tmp_path, ONE_K)
    assert answers(found) == {
        "b/ILSVRC2012_val_00000001.JPEG": {ONE_K[3]},
        "a/ILSVRC2012_val_00000002.JPEG": {ONE_K[5], ONE_K[7], ONE_K[9]},
        "a/ILSVRC2012_val_00000004.JPEG": {ONE_K[3]},
        "c/ILSVRC2012_val_00000005.JPEG": {ONE_K[5]},
    }
    assert found.left_out == 1
    (tmp_path / "real.json").write_text(json.dumps([[3], [1000]]))
    with pytest.raises(UserError, match="a list of class numbers below 1000"):
        open_variant("real", tmp_path, ONE_K)
    (tmp_path / "real.json").unlink()
    with pytest.raises(UserError, match=r"5 images, but .*imagenet_real_labels.json has labels for 50000"):
        open_variant("real", tmp_path, ONE_K)


def objectnet(root: Path) -> Path:
    """Three objects: one that is two classes, one that is one, one that is none."""
    folders(root / "images", ["chair", "bench_press", "bell"])
    (root / "mappings").mkdir()
    tables = {
        "folder_to_objectnet_label": {"chair": "Chair", "bench_press": "Bench press", "bell": "Bell (small)"},
        "objectnet_to_imagenet_1k": {"Chair": "barber chair; folding chair, seat", "Bell (small)": "chime, gong"},
        "pytorch_to_imagenet_2012_id": {"423": 1, "559": 0, "494": 2},
    }
    for name, table in tables.items():
        (root / "mappings" / f"{name}.json").write_text(json.dumps(table))
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("folding chair, seat\nbarber chair\nchime, gong\n")
    return root


@pytest.mark.parametrize("inside", ["", "images"])
def test_objects_go_through_the_tables_of_objectnet(tmp_path: Path, inside: str) -> None:
    root = objectnet(tmp_path)
    found = open_variant("objectnet", root / inside, ONE_K)
    assert answers(found) == {"bell/x.png": {ONE_K[494]}, "chair/x.png": {ONE_K[423], ONE_K[559]}}
    assert (found.left_out, found.classes) == (1, ONE_K)
    first = open_variant("objectnet-first", root / inside, ONE_K)
    assert answers(first) == {"bell/x.png": {ONE_K[494]}, "chair/x.png": {ONE_K[423]}}
    view = EvalView([8], 1.0)
    inner = Image.open(root / "images" / "bell" / "x.png").crop((1, 1, 9, 7))  # the frame is cut off
    cut = without_border(found.border, view, found.source.read(0).image, random.Random())
    assert torch.equal(cut[8], view(inner, random.Random())[8])


def test_tables_and_folders_of_objectnet_that_do_not_fit(tmp_path: Path) -> None:
    root = objectnet(tmp_path)
    (root / "images" / "chair" / "x.png").unlink()
    with pytest.raises(UserError, match="1 of 2 class folders are missing: chair"):
        open_variant("objectnet", root, ONE_K)
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("folding chair, seat\n")
    with pytest.raises(UserError, match="do not fit together"):
        open_variant("objectnet", root, ONE_K)
    (root / "mappings" / "imagenet_to_label_2012_v2").unlink()
    with pytest.raises(UserError, match=r"imagenet_to_label_2012_v2: No such file"):
        open_variant("objectnet", root, ONE_K)


def test_a_held_out_folder_has_the_heads_classes_or_a_whole_layout(tmp_path: Path) -> None:
    own = ("cat", "ant", "bee")
    found = open_variant("val", folders(tmp_path / "own", own), own)
    assert answers(found) == {f"{name}/x.png": {name} for name in own}
    assert found.classes == own
    with pytest.raises(UserError, match="expected 3 class folders with images; 1 missing: bee"):
        open_variant("val", folders(tmp_path / "less", ("ant", "cat")), own)
    with pytest.raises(UserError, match=r"expected 3 .*; 3 missing: ant, bee, cat; 1 not known: \."):
        open_variant("val", folders(tmp_path / "flat", [""]), own)
    mini = layout_classes("mini-imagenet")
    found = open_variant("val", folders(tmp_path / "mini", mini), ONE_K)  # a smaller layout, on a larger head
    assert found.classes == mini
    with pytest.raises(UserError, match="no such test set; known: val, v2"):
        open_variant("c", tmp_path, own)
    with pytest.raises(UserError, match="not a folder"):
        open_variant("v2", tmp_path / "nowhere", own)


class Rows:
    """A source of so many images, which nobody reads."""

    classes, fingerprint = None, ""

    def __len__(self) -> int:
        return 0

    def key(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Sample:
        raise NotImplementedError


def test_counts_are_those_of_a_loop() -> None:
    """Several answers an image, some classes outside the competition, batches of any size."""
    draw = random.Random(0)
    own = tuple(f"n{number:08d}" for number in range(40))
    classes = tuple(draw.sample(own, 12))
    right = tuple(tuple(draw.sample(range(12), draw.choice([1, 1, 2, 3]))) for _ in range(9))
    logits = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    labels = [draw.randrange(9) for _ in range(60)]
    first, five, by_class = 0, 0, {name: [0, 0, 0] for name in classes}
    for row, label in zip(logits.tolist(), labels, strict=True):
        order = sorted(classes, key=lambda name, row=row: -row[own.index(name)])
        good = {classes[place] for place in right[label]}
        hit, near = order[0] in good, bool(good & set(order[:5]))
        first, five = first + hit, five + near
        for name in good:
            by_class[name] = [old + new for old, new in zip(by_class[name], (1, hit, near), strict=True)]
    batches = []
    for start, stop in ((0, 7), (7, 8), (8, 60)):
        images = torch.zeros(stop - start, 3, 2, 2, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.arange(start, stop)
        batches.append(LabelledBatch(torch.arange(start, stop), images, torch.tensor(labels[start:stop])))

    def model(images: Tensor) -> Tensor:
        return logits[images[:, 0, 0, 0].long()]

    found = count(Variant("x", Rows(), right, classes), model, own, batches, torch.device("cpu"), nullcontext)
    assert (found.images, found.right, found.right5) == (60, first, five)
    assert 0 < first < five < 60
    assert dict(zip(classes, found.by_class, strict=True)) == by_class
    table = [line.split(",") for line in as_csv([found]).splitlines()]
    assert table[0] == ["set", "class", "images", "top1", "top5"]
    shares = {line[1]: line[2:] for line in table[1:]}
    for name, (images, hits, nears) in by_class.items():
        percent = [f"{100 * value / images:.3f}" if images else "" for value in (hits, nears)]
        assert shares[name] == [str(images), *percent]


def test_average_and_gap_are_those_of_the_published_row() -> None:
    """EVA-02 L (EVA-02/asuka/README.md)."""
    published = {"val": 89.974, "v2": 82.43, "real": 91.075, "a": 87.72, "r": 89.907, "sketch": 70.131, "objectnet": 62.801}
    rows = [Accuracy(name, ("x",), 100_000, round(1000 * top1), 100_000, [[0, 0, 0]], 0) for name, top1 in published.items()]
    lines = as_table(rows).splitlines()
    assert lines[2].split() == ["v2", "100000", "82.430", "100.000", "1"]
    assert lines[-2].split()[:2] == ["average", "82.005"]
    assert lines[-1].split()[:2] == ["gap", "7.969"]
    assert as_csv(rows[:1]).splitlines()[1] == "val,x,0,,"  # a class without images has no figure
    assert "average" not in as_table(rows[:1])
