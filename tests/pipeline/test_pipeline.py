"""The pipeline runs what is not done, says why, and goes on after a kill."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file

import eva_mim.trunks.small  # noqa: F401
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.resolve import resolve
from eva_mim.pipeline.plan import plan
from finetune.classify import StageRecipe
from tests.ranks import Launched, ends
from tests.tiny import CLASSIFY, CLIP, MIM, finish, python, write_recipe

pytestmark = pytest.mark.slow


def pipeline(file: Path, out: Path, *arguments: str, code: int = 0) -> str:
    """`eva-mim pipeline ...`; what it said."""
    done = finish(python("eva_mim.cli", "pipeline", file, "--out", out, *arguments), code)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline that has run to its end in `out`."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_recipe(folder, CLIP | {"student": CLIP["student"] | {"name": "convnet_nano_32"}}, "teacher.yaml")
    write_recipe(folder, MIM, "mim.yaml")
    write_recipe(folder, CLIP, "clip.yaml")
    write_recipe(folder, CLASSIFY, "classify.yaml")
    stages = [
        {"name": "first", "program": "clip", "recipe": str(folder / "teacher.yaml")},
        {"name": "masked", "program": "mim", "recipe": str(folder / "mim.yaml"), "teacher": "first"},
        {"name": "tower", "program": "clip", "recipe": str(folder / "clip.yaml"), "init_from": "masked", "text_from": "first",
         "settings": {"student.embed_dim": 32}},
        {"name": "broad", "program": "classify", "recipe": str(folder / "classify.yaml"), "init_from": "masked"},
        {"name": "target", "program": "classify", "recipe": str(folder / "classify.yaml"), "init_from": "broad",
         "settings": {"data.label_map": {"round": ["circle", "ring"], "edged": ["square", "triangle", "diamond", "cross"]},
                      "student.image_size": 40}},
        {"name": "scratch", "program": "classify", "recipe": str(folder / "classify.yaml")},
    ]
    file = write_recipe(folder, {"stages": stages, "compare": [["broad", "scratch"]]}, "pipeline.yaml")
    pipeline(file, folder / "out", "run.epochs=1")
    return folder


def copy_of(finished: Path, tmp_path: Path) -> Path:
    """The finished folder, to be changed."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def test_second_run_skips_everything(finished: Path) -> None:
    """And trains nothing."""
    text = pipeline(finished / "pipeline.yaml", finished / "out", "run.epochs=1")
    assert text.count("finished before, nothing to do") == 6
    assert "step " not in text
    assert f"This table: {finished / 'out' / 'summary.md'}; curves: tensorboard --logdir {finished / 'out'}" in text
    table = text[text.index("┏") : text.index("└")].splitlines()
    assert max(map(len, table)) <= 80
    for stage in ("first", "masked", "tower", "broad", "target", "scratch"):  # no figure is cut or broken
        record = json.loads((finished / "out" / stage / "lineage.json").read_text())
        headline = record["headline"]
        assert any(f"│ {headline} {record['metrics'][headline]:.4g} " in line for line in table), stage


def test_changed_stage_and_all_after_it_run_again(finished: Path, tmp_path: Path) -> None:
    """The change is named, the old run is kept, what does not depend on it is skipped."""
    out = copy_of(finished, tmp_path)
    # Parents are known by content, so a moved folder stays finished.
    text = pipeline(finished / "pipeline.yaml", out, "run.epochs=1", "broad.optim.lr=0.001", "--dry-run")
    states = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert "runs again: optim.lr: 0.002 -> 0.001" in states["broad"]
    assert "runs, after broad" in states["target"]
    assert all("finished, is skipped" in states[name] for name in ("first", "masked", "tower", "scratch"))
    text = pipeline(finished / "pipeline.yaml", out, "run.epochs=1", "broad.optim.lr=0.001")
    assert text.count("finished before, nothing to do") == 4
    assert "init_from: other weights" in text
    assert (out / "broad.old-1" / "model.safetensors").is_file()
    shown = {path.parents[1].name for path in out.rglob("*tfevents*")}  # by which TensorBoard finds runs
    assert "broad" in shown
    assert "broad.old-1" not in shown
    assert json.loads((out / "target" / "lineage.json").read_text())["finished"]


