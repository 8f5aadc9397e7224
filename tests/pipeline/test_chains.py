"""The published chains run to their ends, small: see `tests/nano.py`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.run_folder import RunFolder
from tests.conftest import REPOSITORY
from tests.nano import run_small
from tests.ranks import pool

pytestmark = pytest.mark.slow
QUICK = ("eva_l", "eva02_ti", "vit_b16_8x24gb")
"""Run in each run of the tests: the interleaved one, with a decoder; one of EVA-02; one with shared rows of heads."""
CHAINS = [path.stem for path in sorted((REPOSITORY / "configs" / "pipelines").glob("*.yaml"))
          if path.stem.startswith(("eva", "vit")) and path.stem != "eva02_e"]  # which is one stage, from a released file


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in CHAINS])
def test_a_published_chain_runs(name: str, tmp_path: Path) -> None:
    """Each stage builds on its parent's weights; in a classifier head and norm are new where the recipe says so."""
    outcome, = pool(1)(run_small, name, tmp_path)
    assert not outcome.failed, outcome.out + outcome.err
    for stage in read_yaml(f"configs/pipelines/{name}.yaml")["stages"]:
        record = RunFolder(tmp_path / "out" / stage["name"]).record()
        assert record["finished"], stage["name"]
        assert record["steps"] == 2
        if "init_from" not in stage:
            continue
        parent = Path(record["parents"]["init_from"]["path"])
        assert parent.is_relative_to(tmp_path / "out" / stage["init_from"])
        parent = parent / "model.safetensors" if parent.is_dir() else parent
        assert record["parents"]["init_from"]["sha256"] == hashlib.sha256(parent.read_bytes()).hexdigest()
        if stage["program"] == "classify":
            tree = read_yaml(stage["recipe"])
            new = ["fc_norm"] if tree.get("hand_over", {}).get("norm") == "drop" else []
            new += ["head"] if tree["student"].get("head_rows", "new") == "new" else []
            assert {name.split(".")[0] for name in record["seeded"]["new"]} == set(new)
