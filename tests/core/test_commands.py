"""The records of commands: each leads to a module with what its caller uses."""

from __future__ import annotations

import pytest

from eva_mim import cli
from eva_mim.commands import data
from eva_mim.pipeline.plan import sections


@pytest.mark.parametrize("line", [[name] for name in cli.COMMANDS] + [["data", name] for name in data.COMMANDS], ids=" ".join)
def test_every_command_tells_its_use(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*line, "--help"])
    assert left.value.code == 0
    assert f"usage: eva-mim {' '.join(line)}" in capsys.readouterr().out


def test_a_stage_of_a_pipeline_has_no_sections_name() -> None:
    assert {"data", "teacher", "probe", "contrastive", "init_from"} <= sections()
