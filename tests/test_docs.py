"""The commands of README and docs: each would start as it stands there; files and targets that they name exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eva_mim import cli
from eva_mim.commands.pipeline import pipeline_parser
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.resolve import resolve
from eva_mim.pipeline.plan import plan
from eva_mim.run import program
from eva_mim.run.program import stage_parser
from tests.conftest import REPOSITORY
from tools import table_plot

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PLACEHOLDERS = ("RECIPE", "recipe.yaml", "photos.yaml")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's blocks of shell."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and "=" not in words[0] and "SRC" not in words:
                yield words


EVERY = [(page.name, words) for page in PAGES for words in commands(page)]


def stage_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(program, arguments) of a command that trains a stage, also under torchrun or as a module."""
    modules = {command.place.partition(":")[0]: name for name, command in PROGRAMS.items()}
    if "-m" in words and (module := words[words.index("-m") + 1]) in modules:
        return modules[module], words[words.index("-m") + 2 :]
    return (words[1], words[2:]) if words[0] == "eva-mim" and words[1] in PROGRAMS else None


def test_there_are_commands_of_every_kind() -> None:
    known = {words[1] for _, words in EVERY if words[0] == "eva-mim"}
    assert known >= {*PROGRAMS, "pipeline", "features", "convert", "inspect", "evaluate", "data", "teacher"}
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize(("page", "words"), EVERY, ids=[f"{page}-{' '.join(words)[:60]}" for page, words in EVERY])
def test_a_command_would_start(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stages and pipelines: recipe and settings fit. Other commands: so do the options. Nothing is run."""
    monkeypatch.chdir(REPOSITORY)
    if stage := stage_of(words):
        options = stage_parser(stage[0]).parse_intermixed_args(stage[1])
        if not options.recipe.startswith(PLACEHOLDERS):
            resolve(lookup(PROGRAMS, stage[0], "program").recipe, read_yaml(options.recipe), options.overrides, options.recipe)
    elif words[:2] == ["eva-mim", "pipeline"]:
        found = pipeline_parser().parse_intermixed_args(words[2:])
        if not found.pipeline.startswith(PLACEHOLDERS):
            assert plan(found.pipeline, found.overrides, found.out)[1]
    elif words[0] == "eva-mim":
        asked: list[Any] = []

        def instead(work: Any) -> int:
            asked.append(work)
            return 0

        module = importlib.import_module(cli.COMMANDS[words[1]].place)
        monkeypatch.setattr(program, "guard", instead)
        monkeypatch.setattr(module, "guard", instead, raising=False)
        assert cli.main(words[1:]) == 0
        assert len(asked) == 1
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif "-m" in words and (name := words[words.index("-m") + 1]).startswith("tools."):
        place = REPOSITORY / "tools" / name.partition(".")[2]
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:tests|tools|configs|eva_mim|docs)/[\w/.-]+\.(?:py|yaml|md))`", text):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("picture", table_plot.PICTURES, ids=lambda picture: picture.name)
def test_a_plot_is_that_of_its_table(picture: table_plot.Picture) -> None:
    docs = REPOSITORY / "docs"
    assert (docs / picture.name).read_text() == table_plot.drawn(
        table_plot.rows((docs / picture.page).read_text(), picture), picture)


@pytest.mark.parametrize("picture", table_plot.LINES, ids=lambda picture: picture.name)
def test_lines_are_those_of_their_table(picture: table_plot.Lines) -> None:
    docs = REPOSITORY / "docs"
    assert (docs / picture.name).read_text() == table_plot.lined((docs / picture.page).read_text(), picture)


def test_lines_of_a_table() -> None:
    """Two rows over 16, 32 and 64: places by hand on axes of 464 x 224 pixels."""
    picture = table_plot.Lines("x.svg", "x.md", "student", "a title", 0.0, 1.0)
    text = "| student | 16 | 32 | 64 | more |\n|---|---|---|---|---|\n| a | 0.5 | 1.0 | 0.0 | x |\n| b & c | 0 | 0 | 0 | y |\n\n"
    drawn = table_plot.lined(text, picture)
    assert '<polyline points="48.0,160.0 202.7,48.0 512.0,272.0" fill="none" stroke="#4c78a8"' in drawn
    assert ">b &amp; c</text>" in drawn
    assert drawn.count("<polyline") == 2


def test_a_plotted_row_has_the_figures_of_all_seeds() -> None:
    table = table_plot.rows((REPOSITORY / "docs" / "results.md").read_text(), table_plot.PICTURES[0])
    assert [len(row.figures) for row in table] == [3, 1, 3, 1, 3]
