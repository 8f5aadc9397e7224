"""Each tool says what it takes and does its work in small. Long runs of other programs are replaced by their figures."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.pipeline.plan import plan
from eva_mim.pipeline.preview import as_table
from eva_mim.trunks.create import create
from eva_mim.trunks.meta import meta_device, multiply_adds
from tests.conftest import REPOSITORY, make_folder
from tests.ranks import pool
from tests.tiny import python, started
from tools import cifar10_hybrids, cifar10_smoke, cifar10_styles, cifar10_teachers, flickr8k, mutants, seeds

TOOLS = sorted([path.stem for path in (REPOSITORY / "tools").glob("*.py")]
               + [path.parent.name for path in (REPOSITORY / "tools").glob("*/__main__.py")])
WITHOUT_WORDS = ("shuffle_cost",)
"""Three numbers are all that it takes."""


def tool(name: str, *words: str) -> int:
    """`python -m tools.NAME WORDS`; its exit code."""
    sys.argv = [name, *words]
    try:
        runpy.run_module(f"tools.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def says(name: str, *words: str | Path, code: int = 0) -> str:
    """What a tool says on standard output, else of errors; in a process of its own."""
    (outcome,) = pool(1)(tool, name, *map(str, words))
    assert not outcome.failed, outcome.err
    assert outcome.value == code, outcome.out + outcome.err
    return outcome.out or outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TOOLS if name not in WITHOUT_WORDS])
def test_help(name: str) -> None:
    assert "usage: " in says(name, "--help")


@pytest.mark.slow
def test_small_measurements(tmp_path: Path) -> None:
    text = says("checkpoint_cost", "--model", "vit_nano_patch4_32", "--batch", "2", "--every", "1", "--saves", "1",
                "--folder", tmp_path)  # fmt: skip
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["none", "held", "background"]
    assert list(tmp_path.iterdir()) == []
    text = says("shuffle_cost", "200", "300", "1")
    assert text.startswith("200 shards of 300 records of 1 kB\n")
    assert text.count("a batch of ") == 4
    text = says("convert_memory", "--gigabytes", "1e9", "--folder", tmp_path, code=1)
    assert "GB are free, 2100000000.0 are needed" in text


@pytest.mark.slow
@pytest.mark.long
def test_the_check_of_a_gpu_on_a_cpu(tmp_path: Path) -> None:
    """Its code, with small networks: here nothing waits, and the same run gives the same bits."""
    found = {}
    for parts in (["machine", "waits", "same_as_cpu", "speed", "optimizers", "copies"], ["repeat", "one_process"]):
        says("gpu_check", "--tiny", "--device", "cpu", "--out", tmp_path / "gpu.json", "--only", *parts)
        found |= json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["waits"].values()) == {"none"}
    assert found["same_as_cpu"]["fp32"]["loss"][0] == found["same_as_cpu"]["fp32"]["loss"][1]
    assert found["repeat"]["usual"] == found["repeat"]["deterministic"] == {"again": 0.0, "stopped and gone on": 0.0}
    assert found["one_process"]["ZeRO 0"] < 1e-6
    assert all(set(found[part]) for part in ("machine", "speed", "optimizers", "copies"))


@pytest.mark.slow
@pytest.mark.long
def test_memory_of_a_small_conversion(tmp_path: Path) -> None:
    """The peak is that of the libraries. The tool starts programs of its own, which write where it writes."""
    done = started(python("tools.convert_memory", "--gigabytes", "0.4", "--bound", "99", "--folder", tmp_path))
    assert "original.pt --to timm" in done.stdout
    assert "bound 99.0: ok" in done.stdout


@pytest.mark.slow
def test_photographs_are_of_one_size(tmp_path: Path) -> None:
    from PIL import Image

    root = make_folder(tmp_path / "images", {"ant": 3, "bee": 2})
    assert "5 photographs of 20 x 15, " in says("photographs", root, "--out", tmp_path / "out", "--size", "20", "15")
    made = sorted((tmp_path / "out").glob("*/*.jpg"))
    assert [path.parent.name for path in made] == ["0000"] * 3 + ["0001"] * 2
    assert {Image.open(path).size for path in made} == {(20, 15)}


def figures(out: Path, tree: dict[str, Any]) -> None:
    """Look at a pipeline as a user does before it runs, and write what its stages would have found."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "pipeline.yaml").write_text(yaml.safe_dump(tree))
    assert as_table(str(out / "pipeline.yaml"), [], out)
    _, planned = plan(str(out / "pipeline.yaml"), [], out)
    for number, stage in enumerate(planned):
        folder = stage.out
        folder.mkdir(exist_ok=True)
        if stage.entry.program == "clip":  # which a later pipeline's networks are checked with
            student: Any = lookup(PROGRAMS, "clip", "program").on_meta(stage.recipe).student
            (folder / "open_clip_config.json").write_text(json.dumps(student.open_clip_config()))
        found = dict.fromkeys(("zeroshot_top1", "knn_top1", "top1", "feature_std", "cosine"), 50.0 + number)
        found |= {f"{way}_r{k}": 10.0 * k for way in flickr8k.WAYS for k in (1, 5, 10)} | {"cosine_of_mean": 0.0}
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")
        (folder / "lineage.json").write_text(json.dumps({"metrics": found, "seconds": 2.0}))


