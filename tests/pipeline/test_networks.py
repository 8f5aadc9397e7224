"""A pipeline whose later stage cannot be built says so before the first one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eva_mim.core.errors import UserError
from eva_mim.pipeline.networks import check_networks
from eva_mim.pipeline.plan import plan
from eva_mim.pipeline.preview import as_table
from eva_mim.pipeline.run import run_pipeline
from tests.conftest import REPOSITORY
from tests.tiny import CLASSIFY, CLIP, MIM, write_recipe

CHAIN: list[dict[str, Any]] = [
    {"name": "first", "program": "clip", "recipe": "clip.yaml"},
    {"name": "masked", "program": "mim", "recipe": "mim.yaml", "teacher": "first"},
    {"name": "tower", "program": "clip", "recipe": "clip.yaml", "init_from": "masked", "text_from": "first",
     "settings": {"student.text": {"init_from": "x"}}},
    {"name": "target", "program": "classify", "recipe": "classify.yaml", "init_from": "tower"},
]


def chain(folder: Path, stages: list[dict[str, Any]] = CHAIN) -> str:
    """A pipeline file with its recipes, all for 32 px and patches of 4."""
    student = {"name": "vit_nano_patch4_32"}
    text = {"student": student | {key: value for key, value in CLIP["student"].items() if key != "name"}}
    for name, tree in (("clip", CLIP | text), ("mim", MIM | {"student": student, "teacher": {"kind": "stage", "name": "x"}}),
                       ("classify", CLASSIFY | {"student": student})):
        write_recipe(folder, tree, f"{name}.yaml")
    here = [stage | {"recipe": str(folder / stage["recipe"])} for stage in stages]
    return str(write_recipe(folder, {"stages": here}, "pipeline.yaml"))


def refused(folder: Path, *overrides: str, stages: list[dict[str, Any]] = CHAIN) -> str:
    """Of a dry run and of a real one, which leaves nothing behind."""
    said = []
    for command in (as_table, run_pipeline):
        with pytest.raises(UserError) as error:
            command(chain(folder, stages), list(overrides), folder / "out")
        said.append(str(error.value))
    assert said[0] == said[1]
    assert not (folder / "out" / "first").exists()
    return said[0]


def test_a_chain_that_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a warning of open_clip that a planned parent has no weights."""
    table = as_table(chain(tmp_path), [], tmp_path / "out").splitlines()
    assert [line.split()[0] for line in table[1:5]] == ["first", "masked", "tower", "target"]
    assert caplog.records == []


def test_a_setting_for_all_stages_that_one_cannot_have(tmp_path: Path) -> None:
    """open_clip builds a tower by its name alone."""
    said = refused(tmp_path, "student.patch_size=16")
    assert said.count("stage ") == 1  # those that build on it are not looked at
    assert said.startswith("stage first: student: open_clip builds vit_nano_patch4_32 by its name alone (32 px)")


def test_a_trunk_that_does_not_fit_its_parent(tmp_path: Path) -> None:
    said = refused(tmp_path, "target.student.name=vit_mini_patch4_32")
    assert f"stage target: init_from: {tmp_path / 'out' / 'tower'} is of another architecture" in said
    assert "blocks.0.attn.proj.bias: [96] in the checkpoint, [128] here" in said


def test_a_teacher_with_another_grid_and_a_student_of_another_kind(tmp_path: Path) -> None:
    """All mistakes come at once."""
    stages = [*CHAIN[:2], {"name": "alone", "program": "classify", "recipe": "classify.yaml", "init_from": "first"}]
    said = refused(tmp_path, "masked.student.patch_size=8", "alone.student.name=convnet_nano_32", stages=stages)
    assert "stage masked: student grid 4x4 (32 px) does not match teacher grid 8x8 (32 px)" in said
    assert "stage alone: init_from" in said


def test_sizes_that_are_resized_fit(tmp_path: Path) -> None:
    """Positions and the patch kernel of a later stage are made from those of the planned one."""
    words = ["target.student.image_size=64", "target.student.patch_size=8"]
    assert "target" in as_table(chain(tmp_path), words, tmp_path / "out")


def test_a_text_tower_of_another_size(tmp_path: Path) -> None:
    said = refused(tmp_path, "tower.student.text.width=64")
    assert "stage tower: student.text.width=64: the text tower of first has 32" in said


def test_a_file_of_others_is_matched_too(tmp_path: Path) -> None:
    (tmp_path / "no.pt").write_bytes(b"?")
    settings = {"init_from": str(tmp_path / "no.pt")}
    alone = [{"name": "alone", "program": "classify", "recipe": "classify.yaml", "settings": settings}]
    assert "stage alone: init_from:" in refused(tmp_path, stages=alone)


QUICK = ("demo", "own_images_cpu", "vit_s16_1x24gb", "eva_l")
"""Pipelines that are checked in each run of the tests; the interleaved one among them."""


@pytest.mark.parametrize("name", [
    pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.long)
    for path in sorted((REPOSITORY / "configs" / "pipelines").glob("*.yaml")) if path.stem != "eva02_e"
])
def test_the_shipped_pipelines_fit(name: str, tmp_path: Path) -> None:
    """Without data, weights and caches, whose teachers are taken in their place."""
    path = str(REPOSITORY / "configs" / "pipelines" / f"{name}.yaml")
    cached = [stage.entry.name for stage in plan(path, [], tmp_path)[1] if "targets.cached" in stage.entry.settings]
    check_networks(plan(path, [f"{stage}.targets.cached=null" for stage in cached], tmp_path)[1], set())


def test_a_pipeline_that_begins_with_a_cache_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"targets\.cached: caches/cifar10 does not exist; `eva-mim cache` writes it"):
        as_table(str(REPOSITORY / "configs" / "pipelines" / "cifar10_views.yaml"), [], tmp_path)


def test_a_pipeline_that_begins_with_a_released_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init_from: weights/EVA02_E_psz14\.pt does not exist"):
        as_table(str(REPOSITORY / "configs" / "pipelines" / "eva02_e.yaml"), [], tmp_path)
