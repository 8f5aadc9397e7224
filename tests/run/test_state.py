"""The state of a stage: what is done is answered at once, and one rank alone reads for all."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from eva_mim.core.run_folder import RunFolder
from eva_mim.core.settings import parse, take
from eva_mim.run.state import StageIdentity, state_of
from finetune.classify import StageRecipe
from tests.conftest import REPOSITORY
from tests.ranks import on_ranks
from tests.tiny import CLASSIFY, environment, write_recipe


def write_run(out: Path, tree: dict[str, Any] = CLASSIFY, **record: object) -> Path:
    """A finished run of the tiny classifier."""
    import numpy as np

    recipe = parse(StageRecipe, tree, "recipe")
    out.mkdir()
    identity = state_of("classify", recipe, out).identity
    made = {"finished": True, "identity": identity.identity, "settings": identity.settings, "parents": identity.parents,
            "metrics": {"top1": 25.0}}
    RunFolder(out).lineage.write_text(json.dumps(made | record))
    save_file({"a": np.zeros(2, np.float32)}, RunFolder(out).weights)
    return out


def test_what_a_folder_holds(tmp_path: Path) -> None:
    recipe = parse(StageRecipe, CLASSIFY, "recipe")
    assert state_of("classify", recipe, tmp_path / "none").plan() == "runs"
    done = state_of("classify", recipe, write_run(tmp_path / "done"))
    assert (done.finished, done.changes, done.plan()) == (True, [], "finished, is skipped")
    stopped = state_of("classify", recipe, write_run(tmp_path / "stopped", finished=False))
    assert (stopped.finished, stopped.changes, stopped.plan()) == (False, [], "runs")
    other = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 0.5})})
    changed = state_of("classify", other, tmp_path / "done")
    assert not changed.finished
    assert "optim.lr" in changed.plan()
    RunFolder(tmp_path / "done").weights.unlink()
    assert not state_of("classify", recipe, tmp_path / "done").finished


def test_a_setting_that_an_earlier_version_did_not_have_is_no_change_while_it_has_its_default(tmp_path: Path) -> None:
    """A new release must not run finished stages again."""
    def older(out: Path, *lacking: str, tree: dict[str, Any] = CLASSIFY) -> Any:
        recipe = parse(StageRecipe, tree, "recipe")
        identity = state_of("classify", recipe, tmp_path / "none").identity
        settings = copy.deepcopy(identity.settings)
        for name in lacking:
            take(settings, name)
        write_run(out, tree, identity=StageIdentity("classify", settings, identity.parents).identity, settings=settings)
        return state_of("classify", recipe, out)

    assert older(tmp_path / "leaf", "optim.weight_decay", "mix").finished
    given = CLASSIFY | {"optim": CLASSIFY["optim"] | {"weight_decay": 0.123}}
    changed = older(tmp_path / "given", "optim.weight_decay", tree=given)
    assert changed.plan() == "runs again: optim.weight_decay: None -> 0.123"
    mixed = CLASSIFY | {"mix": {"mixup": 0.4}}
    assert "mix: None -> " in older(tmp_path / "section", "mix", tree=mixed).plan()
    required = older(tmp_path / "required", "student.name")
    assert "student.name: None -> vit_nano_patch4_32" in required.plan()


def test_a_finished_stage_is_answered_without_torch(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, CLASSIFY, "classify.yaml")
    out = write_run(tmp_path / "run")
    code = (
        "import sys\n"
        "from eva_mim.cli import main\n"
        f"code = main(['classify', {str(path)!r}, '--out', {str(out)!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False,
                          env=environment())
    assert done.returncode == 0, done.stderr[-500:]
    assert "finished before, nothing to do\n  top1 25\n" in done.stdout + done.stderr


def reads_of(recipe: dict[str, Any], out: Path) -> int:
    """How often this rank hashes a parent for a stage that is finished."""
    from eva_mim.core.registry import PROGRAMS, lookup
    from eva_mim.run import recipe as recipes
    from eva_mim.run.stage import run_stage

    count, whole = [0], recipes.content_hash

    def counted(path: Path, container: str | None = None) -> str:
        count[0] += 1
        return whole(path, container)

    recipes.content_hash = counted
    try:
        run_stage(lookup(PROGRAMS, "classify", "program"), parse(StageRecipe, recipe, "recipe"), out)
    finally:
        recipes.content_hash = whole
    return count[0]


@pytest.mark.slow
def test_one_rank_reads_the_parents_for_all(tmp_path: Path) -> None:
    recipe = CLASSIFY | {"init_from": str(write_run(tmp_path / "parent"))}
    out = write_run(tmp_path / "run", recipe)
    assert on_ranks(2, reads_of, recipe, out) == [1, 0]
