"""Data that lies elsewhere now: the same records go on, others are refused or begun anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from eva_mim.core.run_folder import RunFolder
from eva_mim.core.settings import parse
from finetune.classify import StageRecipe
from tests.conftest import make_folder, picture, png
from tests.tiny import CLASSIFY, RUN, finish, losses, python, run, run_until, same_weights, stopped_after, write_recipe

SAME, OTHER = "the same records", "other records"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images`, `recipe.yaml` and the finished run `out`."""
    folder = tmp_path_factory.mktemp("moved")
    make_folder(folder / "images", {"ant": 16, "bee": 16})
    data = {"root": str(folder / "images"), "val_share": 0.25, "workers": 0}
    steps = {"epochs": 2, "global_batch": 8, "checkpoint_every": 2, "keep_last": 9}
    write_recipe(folder, CLASSIFY | {"data": data, "run": RUN | steps})
    run("classify", folder / "recipe.yaml", folder / "out")
    return folder


def moved(straight: Path, tmp_path: Path) -> Path:
    """A copy of the images elsewhere."""
    shutil.copytree(straight / "images", tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def repainted(folder: Path) -> Path:
    """Files of the same names with other pixels, as in a resized copy."""
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.write_bytes(png(picture(1000 + number, (20, 16))))
    return folder


def test_places_are_no_part_of_the_identity() -> None:
    part = {"root": "/a", "val": "val"}
    recipe = parse(StageRecipe, CLASSIFY | {"data": {"mixture": [part, part | {"root": "/b"}]}}, "recipe")
    assert recipe.places() == {"data.mixture.0.root": "/a", "data.mixture.1.root": "/b"}
    settings = recipe.identity_tree()["data"]
    assert [sorted(one.keys() & {"root", "val", "weight"}) for one in settings["mixture"]] == [["val", "weight"]] * 2
    assert "workers" not in settings
    held_out = parse(StageRecipe, CLASSIFY | {"data": {"root": "/a", "held_out": {"root": "/c"}}}, "recipe")
    assert held_out.places() == {"data.root": "/a", "data.held_out.root": "/c"}


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_moved_data(straight: Path, tmp_path: Path) -> None:
    out = stopped_after(2, straight / "out", tmp_path / "out")
    place = moved(straight, tmp_path)
    done = run("classify", straight / "recipe.yaml", out, f"data.root={place}")
    assert f"data.root: {straight / 'images'} -> {place}: {SAME}" in done.stderr
    assert "going on from step 2" in done.stderr
    assert losses(out) == losses(straight / "out")
    same_weights(out / "model.safetensors", straight / "out" / "model.safetensors")
    assert RunFolder(out).record()["places"] == {"data.root": str(place)}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_finished_run_is_finished_elsewhere_too(straight: Path, tmp_path: Path, processes: int) -> None:
    """Also by another spelling; nothing is trained and nothing written."""
    out = tmp_path / "out"
    shutil.copytree(straight / "out", out)
    before = (out / "lineage.json").read_bytes()
    engine = ["run.engine=deepspeed"] if processes > 1 else []
    for place in (moved(straight, tmp_path), straight / "out" / ".." / "images"):
        done = run("classify", straight / "recipe.yaml", out, f"data.root={place}", *engine, processes=processes)
        assert SAME in done.stderr
        assert "finished before, nothing to do" in done.stderr
    assert (out / "lineage.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_other_records_are_refused(straight: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    shutil.copytree(straight / "out", out) if finished else stopped_after(2, straight / "out", out)
    place = moved(straight, tmp_path)
    more = moved(straight, tmp_path / "more")
    (more / "ant" / "more.png").write_bytes(png(picture(99)))
    for root in (repainted(place), more):
        done = run("classify", straight / "recipe.yaml", out, f"data.root={root}", code=2)
        assert f"error: {out} holds another run; choose another --out. What differs:" in done.stderr
        assert f"data.root: {straight / 'images'} -> {root}, with {OTHER}" in done.stderr
    assert not (out / ".lock").exists()


@pytest.mark.slow
def test_a_pipeline_compares_too(straight: Path, tmp_path: Path) -> None:
    """The same records: nothing to do; others: the stage runs again, and what was there is kept."""
    stage = {"name": "one", "program": "classify", "recipe": str(straight / "recipe.yaml")}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"stages": [stage]}))
    shutil.copytree(straight / "out", tmp_path / "runs" / "one")
    place = moved(straight, tmp_path)

    def pipeline(*words: Any) -> str:
        return finish(python("eva_mim.cli", "pipeline", file, "--out", tmp_path / "runs", f"data.root={place}", *words)).stderr

    assert "finished before, nothing to do" in pipeline()
    repainted(place)
    said = pipeline("run.epochs=2")
    assert f"so it runs again: data.root: {straight / 'images'} -> {place}, with {OTHER}" in said
    assert (tmp_path / "runs" / "one.old-1" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "runs" / "one" / "lineage.json").read_text())["places"] == {"data.root": str(place)}


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_has_its_place(straight: Path, tmp_path: Path) -> None:
    """Before it has finished, on a node's disk that is gone afterwards."""
    first = moved(straight, tmp_path)
    out = tmp_path / "out"
    run_until(3, "classify", straight / "recipe.yaml", out, f"data.root={first}")
    first.rename(tmp_path / "job-2")
    done = run("classify", straight / "recipe.yaml", out, f"data.root={tmp_path / 'job-2'}")
    assert SAME in done.stderr
    same_weights(out / "model.safetensors", straight / "out" / "model.safetensors")
