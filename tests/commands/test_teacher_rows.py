"""`eva-mim teacher check` of a recipe with several teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from eva_mim.cli import main
from tests.targets.test_groups import recipe as groups
from tests.targets.test_lessons import held_out
from tests.tiny import MIM, teacher_file, write_recipe


def recipe(folder: Path, **more: Any) -> Path:
    network = {"kind": "timm", "name": "vit_nano_patch4_32", "weights": str(teacher_file(folder))}
    teachers: dict[str, Any] = {
        "vit": network | {"image_size": "match", "layer": 1},
        "patches": {"kind": "pixels", "name": "patch4", "image_size": "match", "head": {"upsample": 2},
                    "objective": {"kind": "mse"}, "normaliser": {"kind": "channel"}},
        "sam": {"kind": "timm", "name": "samvit_base_patch16", "image_size": 64, "objective": {"kind": "mse"}},
    }
    return write_recipe(folder, {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teachers": teachers, "objective": {"kind": "mse", "summary": "angle"}, "normaliser": {"kind": "phi_s"},
        "groups": {"near": {"teachers": ["vit", "patches"], "batch": 16}, "far": {"teachers": ["sam"], "batch": 8}},
    } | more)


def test_a_row_for_each_teacher_beside_the_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teacher", "check", str(recipe(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = out.splitlines()
    assert lines[0].startswith("student vit_nano_patch4_32: 32 px, 4x4 patches, ")
    rows = {line.split()[0]: line.split() for line in lines if line[:1].isalpha()}
    assert rows["vit"][1:4] == ["16", "4x4", "96"]  # match: 4 patches of 4 px
    assert rows["patches"][1:4] == ["32", "8x8", "48"]  # twice as fine as the student's
    assert rows["sam"][1:4] == ["64", "4x4", "768"]
    assert rows["sam"][5] == "-"
    assert sum(float(rows[name][7].rstrip("%")) for name in ("vit", "patches", "sam")) <= 101
    assert "  patches: block 1 of 0 to 3, last norm; loss mse, normaliser phi_s" in lines
    assert "  summary: pooled, width 96; loss angle" in lines
    assert "  patches: block 11 of 0 to 11; loss mse, normaliser phi_s" in lines
    assert "  summary: it has none" in lines
    assert "  groups: far" in lines


@torch.no_grad()
def test_its_figures_are_those_of_plain_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scale of patches and spread of summaries, on the first 32 built-in drawings."""
    assert main(["teacher", "check", str(recipe(tmp_path))]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("vit ")]
    teacher = timm.create_model("vit_nano_patch4_32", num_classes=0, img_size=16).eval()
    teacher.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    images = held_out(16, val=32)
    output, (cells,) = teacher.forward_intermediates(images, indices=[1], norm=False)
    patches = teacher.norm(cells.flatten(2).transpose(1, 2))
    assert float(row[4]) == pytest.approx(patches.std().item(), rel=1e-3)
    unit = torch.nn.functional.normalize(teacher.forward_head(output), dim=1).double()
    angles = (unit @ torch.nn.functional.normalize(unit.sum(0), dim=0)).clamp(max=1).arccos().square().mean()
    assert float(row[5]) == pytest.approx(angles.item(), abs=1e-3)


def test_a_teacher_that_follows_the_student_is_told_with_its_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teacher", "check", str(groups(tmp_path)), "groups.far.image_size=[64, 32, 48]"]) == 0
    assert "  follows the student's sizes: 16, 24, 32 px" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["teachers.sam.image_size=96"], "does not match teachers.sam grid 6x6 (96 px)"),
        (["--student", "vit_tiny_patch16_224"], "has a student of its own; change it by student.name=NAME"),
        (["objective.summary=cosine", "teachers.sam.objective=null"], "teachers.sam (samvit_base_patch16) has no summary"),
        (["--name", "vit"], "teachers.vit.image_size=match: there is no student here"),
    ],
)
def test_what_cannot_fit_is_refused(tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teacher", "check", str(recipe(tmp_path)), *more]) == 2
    assert said.replace("teachers.vit", "teacher" if "--name" in more else "teachers.vit") in capsys.readouterr().err
