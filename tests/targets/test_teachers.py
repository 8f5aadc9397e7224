"""Several teachers: a run with a loss, a head and figures for each, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from eva_mim.core.errors import UserError
from eva_mim.core.settings import parse
from pretrain.mim_recipe import StageRecipe
from tests.tiny import MIM, losses, records, run, write_recipe

TEACHERS = {
    "vit": {"kind": "timm", "name": "vit_nano_patch4_32", "image_size": 16},
    "patches": {"kind": "pixels", "name": "patch8", "image_size": 32, "weight": 0.5},
}
TWO: dict[str, Any] = {name: value for name, value in MIM.items() if name != "teacher"} | {
    "teachers": TEACHERS, "run": MIM["run"] | {"epochs": 1},
}
ROUNDING = 2e-5
"""Largest difference of an fp32 loss of order 1."""


@pytest.mark.slow
def test_two_teachers_train_on_one_process_and_on_two(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TWO)
    run("mim", recipe, tmp_path / "one")
    run("mim", recipe, tmp_path / "two", "run.engine=deepspeed", "run.zero_stage=2", "run.micro_batch=6", processes=2)
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=ROUNDING)
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(one["loss_vit"] + 0.5 * one["loss_patches"], abs=1e-6)
        for name in ("loss_vit", "loss_patches", "cosine_vit", "target_norm_patches"):
            assert two[name] == pytest.approx(one[name], abs=1e-4), name
    figures = records(tmp_path / "one", "eval")[-1]
    for figure in ("cosine", "cosine_stripes", "cosine_of_mean"):
        assert figures[figure] == pytest.approx((figures[f"{figure}_vit"] + figures[f"{figure}_patches"]) / 2, abs=1e-6)
    record = json.loads((tmp_path / "two" / "lineage.json").read_text())
    assert record["teachers"].keys() == TEACHERS.keys()
    assert len(record["teachers"]["vit"]["sha256"]) == 64
    heads = load_file(tmp_path / "two" / "head.safetensors")
    assert (heads["head.vit.weight"].shape[0], heads["head.patches.weight"].shape[0]) == (96, 192)


def test_one_teacher_stands_for_itself_or_in_the_mapping() -> None:
    assert list(parse(StageRecipe, MIM, "recipe").all_teachers) == ["teacher"]
    recipe = parse(StageRecipe, TWO, "recipe")
    assert [settings.path for settings in recipe.all_teachers.values()] == ["teachers.vit", "teachers.patches"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (TWO | {"teacher": MIM["teacher"]}, r"give teacher, for one, or teachers.*teachers has vit, patches"),
        ({name: value for name, value in TWO.items() if name != "teachers"}, r"give teacher.*neither is given"),
        (TWO | {"teachers": {"vit": {"kind": "timm"}}}, r"teachers\.vit\.name: must be given"),
        (TWO | {"teachers": {"vit": TEACHERS["vit"] | {"layr": 1}}}, r"teachers\.vit\.layr.*did you mean teachers\.vit\.layer\?"),
        (TWO | {"teachers": {"a.b": {"name": "x"}}}, r"teachers\.a\.b"),
    ],
)
def test_mistakes_in_the_mapping_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(StageRecipe, settings, "recipe")


@pytest.mark.slow
def test_mistakes_of_a_teacher_are_named_by_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eva_mim.cli import main

    arguments = ["mim", str(write_recipe(tmp_path, TWO)), "--out", str(tmp_path / "run")]
    assert main([*arguments, "teachers.vit.layer=9"]) == 2
    assert "teachers.vit.layer: 9 does not exist" in capsys.readouterr().err
    assert main([*arguments, "teachers.patches.image_size=48"]) == 2
    assert "set teachers.patches.image_size=32" in capsys.readouterr().err