def test_killed_pipeline_goes_on_and_ends_alike(finished: Path, tmp_path: Path) -> None:
    """SIGTERM to the whole pipeline in its second stage."""
    out = copy_of(finished, tmp_path)
    for name in ("masked", "tower", "broad", "target"):
        shutil.rmtree(out / name)
    words, said = ["pipeline", str(finished / "pipeline.yaml"), "--out", str(out), "run.epochs=1"], tmp_path / "said"
    process = Launched(ends, "eva_mim.cli", words, log=said)
    while not (said.is_file() and re.search(r"step +1/", said.read_text())):
        assert process.poll() is None, said.read_text()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 75
    assert not json.loads((out / "masked" / "lineage.json").read_text())["finished"]
    text = pipeline(finished / "pipeline.yaml", out, "run.epochs=1")
    assert "going on from step" in text
    for name in ("masked", "tower", "target"):
        expected = load_file(finished / "out" / name / "model.safetensors")
        found = load_file(out / name / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name


def test_results_open_in_timm_and_open_clip(finished: Path) -> None:
    """The lines of the summary give models with the saved weights, and figures that the run reported."""
    out = finished / "out"
    masked = timm.create_model(f"local-dir:{out / 'masked'}", pretrained=True)
    for name, value in load_file(out / "masked" / "model.safetensors").items():
        assert torch.equal(masked.state_dict()[name], value)
    target = timm.create_model(f"local-dir:{out / 'target'}", pretrained=True)
    assert target.patch_embed.img_size == (40, 40)
    assert target.pretrained_cfg["label_names"] == ["round", "edged"]
    tower, _ = open_clip.create_model_from_pretrained(f"local-dir:{out / 'tower'}")
    trunk = load_file(out / "tower" / "model.safetensors")
    assert all(torch.equal(tower.visual.trunk.state_dict()[name], value) for name, value in trunk.items())


def test_lineage_names_parents_by_content(finished: Path) -> None:
    """The chain from the target back to the teacher closes."""
    out = finished / "out"
    records = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/lineage.json")}
    assert records["target"]["parents"]["init_from"]["sha256"] == records["broad"]["weights_sha256"]
    assert records["broad"]["parents"]["init_from"]["sha256"] == records["masked"]["weights_sha256"]
    assert records["masked"]["parents"]["teacher.name"]["sha256"] == records["first"]["weights_sha256"]
    assert "pos_embed" in records["target"]["seeded"]["resized"]
    assert records["target"]["seeded"]["new"] == ["head.weight", "head.bias"]


def test_printed_commands_are_those_of_the_stages(finished: Path) -> None:
    """One line a stage, with its parents by path."""
    text = pipeline(finished / "pipeline.yaml", Path("runs/x"), "mim.run.seed=1", "--print-shell", code=2)
    assert "mim.run.seed=1: neither a stage of this pipeline nor a section of its recipes" in text
    text = pipeline(finished / "pipeline.yaml", Path("runs/x"), "masked.run.seed=1", "--print-shell")
    lines = text.splitlines()[2:]
    assert [line.split()[1] for line in lines] == ["clip", "mim", "clip", "classify", "classify", "classify"]
    assert "run.seed=1 teacher.kind=stage teacher.name=runs/x/first --out runs/x/masked" in lines[1]


@pytest.mark.parametrize("root", ["plain", "x: y: z", "[", "true", "12", "a #b", "é\"'"])
def test_text_of_a_pipeline_file_stays_text(tmp_path: Path, root: str) -> None:
    """Also where it is no YAML, or reads as something else: in the recipe, and in the printed command."""
    recipe = write_recipe(tmp_path, CLASSIFY | {"data": {"source": "folder"}}, "classify.yaml")
    stages = [{"name": "one", "program": "classify", "recipe": str(recipe), "settings": {"data.root": root}}]
    _, (planned,) = plan(str(write_recipe(tmp_path, {"stages": stages})), [], tmp_path / "out")
    assert planned.recipe.data.root == Path(root)
    words = shlex.split(planned.shell())
    assert resolve(StageRecipe, read_yaml(recipe), words[3:-2], str(recipe)).data.root == Path(root)


def test_unknown_parent_and_mistyped_settings_are_named(finished: Path, tmp_path: Path) -> None:
    """All stages are checked before the first one runs."""
    stages = [{"name": "late", "program": "classify", "recipe": str(finished / "classify.yaml"), "init_from": "nobody"}]
    file = write_recipe(tmp_path, {"stages": stages})
    assert "late.init_from: 'nobody' is not an earlier stage" in pipeline(file, tmp_path / "out", code=2)
    text = pipeline(finished / "pipeline.yaml", tmp_path / "out", "run.epochz=1", "masked.student.nam=x", code=2)
    assert "run.epochz: no such setting; did you mean run.epochs?" in text
    assert "student.nam: no such setting; did you mean student.name?" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
