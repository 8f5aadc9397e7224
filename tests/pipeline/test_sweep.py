"""`eva-mim sweep`: real cells in small, table against numpy, what is run again, shared work, and mistakes."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from eva_mim.cli import main as eva_mim
from eva_mim.commands.sweep import checked_sizes
from eva_mim.commands.sweep_table import Row, Size, slope, table
from eva_mim.core.errors import UserError
from eva_mim.core.settings import parse
from eva_mim.pipeline.sweep import Sweep, cells_of, read_sweep
from tests.conftest import REPOSITORY
from tests.tiny import CLIP, MIM, environment, python, write_recipe

FIGURE = "clip.zeroshot_top1"


def sweep_file(folder: Path, **changes: Any) -> Path:
    """Two towers, two numbers of samples, one seed: CLIP on small scenes."""
    student = CLIP["student"] | {"name": "vit_nano_patch4_32"}
    recipe = write_recipe(folder, CLIP | {"student": student}, "clip.yaml")
    tree: dict[str, Any] = {
        "pipeline": {"stages": [{"name": "clip", "program": "clip", "recipe": str(recipe)}]}, "stage": "clip",
        "figures": [FIGURE], "towers": {"vit": {}, "hybrid": {"student.name": "vitamin_nano_32"}}, "samples": [24, 72],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
    return path


def cells(path: Path, out: Path) -> list[Any]:
    return cells_of(read_sweep(str(path)), out, {})


def swept(folder: Path, out: Path, capfd: pytest.CaptureFixture[str], **changes: Any) -> list[str]:
    """The line of a sweep of which half of the cells, those of the first tower, were run: the table has their figures."""
    line = ["sweep", str(sweep_file(folder, **changes)), "--out", str(out), "--jobs", "2", "--part", "1/2"]
    assert eva_mim(line) == 0
    said = capfd.readouterr()
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert f"{len(rows)} cells, 0 of them finished before" in said.err
    assert f"{len(rows)} of {2 * len(rows)} cells are finished" in said.err
    for row in rows:
        record = json.loads((out / row["folder"] / "clip" / "lineage.json").read_text())
        assert float(row[FIGURE]) == record["metrics"]["zeroshot_top1"]
        assert (row["tower"], record["samples_seen"]) == ("vit", int(row["samples"]))
        assert record["settings"]["student"]["name"] == "vit_nano_patch4_32"
    columns = ", ".join(row["samples"] for row in rows).replace(", ", f" | {FIGURE}, ")
    assert f"| tower | parameters | multiply-adds | {FIGURE}, {columns} | per doubling |" in said.out
    with Image.open(out / "sweep.png") as picture:
        assert picture.size == (3 * 560 + 150, 420)
    return line


@pytest.mark.slow
def test_a_sweep_in_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = swept(tmp_path, tmp_path / "out", capfd, samples=[24])
    assert eva_mim(line) == 0
    assert "1 cells, 1 of them finished before" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.long
def test_lost_records_other_data_and_a_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only a cell whose record is lost is run again; cells of other data are not put into one table; a signal reaches the cells
    that run, and no other one begins."""
    out = tmp_path / "out"
    line = swept(tmp_path, out, capfd)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/clip/lineage.json")}
    shutil.rmtree(out / "vit-72-0" / "clip")
    assert eva_mim(line) == 0
    assert "2 cells, 1 of them finished before" in capfd.readouterr().err
    changed = {path.parent.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"vit-72-0"}
    record = out / "vit-24-0" / "clip" / "lineage.json"
    tree = json.loads(record.read_text())
    tree["data"]["sha256"] = "0" * 64
    record.write_text(json.dumps(tree))
    assert eva_mim([*line, "--table"]) == 2
    assert "the cells vit-24-0 and vit-72-0 were trained or measured on other records" in capfd.readouterr().err
    shutil.rmtree(out / "vit-72-0" / "clip")
    line[line.index("1/2")] = "1/1"
    with subprocess.Popen(python("eva_mim.cli", *line), cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE,
                          text=True) as one:
        assert one.stderr is not None
        while not (out / "hybrid-24-0" / "log.txt").exists():
            time.sleep(0.05)
        one.terminate()
        assert one.wait(60) == 75
        assert "stopped; the same command goes on from the last checkpoint" in one.stderr.read()
    assert not (out / "hybrid-72-0").exists()  # no cell began after the signal