@pytest.mark.parametrize("module", [cifar10_styles, flickr8k])
def test_a_table_of_chains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: Any
) -> None:
    """Every chain's pipeline would run; its figures come into the table."""
    def instead(out: Path, tree: dict[str, Any], threads: int | None = None) -> None:
        figures(out, tree)

    make_folder(tmp_path / "data", {"": 2})
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(module, "pipeline", instead)
    monkeypatch.setattr(sys, "argv", ["tool", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert module.main() == 0
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(lines) > 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| - |" not in "\n".join(line for line in lines if "scratch" not in line and "untrained" not in line)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["tool", "--data", str(tmp_path / "none")])
    assert module.main() == 0
    assert capsys.readouterr().out.startswith(f"skipped: {tmp_path / 'none'} is not there")


def test_chains_of_students_from_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the two tables plans: its student, its teachers and what is hidden; the two trunks cost alike."""
    monkeypatch.chdir(REPOSITORY)
    teachers, data = tmp_path / "teachers", tmp_path / "data"
    teachers.mkdir()
    cifar10_teachers.write_recipes(teachers)
    for row in cifar10_teachers.students():
        tree = cifar10_teachers.chain(row, teachers, data, 1)
        (tmp_path / "chain.yaml").write_text(yaml.safe_dump(tree))
        mim: Any = plan(str(tmp_path / "chain.yaml"), [], tmp_path)[1][0].recipe
        assert tuple(mim.teachers) == row.teachers
        assert mim.mask.ratio == (0.41 if row.key.endswith("_masked") else 0.0)
    for one in cifar10_hybrids.ROWS:
        for teacher in cifar10_hybrids.TEACHERS:
            tree = cifar10_hybrids.chain(one, teacher, teachers, data, 1)
            (tmp_path / "chain.yaml").write_text(yaml.safe_dump(tree))
            planned = plan(str(tmp_path / "chain.yaml"), [], tmp_path)[1]
            assert {stage.recipe.student.name for stage in planned} == set(one.trunk.values())  # type: ignore[attr-defined]
            assert planned[-1].recipe.optim.layer_decay == (1.0 if one.settings is None else 0.75)
            if one.settings is not None:
                mim = planned[0].recipe
                assert (list(mim.teachers), mim.mask.ratio) == ([teacher], one.settings["mask.ratio"])
    with meta_device():
        costs = [multiply_adds(create(name, num_classes=0), 32) for name in ("vitamin_nano_32", "vit_nano6_patch4_32")]
    assert costs[1] == pytest.approx(costs[0], rel=0.05)


def test_the_smoke_test_fails_below_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"zeroshot_top1": 60.0, "cosine": 0.5, "cosine_of_mean": 0.2, "knn_top1": 40.0, "feature_std": 0.6, "top1": 70.0}
    bad = good | {"zeroshot_top1": 50.0, "top1": 60.0}
    asked = []

    def main(words: list[str]) -> int:
        asked.append(words[:-1])
        for name in ("clip_teacher", "mim", "clip", "clip_scratch", "target", "target_scratch"):
            folder = Path(words[-1]) / name
            folder.mkdir(parents=True)
            metrics = bad if name.endswith("scratch") and "seed0" in words[-1] else good
            (folder / "lineage.json").write_text(json.dumps({"metrics": metrics}))
        return 0

    monkeypatch.setattr(cifar10_smoke, "eva_mim", main)
    for seed, code in (("0", 0), ("1", 1)):
        monkeypatch.setattr(sys, "argv", ["tool", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", seed])
        assert cifar10_smoke.main() == code
        assert capsys.readouterr().out.count("FAIL") == 2 * code
    assert asked[1] == ["pipeline", "configs/pipelines/cifar10_smoke.yaml", f"data.root={tmp_path}", "run.seed=1", "--out"]
    assert (REPOSITORY / asked[0][1]).is_file()


@pytest.mark.slow
def test_index_memory_measures_a_small_folder(tmp_path: Path) -> None:
    """Two ranks with a worker each; whether the figures keep to the bound is not asked here."""
    tiny = ["--millions", "0.01", "--classes", "5", "--workers", "1", "--ranks", "2", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tools.index_memory", *tiny], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        timeout=300,
    )
    assert re.fullmatch(r"10000 images, file of 0 MB: opened in \d+\.\d\d s; -?\d+\.\d{3} GB for 2 ranks x \(1 \+ 1 workers\), "
                        r"with an epoch's order\n", done.stdout), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_table_of_seeds(tmp_path: Path) -> None:
    """Worked out by hand: means, deviations with n - 1, and the gap from the worst seed to the other side's best."""
    for seed, (ours, theirs) in enumerate([(30.0, 20.0), (34.0, 21.0), (38.0, 25.0)]):
        for name, value in (("target", ours), ("scratch", theirs)):
            folder = tmp_path / str(seed) / name
            folder.mkdir(parents=True)
            (folder / "lineage.json").write_text(json.dumps({"headline": "top1", "metrics": {"top1": value}}))
    assert seeds.table(tmp_path, [["target", "scratch"]], [0, 1, 2]).splitlines()[2:] == [
        "| top1 | target 34.0 ± 4.0 | 30.0, 34.0, 38.0 | scratch 22.0 ± 2.6 | 20.0, 21.0, 25.0 | 12.0 ± 1.7 | 5.0 |"
    ]
    assert "does not exist" in says("seeds", tmp_path / "none.yaml", "--out", tmp_path / "out", code=2)


def test_mutants_are_changes_that_parse() -> None:
    """The named ones still find their place; the drawn ones depend on the seed alone and stand in all rooms in turn."""
    found = mutants.drawn(0, 18)
    assert found == mutants.drawn(0, 18) != mutants.drawn(1, 18)
    assert len({mutants.room(mutant.file) for mutant in found}) > 12
    for mutant in [*mutants.named(), *found]:
        source = (REPOSITORY / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(source)), mutant
        assert mutants.tests_of(mutant.file), mutant


def test_the_files_that_name_a_changed_module_run_first() -> None:
    (near, fast), (again, slow), *others = mutants.tests_of("eva_mim/data/sampler.py")
    assert near == again
    assert (fast, slow) == ("not slow and not long", "slow and not long")
    assert {"tests/data/test_loader.py", "tests/run/test_stability.py"} <= set(near)
    rest = [path for files, markers in others if markers == fast for path in files]
    assert "tests/data/test_remote.py" in rest
    assert not set(rest) & set(near)
    folders = [REPOSITORY / "tests" / name for name in ("data", "programs", "run")]
    every = {str(path.relative_to(REPOSITORY)) for folder in folders for path in folder.glob("test_*.py")}
    assert {*near, *rest} == every
