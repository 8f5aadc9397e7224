"""Heads of other classes: which rows are taken from a parent's head, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.settings import override, parse
from eva_mim.students import ClassifierSettings
from eva_mim.weights.handover import read_parent, seed_trunk
from eva_mim.weights.head_rows import seed_head
from finetune.classify import StageRecipe, build
from tests.tiny import CLASSIFY
from tests.weights.test_handover import trunk, write_stage

ANIMALS = ("ant", "bee", "cat", "dog", "eel")
"""Of the parent's head."""


def seeded(
    folder: Path, classes: tuple[str, ...], name: str = "vit_nano_patch4_32", recorded: Any = ANIMALS, **settings: Any
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], KeyReport]:
    """(child, its state before, the parent's state, report) of a hand-over with `classes`."""
    parent = trunk(1, name, num_classes=len(ANIMALS))
    write_stage(folder / "parent", parent, classes=list(recorded) if recorded else None)
    child = trunk(2, name, num_classes=len(classes))
    before = {key: value.clone() for key, value in child.state_dict().items()}
    source = read_parent(folder / "parent")
    report = seed_trunk(child, source, classes=classes)
    seed_head(child, source, ClassifierSettings(name=name, **settings), classes, report)
    return child, before, parent.state_dict(), report


@pytest.mark.parametrize(("name", "head"), [("vit_nano_patch4_32", "head"), ("convnet_nano_32", "head.fc")])
def test_shared_classes_get_their_rows_and_the_others_stay_new(tmp_path: Path, name: str, head: str) -> None:
    classes = ("eel", "fox", "ant", "cat")
    child, before, parent, report = seeded(tmp_path, classes, name, head_rows="shared")
    for kind in ("weight", "bias"):
        for row, given in enumerate(classes):
            found, key = child.state_dict()[f"{head}.{kind}"][row], f"{head}.{kind}"
            assert torch.equal(found, parent[key][ANIMALS.index(given)] if given in ANIMALS else before[key][row])
        assert f"{head}.{kind}" in report.resized
        assert report.reasons[f"{head}.{kind}"] == "rows of 3 of 4 classes, from a head for 5"
    assert not set(report.new + report.ignored) & {f"{head}.weight", f"{head}.bias"}
    others = [key for key in parent if not key.startswith(f"{head}.")]
    assert all(torch.equal(child.state_dict()[key], parent[key]) for key in others)


def test_the_same_classes_in_another_order_are_the_parents_head_in_that_order(tmp_path: Path) -> None:
    child, _, parent, _ = seeded(tmp_path, ANIMALS[::-1], head_rows="all")
    assert torch.equal(child.state_dict()["head.weight"], parent["head.weight"].flip(0))


def test_synset_ids_tell_classes_whatever_stands_beside_them(tmp_path: Path) -> None:
    recorded = tuple(f"n0000000{number} {name}" for number, name in enumerate(ANIMALS))
    child, _, parent, _ = seeded(tmp_path, ("n00000003", "n00000001"), recorded=recorded, head_rows="all")
    assert torch.equal(child.state_dict()["head.bias"], parent["head.bias"][[3, 1]])


def test_a_head_that_was_kept_is_left_alone(tmp_path: Path) -> None:
    child, _, parent, report = seeded(tmp_path, ANIMALS, head_rows="all")
    assert torch.equal(child.state_dict()["head.weight"], parent["head.weight"])
    assert "head.weight" in report.loaded


def test_missing_rows_are_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has rows for 2 of the 4 classes .*, not for fox, gnu; use shared"):
        seeded(tmp_path, ("ant", "fox", "bee", "gnu"), head_rows="all")
    for rows in ("all", "shared"):
        with pytest.raises(UserError, match=r"has rows for 0 of the 2 classes .*; use new"):
            seeded(tmp_path, ("fox", "gnu"), head_rows=rows)


def test_a_head_without_a_class_list_needs_to_be_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not name the classes of its head; set student.head_classes \(a file with its 5"):
        seeded(tmp_path, ("ant", "bee"), recorded=None, head_rows="all")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(ANIMALS))
    child, _, parent, _ = seeded(tmp_path, ("dog", "bee"), recorded=None, head_rows="all", head_classes=str(names))
    assert torch.equal(child.state_dict()["head.weight"], parent["head.weight"][[3, 1]])
    with pytest.raises(UserError, match="has 5 rows, its class list 1000 classes"):
        seeded(tmp_path, ("dog", "bee"), recorded=None, head_rows="all", head_classes="imagenet-1k")
    with pytest.raises(UserError, match=r"the head of .* is for no layout of ImageNet"):
        seeded(tmp_path, ("dog", "bee"), head_rows="all", head_classes="imagenet-1k")


def test_a_parent_without_head_is_refused(tmp_path: Path) -> None:
    write_stage(tmp_path / "parent", trunk(1))
    child, source = trunk(2, num_classes=2), read_parent(tmp_path / "parent")
    report = seed_trunk(child, source, classes=("ant", "bee"))
    settings = ClassifierSettings(name="vit_nano_patch4_32", head_rows="shared")
    with pytest.raises(UserError, match=r"has no head\.weight; use new"):
        seed_head(child, source, settings, ("ant", "bee"), report)


def test_the_program_seeds_the_rows_and_reports_them(tmp_path: Path) -> None:
    """Shapes of the scenes in another order, one of them unknown to the parent."""
    recipe = parse(StageRecipe, CLASSIFY, "recipe")
    classes = build(recipe, torch.device("cpu")).classes
    assert classes is not None
    known = classes[:0:-1]
    parent = trunk(1, num_classes=len(known), global_pool="avg", patch_size=8)
    write_stage(tmp_path / "parent", parent, classes=list(known))
    tree = CLASSIFY | {"init_from": str(tmp_path / "parent"), "student": CLASSIFY["student"] | {"head_rows": "shared"}}
    built = build(parse(StageRecipe, tree, "recipe"), torch.device("cpu"))
    head = built.parts.task.student.trunk.head  # type: ignore[union-attr]
    assert torch.equal(head.weight[1:], parent.head.weight.flip(0))  # type: ignore[operator, union-attr]
    assert head.weight[0].abs().max() < 0.001 < parent.head.weight.abs().min(0).values.max()  # type: ignore[operator, union-attr]
    assert built.seeded is not None
    assert sorted(built.seeded.resized) == ["head.bias", "head.weight"]
    with pytest.raises(UserError, match=f"not for {classes[0]}; use shared"):
        build(parse(StageRecipe, override(tree, ["student.head_rows=all"]), "recipe"), torch.device("cpu"))


def test_rows_need_a_parent() -> None:
    tree = CLASSIFY | {"student": CLASSIFY["student"] | {"head_rows": "all"}}
    with pytest.raises(UserError, match=r"student\.head_rows=all needs init_from"):
        parse(StageRecipe, tree, "recipe")
    tree = CLASSIFY | {"student": CLASSIFY["student"] | {"head_classes": "imagenet-1k"}}
    with pytest.raises(UserError, match=r"student\.head_classes is of use with student\.head_rows"):
        parse(StageRecipe, tree, "recipe")