def test_cells_hold_their_whole_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds outermost; what an axis says has precedence over the pipeline's settings and over a stage's."""
    path = sweep_file(tmp_path, seeds=[3, 4], sources={"one": {"data.scenes.val": 25}, "two": {"clip.data.scenes.val": 26}})
    found = cells(path, tmp_path / "out")
    assert [cell.name for cell in found[:4]] == ["vit-one-24-3", "hybrid-one-24-3", "vit-two-24-3", "hybrid-two-24-3"]
    assert len(found) == 16
    assert found[-1].name == "hybrid-two-72-4"
    recipe: Any = found[-1].planned[0].recipe
    assert (recipe.run.samples, recipe.run.epochs, recipe.run.seed) == (72, None, 4)
    assert (recipe.student.name, recipe.data.scenes.val) == ("vitamin_nano_32", 26)
    line = ["sweep", str(path), "--out", str(tmp_path / "out"), "--part", "16/16"]
    assert eva_mim([*line, "--print-shell"]) == 0
    assert capsys.readouterr().out == (f"eva-mim pipeline {tmp_path}/out/hybrid-two-72-4/pipeline.yaml --out "
                                       f"{tmp_path}/out/hybrid-two-72-4\n")
    assert eva_mim(["pipeline", f"{tmp_path}/out/hybrid-two-72-4/pipeline.yaml", "--out", f"{tmp_path}/x", "--dry-run"]) == 0
    assert "run.samples=72" not in (said := capsys.readouterr().out)
    assert "clip   clip     -     3      24" in said


def test_slope_and_table() -> None:
    """The slope by numpy's fit; means and standard deviations by numpy."""
    random = np.random.default_rng(0)
    rows = [Row("a", "data", 1000 * 2**power, seed, Size(2e6, 3e9), {FIGURE: 20 + 5 * power + random.normal()}, 1.0, "")
            for power in range(3) for seed in range(3)]
    x, y = np.log2([row.samples for row in rows]), np.array([row.figures[FIGURE] for row in rows])
    (wanted, _), covariance = np.polyfit(x, y, 1, cov=True)
    found, error = slope(rows, FIGURE)
    assert found == pytest.approx(wanted)
    assert error == pytest.approx(math.sqrt(covariance[0, 0]))
    text = table(FIGURE, rows)
    first = [row.figures[FIGURE] for row in rows[:3]]
    assert f"| a | 2M | 3B | {np.mean(first):.2f} ± {np.std(first, ddof=1):.2f} |" in text
    assert f"| {wanted:+.2f} ± {error:.2f} |" in text
    assert math.isnan(slope(rows[:3], FIGURE)[0])


def test_towers_are_counted() -> None:
    """A plain ViT's products by hand: of ViT-S/16 those of the patches, of four projections and the MLP, and of attention."""
    sweep = read_sweep("configs/sweeps/vitamin48.yaml")
    few = sweep.model_copy(update={"towers": {name: sweep.towers[name] for name in ("ViT-S-16", "ViTamin-S")}})
    sizes = checked_sizes(few, cells_of(few, Path("nowhere"), {}))
    tokens, width = 197, 384
    blocks = 12 * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    assert sizes["ViT-S-16"].macs == 196 * 768 * width + blocks
    assert sizes["ViT-S-16"].parameters == 21_665_664
    published = {(one.tower, one.samples): one for one in sweep.published}
    assert len(published) == len(cells_of(sweep, Path("nowhere"), {})) == 48
    assert sizes["ViTamin-S"].parameters == pytest.approx(published["ViTamin-S", 128_000_000].parameters, rel=0.01)
    attention = 14 * 2 * 196**2 * width
    assert sizes["ViTamin-S"].macs - attention == pytest.approx(published["ViTamin-S", 128_000_000].macs, rel=0.01)
    assert set(sweep.towers) == {one.tower for one in sweep.published}


@pytest.mark.parametrize(("changes", "said"), [
    ({"stage": "mim"}, "stage: 'mim' is no stage of the sweep's pipeline (clip)"),
    ({"figures": ["probe.top1"]}, "figures: 'probe' is no stage of the sweep's pipeline (clip)"),
    ({"samples": [24, 24]}, "samples=[24, 24]: a value stands there twice"),
    ({"towers": {"a/b": {}}}, "towers"),
    ({"towers": {"vit": {"student.nam": "x"}}}, "vit: stage clip"),
    ({"towers": {"vit": {"student.name": "vit_nano"}}}, "vit: stage clip: student.name: timm has no 'vit_nano'"),
])
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str) -> None:
    assert eva_mim(["sweep", str(sweep_file(tmp_path, **changes)), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cells_that_differ_in_more_than_they_say(tmp_path: Path) -> None:
    """A tower's kind takes another setting along, which the others keep."""
    recipe = write_recipe(tmp_path, MIM | {"mask": {"ratio": 0.4, "min_block": 3}})
    tree = {
        "pipeline": {"stages": [{"name": "mim", "program": "mim", "recipe": str(recipe)}]},
        "stage": "mim", "figures": ["mim.cosine"], "samples": [1000],
        "towers": {"blocks": {}, "random": {"mask.kind": "random"}},
    }
    said = "stage mim: the cells blocks-1000-0 and random-1000-0 differ in mask.min_block, which no axis of the sweep sets"
    with pytest.raises(UserError, match=said):
        cells_of(parse(Sweep, tree, "sweep"), tmp_path, {})
