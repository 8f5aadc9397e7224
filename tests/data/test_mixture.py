"""Mixtures: exact shares, no image twice before all others of its part, and the position is a function of the step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from eva_mim.core.errors import UserError
from eva_mim.core.settings import as_tree, parse
from eva_mim.data import DataSettings
from eva_mim.data.loader import TrainLoader
from eva_mim.data.preparation import MaskedPreparation
from eva_mim.data.sampler import MixedOrder, MixedPart, Place, take_turns, whole_weights
from eva_mim.data.splits import open_splits
from eva_mim.data.subset import Mixture
from eva_mim.data.view_settings import ViewSettings
from eva_mim.data.views import TrainView
from tests.conftest import make_folder, make_shards, picture

PARTS = [(7, 2.0), (30, 1.0), (5, 0.5)]


def mixed(parts: list[tuple[int, float]]) -> list[MixedPart]:
    return [MixedPart(*part) for part in parts]


def stream(steps: int, parts: list[tuple[int, float]] = PARTS, **more: Any) -> list[Place]:
    order = MixedOrder(mixed(parts), **{"seed": 1, "global_batch": 6, "micro_batch": 6} | more)
    return [place for step in range(steps) for place in order.global_step(step)]


def part_of(index: int, parts: list[tuple[int, float]] = PARTS) -> tuple[int, int]:
    """(part, index within it), by counting."""
    for part, (size, _) in enumerate(parts):
        if index < size:
            return part, index
        index -= size
    raise AssertionError


def test_shares_are_those_of_the_weights_everywhere() -> None:
    """After any number of samples no part is more than one sample away from its share: weights 4 : 2 : 1."""
    counts = Counter[int]()
    for position, place in enumerate(stream(70), start=1):
        counts[part_of(place.index)[0]] += 1
        for part, weight in enumerate((4, 2, 1)):
            assert abs(counts[part] - position * weight / 7) <= 1
    assert counts == {0: 240, 1: 120, 2: 60}


def test_each_part_runs_through_its_images_pass_after_pass() -> None:
    """Without replacement within a pass, over the ends of epochs; passes differ in order; `epoch` is the pass."""
    seen: dict[int, list[Place]] = {0: [], 1: [], 2: []}
    for place in stream(70):
        seen[part_of(place.index)[0]].append(place)
    for part, (size, _) in enumerate(PARTS):
        passes = [seen[part][start : start + size] for start in range(0, len(seen[part]) - size + 1, size)]
        assert len(passes) >= 4
        for number, places in enumerate(passes):
            assert {place.epoch for place in places} == {number}
            assert sorted(part_of(place.index) for place in places) == [(part, inner) for inner in range(size)]
        assert len({tuple(place.index for place in places) for places in passes}) > 1
    assert stream(70) == stream(70)
    assert stream(70, seed=2) != stream(70)


def test_an_epoch_is_as_many_images_as_all_parts() -> None:
    order = MixedOrder(mixed(PARTS), seed=1, global_batch=6, micro_batch=6)
    assert (order.samples, order.steps_per_epoch) == (42, 7)


def test_a_step_does_not_depend_on_where_one_starts() -> None:
    whole = MixedOrder(mixed(PARTS), seed=1, global_batch=6, micro_batch=6)
    expected = [whole.global_step(step) for step in range(40)]
    for step in (39, 3, 17, 0, 4000, 16):
        other = MixedOrder(mixed(PARTS), seed=1, global_batch=6, micro_batch=6).global_step(step)
        assert other == (expected[step] if step < 40 else whole.global_step(step))


@pytest.mark.parametrize(("world", "micro"), [(2, 3), (3, 1), (1, 2)])
def test_ranks_and_accumulation_cut_the_same_step(world: int, micro: int) -> None:
    whole = MixedOrder(mixed(PARTS), seed=1, global_batch=6, micro_batch=6)
    cuts = [list(MixedOrder(mixed(PARTS), seed=1, global_batch=6, micro_batch=micro, rank=rank, world=world).micro_steps(2, 3))
            for rank in range(world)]
    assert [place for turn in zip(*cuts, strict=True) for places in turn for place in places] == whole.global_step(2)


def test_weights_are_taken_as_written() -> None:
    assert whole_weights([2, 1]) == [2, 1]
    assert whole_weights([0.7, 0.3]) == [7, 3]
    assert whole_weights([0.1, 0.2, 1e-3]) == [100, 200, 1]
    assert take_turns([2, 1]).tolist() == [0, 1, 0]
    assert sorted(take_turns([5, 3]).tolist()) == [0] * 5 + [1] * 3
    with pytest.raises(UserError, match="round the weights"):
        whole_weights([0.123456789, 1.0])


# ---- sources


def settings(root: Path, **more: Any) -> dict[str, Any]:
    make_folder(root / "f", {"ant": 3, "bee": 2})
    make_shards(root / "s", "train-0.tar", count=8)
    make_shards(root / "s", "val-0.tar", first=8, count=4)
    parts = [
        {"weight": 2, "root": str(root / "f")},
        {"source": "shards", "root": str(root / "s"), "train": "train-*", "val": "val-*"},
    ]
    return {"mixture": parts} | more


def test_parts_stand_one_after_another_and_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = parse(DataSettings, settings(tmp_path, templates=["a {}", "the {}"]), "recipe")
    assert parse(DataSettings, as_tree(data), "resolved") == data  # what a run writes is read again
    train, val = open_splits(data)
    assert (len(train), len(val)) == (13, 4)
    said = capsys.readouterr().err
    assert "data.mixture: an epoch is 13 images" in said
    assert "5 training images, 0 held out, weight 2: 66.67% of the samples, 1.73 passes an epoch" in said
    assert "8 training images, 4 held out, weight 1: 33.33% of the samples, 0.542 passes an epoch" in said
    assert train.key(4) == "0:bee/00001.png"
    assert train.key(5) == "1:train-0.tar/00000"
    assert train.classes is None
    assert train.read(4)[:4] == (train.key(4), picture(4), None, ("a bee", "the bee"))
    assert train.read(12)[:4] == (train.key(12), picture(7), None, ("picture 7",))
    assert val.read(3)[2:4] == (None, ("picture 11",))


def test_equal_classes_keep_their_labels_and_differing_numbers_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        make_folder(tmp_path / name, {"x": 4, "y": 4})
    parts = [{"root": tmp_path / name, "val_share": 0.25} for name in "ab"]
    train, val = open_splits(parse(DataSettings, {"mixture": parts, "expected": 12}, "recipe"))
    assert train.classes == val.classes == ("x", "y")
    for split, count in ((train, 12), (val, 4)):
        assert [split.read(index).label for index in range(count)] == ["xy".index(split.key(i)[2]) for i in range(count)]
    with pytest.raises(UserError, match=r"written for 11 training images, but the mixture has 12"):
        open_splits(parse(DataSettings, {"mixture": parts, "expected": 11}, "recipe"))


def test_a_mixture_trains_without_replacement_through_the_loader(tmp_path: Path) -> None:
    train, _ = open_splits(parse(DataSettings, settings(tmp_path), "recipe"))
    assert isinstance(train, Mixture)
    assert train.parts == [MixedPart(5, 2.0), MixedPart(8, 1.0)]

    def steps(first: int, last: int) -> list[Any]:
        order = MixedOrder(train.parts, seed=1, global_batch=6, micro_batch=6)
        made = MaskedPreparation(TrainView(ViewSettings(), [16]), 1)
        return [batch for (batch,) in TrainLoader(train, made, order, 0).steps(first, last)]

    whole = steps(0, 8)
    counts = Counter(int(index) for batch in whole for index in batch.index)
    assert {counts[index] for index in range(5)} <= {6, 7}  # 32 samples over 5 images
    assert {counts[index] for index in range(5, 13)} == {2}  # 16 samples over 8
    for before, after in zip(whole[5:], steps(5, 8), strict=True):
        assert torch.equal(before.index, after.index)
        assert torch.equal(before.views[16], after.views[16])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"mixture": [{"root": "x", "weight": 0}]}, r"mixture\.0\.weight: .*greater than 0 \(got 0\)"),
        ({"mixture": [{"root": "x", "weight": -1}]}, r"mixture\.0\.weight: .*greater than 0"),
        ({"mixture": [{"weight": 1}]}, r"data\.root must be given"),
        ({"mixture": []}, r"mixture: .*at least 1"),
        ({"mixture": [{"root": "x"}], "root": "y"}, r"data\.root belongs to one source: set it in the parts"),
        ({"mixture": [{"root": "x"}], "captions": "y"}, r"data\.captions belongs to one source"),
        ({"mixture": [{"root": "x", "templates": ["{}"]}]}, r"mixture\.0\.templates: no such setting"),
    ],
)
def test_mistakes_of_a_mixture_are_named(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(DataSettings, tree, "recipe")


def test_a_mixture_needs_held_out_images(tmp_path: Path) -> None:
    make_folder(tmp_path, {"": 4})
    with pytest.raises(UserError, match=r"no held-out images; give a part val, a val_share above 0, or data.held_out"):
        open_splits(parse(DataSettings, {"mixture": [{"root": tmp_path}]}, "recipe"))


@pytest.mark.parametrize("templates", [["no place"], ["a {}", "none here"], [], "everything"])
def test_templates_that_cannot_be_filled_are_refused(tmp_path: Path, templates: Any) -> None:
    with pytest.raises(ValidationError, match=r"data\.templates"):
        DataSettings.model_validate({"root": tmp_path, "templates": templates})
