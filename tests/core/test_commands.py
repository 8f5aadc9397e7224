"""The records of commands: each leads to a module with what its caller uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from eva_mim import cli
from eva_mim.commands import data
from eva_mim.core.errors import UserError
from eva_mim.core.settings import as_tree
from eva_mim.pipeline.plan import plan, sections
from tests.tiny import write_recipe


@pytest.mark.parametrize("line", [[name] for name in cli.COMMANDS] + [["data", name] for name in data.COMMANDS], ids=" ".join)
def test_every_command_tells_its_use(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*line, "--help"])
    assert left.value.code == 0
    assert f"usage: eva-mim {' '.join(line)}" in capsys.readouterr().out


def one_stage(folder: Path, name: str) -> str:
    """A pipeline of one linear probe."""
    stage = {"name": name, "program": "probe", "recipe": "configs/probe/scenes.yaml", "settings": {"init_from": "x"}}
    return str(write_recipe(folder, {"stages": [stage]}, f"{name}.yaml"))


@pytest.mark.parametrize("name", ["data", "teacher", "teachers", "contrastive", "init_from"])
def test_a_stage_of_a_pipeline_has_no_sections_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"stage name '{name}' is used twice or is a recipe's section"):
        plan(one_stage(tmp_path, name), [], tmp_path)


def test_a_stage_named_as_its_program_comes_before_the_section(tmp_path: Path) -> None:
    assert "probe" in sections()
    changes = ["probe.run.epochs=3", "probe.probe.select=0.2"]
    _, (stage,) = plan(one_stage(tmp_path, "probe"), changes, tmp_path)
    assert stage.assignments[-2:] == ["run.epochs=3", "probe.select=0.2"]
    assert as_tree(stage.recipe)["run"]["epochs"] == 3
    assert as_tree(stage.recipe)["probe"]["select"] == 0.2
