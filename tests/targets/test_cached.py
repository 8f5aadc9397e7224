"""Caches of targets: training from one is training with the teachers; what it was not made for is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eva_mim.cli import main
from eva_mim.core.errors import UserError
from eva_mim.core.lock import locked
from eva_mim.core.settings import parse
from eva_mim.data.store.files import FeatureStore, packed, unpacked
from pretrain import mim, mim_recipe
from tests.conftest import picture
from tests.tiny import MIM, finish, losses, python, run, same_weights, stopped_after, teacher_file, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a teacher of a file, and caches of two views of it: cache-fp32, cache-int8, cache-fp8."""
    folder = tmp_path_factory.mktemp("cached") / "mim"
    folder.mkdir()
    tree = MIM | {"teacher": MIM["teacher"] | {"weights": str(teacher_file(folder))}, "view": {"seed": 3},
                  "run": MIM["run"] | {"epochs": 3, "checkpoint_every": 2}}
    recipe = write_recipe(folder, tree)
    for dtype in ("fp32", "int8", "fp8"):
        assert main(["cache", str(recipe), "--views", "2", "--out", str(folder / f"cache-{dtype}"), "--dtype", dtype]) == 0
    return folder


def test_training_from_it_is_training_with_the_teacher(home: Path, tmp_path: Path) -> None:
    """Bit for bit: losses, held-out figures and weights, with a third epoch that sees the first view again; also resumed in the
    middle of an epoch, and with another cache in another place."""
    recipe, cached = home / "recipe.yaml", f"targets.cached={home / 'cache-fp32'}"
    run("mim", recipe, tmp_path / "live", "view.count=2")
    run("mim", recipe, tmp_path / "cached", cached)
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    same_weights(tmp_path / "cached" / "model.safetensors", tmp_path / "live" / "model.safetensors")
    same_weights(tmp_path / "cached" / "head.safetensors", tmp_path / "live" / "head.safetensors")
    first, second = (json.loads((tmp_path / name / "lineage.json").read_text()) for name in ("live", "cached"))
    assert first["metrics"] == second["metrics"]
    assert second["teachers"]["teacher"]["sha256"] == first["teachers"]["teacher"]["sha256"]
    shutil.copytree(home / "cache-fp32", tmp_path / "moved")
    stopped_after(6, tmp_path / "cached", tmp_path / "resumed")
    run("mim", recipe, tmp_path / "resumed", f"targets.cached={tmp_path / 'moved'}")
    same_weights(tmp_path / "resumed" / "model.safetensors", tmp_path / "live" / "model.safetensors")


def test_fewer_views_than_it_has(home: Path, tmp_path: Path) -> None:
    run("mim", home / "recipe.yaml", tmp_path / "live", "view.count=1")
    said = run("mim", home / "recipe.yaml", tmp_path / "cached", "view.count=1", f"targets.cached={home / 'cache-fp32'}").stderr
    assert "3 epochs take turns with 1 views of each image" in said
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")


@pytest.mark.parametrize("zero_stage", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_two_processes_follow(zero_stage: int, home: Path, tmp_path: Path) -> None:
    """DeepSpeed's two ranks, each with its rows of the cache, against the teacher in one process; in the long forms they also
    go on from a checkpoint in the middle of an epoch, bit for bit."""
    run("mim", home / "recipe.yaml", tmp_path / "live", "view.count=2")
    few = ("run.engine=deepspeed", f"run.zero_stage={zero_stage}", f"targets.cached={home / 'cache-fp32'}")
    run("mim", home / "recipe.yaml", tmp_path / "two", *few, processes=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "live"), rtol=2e-5)
    if zero_stage:
        run("mim", home / "recipe.yaml", stopped_after(6, tmp_path / "two", tmp_path / "resumed"), *few, processes=2)
        assert losses(tmp_path / "resumed") == losses(tmp_path / "two")
        same_weights(tmp_path / "resumed" / "model.safetensors", tmp_path / "two" / "model.safetensors")


def test_principal_components(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them are the features themselves; a few keep the variance that they keep in NumPy's decomposition."""
    line = ["cache", str(home / "recipe.yaml"), "--views", "1", "--dtype", "fp32"]
    for count in (96, 8):
        assert main([*line, "--pca", str(count), "--out", str(tmp_path / f"pca{count}")]) == 0
    assert "teacher: cosine of stored and exact features 1.000000, 100.00% of the variance in 96" in capsys.readouterr().out
    whole, few, exact = (FeatureStore(folder) for folder in (tmp_path / "pca96", tmp_path / "pca8", home / "cache-fp32"))
    features = torch.stack([exact.row("train", 0, index)["teacher.spatial"] for index in range(96)])
    for store, atol in ((whole, 1e-5), (few, 10.0)):
        rows = torch.stack([store.row("train", 0, index)["teacher.spatial"] for index in range(96)])
        torch.testing.assert_close(store.bases["teacher"].up(rows), features, atol=atol, rtol=0)
    rows = features.flatten(0, 1).double().numpy()
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    assert few.facts.variance["teacher"] == pytest.approx(values[:8].sum() / values.sum(), rel=1e-6)
    assert few.facts.bytes_of_row("train") < exact.facts.bytes_of_row("train") / 6
    run("mim", home / "recipe.yaml", tmp_path / "run", f"targets.cached={tmp_path / 'pca8'}", "run.epochs=1")
    (tmp_path / "pca8" / "index.json").unlink()
    assert main([*line, "--pca", "8", "--out", str(tmp_path / "pca8")]) == 0
    assert main(["data", "verify", str(tmp_path / "pca8")]) == 0
    assert main([*line, "--pca", "97", "--out", str(tmp_path / "pca97")]) == 2
    assert "--pca 97: teacher teacher has 96 channels" in capsys.readouterr().err


def test_masks_that_come_again_with_their_views(home: Path, tmp_path: Path) -> None:
    """Only what they hide is stored: fewer bytes, and the same run bit for bit, also with another seed of the run. Other masks
    are refused."""
    recipe, replayed, cache = home / "recipe.yaml", ["mask.replay=true", "view.count=2"], tmp_path / "cache"
    line = ["cache", str(recipe), "--views", "2", "--dtype", "fp32", "--hidden", "mask.replay=true", "--out"]
    assert main([*line, str(cache)]) == 0
    whole, few = FeatureStore(home / "cache-fp32").facts, FeatureStore(cache).facts
    assert few.splits["train"].hidden == 7  # 0.41 of 16
    assert few.bytes_of_row("train") == whole.bytes_of_row("train") - 9 * 96 * 4
    assert few.bytes_of_row("val") == whole.bytes_of_row("val")
    for seed in (0, 1):
        run("mim", recipe, tmp_path / f"live{seed}", *replayed, f"run.seed={seed}")
        run("mim", recipe, tmp_path / f"cached{seed}", "mask.replay=true", f"run.seed={seed}", f"targets.cached={cache}")
        assert losses(tmp_path / f"cached{seed}") == losses(tmp_path / f"live{seed}")
    same_weights(tmp_path / "cached1" / "model.safetensors", tmp_path / "live1" / "model.safetensors")
    assert losses(tmp_path / "live0") != losses(tmp_path / "live1")
    for word, said in [("mask.replay=false", "mask.replay: True -> False"), ("mask.ratio=0.3", "mask.ratio: 0.41 -> 0.3")]:
        refused = run("mim", recipe, tmp_path / "run", *replayed, f"targets.cached={cache}", word, code=2).stderr
        assert said in refused


def test_what_a_replayed_mask_needs(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["cache", str(home / "recipe.yaml"), "--views", "2", "--out", str(tmp_path / "cache"), "--hidden"]
    assert main(line) == 2
    assert "--hidden: masks are drawn anew in each epoch" in capsys.readouterr().err
    refused = run("mim", home / "recipe.yaml", tmp_path / "run", "mask.replay=true", code=2).stderr
    assert "mask.replay=true has no effect while each epoch has new views; set view.count, or targets.cached" in refused


def test_several_teachers_and_writers(tmp_path: Path) -> None:
    """A head and stored features for each teacher. Two processes write what one writes."""
    teachers = {"a": MIM["teacher"], "b": {"kind": "pixels", "name": "patch8", "image_size": 32}}
    tree = {name: value for name, value in MIM.items() if name != "teacher"} | {"teachers": teachers}
    recipe = write_recipe(tmp_path / "mim", tree)
    line = ["eva_mim.cli", "cache", str(recipe), "--views", "1", "--dtype", "fp32", "--batch", "12", "--out"]
    for count in (1, 2):
        finish(python(*line, tmp_path / f"cache{count}", processes=count))
    indices = [json.loads((tmp_path / f"cache{count}" / "index.json").read_text()) for count in (1, 2)]
    assert indices[0] == indices[1]
    run("mim", recipe, tmp_path / "live", "view.count=1", "run.micro_batch=12")
    run("mim", recipe, tmp_path / "cached", f"targets.cached={tmp_path / 'cache2'}", "run.micro_batch=12")
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")
    alone = write_recipe(tmp_path / "alone", tree | {"teachers": {"b": teachers["b"]}})  # some of the teachers that are stored
    run("mim", alone, tmp_path / "live_b", "view.count=1", "run.micro_batch=12")
    run("mim", alone, tmp_path / "cached_b", f"targets.cached={tmp_path / 'cache2'}", "run.micro_batch=12")
    assert losses(tmp_path / "cached_b") == losses(tmp_path / "live_b")
    other = write_recipe(tmp_path / "other", tree | {"teachers": {"c": teachers["b"]}})
    assert "teachers.c: None ->" in run("mim", other, tmp_path / "c", f"targets.cached={tmp_path / 'cache2'}", code=2).stderr


def test_a_command_that_was_killed_goes_on(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that are there are kept, half a file is not believed; the end is the same. Two processes write the same."""
    out = tmp_path / "cache"
    shutil.copytree(home / "cache-int8", out)
    (out / "index.json").unlink()
    (out / "train/view-0001/000000.safetensors").rename(out / "train/view-0001/tmp-000000.safetensors")
    kept = (out / "train/view-0000/000000.safetensors").stat().st_mtime_ns
    line = ["cache", str(home / "recipe.yaml"), "--views", "2", "--out", str(out), "--dtype", "int8"]
    assert main(line) == 0
    assert (out / "train/view-0000/000000.safetensors").stat().st_mtime_ns == kept
    assert json.loads((out / "index.json").read_text()) == json.loads((home / "cache-int8/index.json").read_text())
    capsys.readouterr()
    assert main(line) == 0
    assert f"{out}: finished before, nothing to do" in capsys.readouterr().err
    assert main([*line, "view.flip=0.1"]) == 2
    said = f"{out} holds other features; remove it, or choose another folder. What differs: view.flip: 0.5 -> 0.1"
    assert said in capsys.readouterr().err


def test_bytes_are_those_of_the_forecast(home: Path) -> None:
    """Within the 2 % that headers take, and the cosine of int8 is recorded."""
    for dtype in ("fp32", "fp8", "int8"):
        store = FeatureStore(home / f"cache-{dtype}")
        written = sum(file.stat().st_size for file in store.folder.rglob("*.safetensors"))
        assert store.facts.bytes() == pytest.approx(written, rel=0.02)
    cosine = json.loads((home / "cache-int8/index.json").read_text())["cosines"]["teacher"]
    assert 0.999 < cosine < 1
    assert store.damaged() == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_packing(dtype: Any) -> None:
    """No value is off by more than half a step of its type; a patch of zeros stays one."""
    exact = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    exact[0, 0] = 0
    found, largest = unpacked(*packed(exact, dtype)).float(), exact.abs().amax(-1, keepdim=True)
    bits = {"fp32": 24, "bf16": 8, "fp16": 11, "fp8": 4}.get(dtype, 0)
    step = largest / 127 if dtype == "int8" else exact.abs() * 2.0 ** (1 - bits) + largest * 2.0**-17  # below it, less exact ones
    assert bool(((found - exact).abs() <= step / 2 + 1e-7).all())
    assert found[0, 0].abs().max() == 0


@pytest.mark.parametrize(("words", "said"), [
    (["run.seed=1", "view.seed=null"], "view.seed: 3 -> 1; view.seed is run.seed unless it is set"),
    (["view.crop_scale=[0.5,1.0]"], "view.crop_scale: [0.2, 1.0] -> [0.5, 1.0]"),
    (["teacher.layer=1"], "teachers.teacher.layer: -1 -> 1"),
    (["teacher.image_size=32"], "teachers.teacher.image_size: 16 -> 32"),
    (["data.scenes.train=48"], "data.train: 96 -> 48"),
    (["run.precision=bf16"], "precision: fp32 -> bf16"),
    (["view.count=3"], "has 2 views; leave it out, or take fewer"),
    (["student.image_size=64"], "student grid 8x8 (64 px) does not match teacher grid 4x4 (16 px)"),
])
def test_what_it_was_not_made_for_is_refused(words: list[str], said: str, home: Path, tmp_path: Path) -> None:
    refused = run("mim", home / "recipe.yaml", tmp_path / "run", f"targets.cached={home / 'cache-fp32'}", *words, code=2)
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def read(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((home / "recipe.yaml").read_text())
    return found


def test_a_seed_of_the_run_may_differ(home: Path) -> None:
    """Another order of the same images with the same targets."""
    rows = []
    for seed in (0, 1):
        tree = read(home) | {"run": read(home)["run"] | {"seed": seed}, "targets": {"cached": str(home / "cache-fp32")}}
        built = mim.build(parse(mim_recipe.StageRecipe, tree, "r"), torch.device("cpu"))
        batches = [batch for step in built.parts.train.steps(0, 4) for batch in step]
        rows.append({index: batch.stored["teacher.summary"][row] for batch in batches
                     for row, index in enumerate(batch.index.tolist())})
    assert list(rows[0]) != list(rows[1])
    assert all(torch.equal(rows[0][index], rows[1][index]) for index in range(96))


def test_a_teacher_that_changed_under_its_name(home: Path, tmp_path: Path) -> None:
    """And one that is no longer there is no fault: the cache knows what it was."""
    shutil.copytree(home, tmp_path / "mim")
    tree = read(home)
    tree["teacher"]["weights"] = str(tmp_path / "mim" / "teacher.safetensors")
    recipe = write_recipe(tmp_path / "mim", tree)
    cached = f"targets.cached={tmp_path / 'mim' / 'cache-fp32'}"
    weights = load_file(tmp_path / "mim" / "teacher.safetensors")
    weights["norm.bias"][0] += 1
    save_file(weights, tmp_path / "mim" / "teacher.safetensors")
    assert "was made with other weights of teacher" in run("mim", recipe, tmp_path / "run", cached, code=2).stderr
    (tmp_path / "mim" / "teacher.safetensors").unlink()
    run("mim", recipe, tmp_path / "run", cached, "run.epochs=1")


def spoiled(home: Path, folder: Path, how: str) -> Path:
    """A copy of a cache with a fault."""
    shutil.copytree(home / "cache-fp32", folder)
    shard = folder / "train/view-0000/000000.safetensors"
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif how == "no shard":
        shard.unlink()
    elif how == "no index":
        (folder / "index.json").unlink()
    elif how == "no facts":
        (folder / "store.json").unlink()
    elif how == "facts":
        (folder / "store.json").write_text("{}")
    elif how == "flipped":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    return folder


@pytest.mark.parametrize(("how", "said"), [
    ("cut", "is missing or has another size than"), ("no shard", "is missing or has another size than"),
    ("no index", "the cache is not finished; the same `eva-mim cache` command goes on with it"),
    ("no facts", "is no cache of features: it has no store.json"), ("facts", "store.json: "),
])
def test_a_spoiled_cache(how: str, said: str, home: Path, tmp_path: Path) -> None:
    folder = spoiled(home, tmp_path / "cache", how)
    refused = run("mim", home / "recipe.yaml", tmp_path / "run", f"targets.cached={folder}", code=2)
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_flipped_bit_is_found(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `data verify`; what it says makes the cache whole again."""
    folder = spoiled(home, tmp_path / "cache", "flipped")
    assert main(["data", "verify", str(folder)]) == 2
    said = "1 of 3 files are not as they were written: train/view-0000/000000.safetensors; remove them and index.json"
    assert said in capsys.readouterr().err
    (folder / "train/view-0000/000000.safetensors").unlink()
    (folder / "index.json").unlink()
    assert main(["cache", str(home / "recipe.yaml"), "--views", "2", "--out", str(folder), "--dtype", "fp32"]) == 0
    assert main(["data", "verify", str(folder)]) == 0
    assert "3 files of features are as they were written" in capsys.readouterr().out


def test_an_image_that_could_not_be_read(tmp_path: Path) -> None:
    """It has no targets; a run replaces it, as it does with the teacher there."""
    home, images = tmp_path / "mim", tmp_path / "images"
    for number in range(12):
        (images / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        picture(number).save(images / f"class{number % 2}" / f"{number:02d}.png")
    (images / "class1" / "05.png").write_bytes(b"no image")
    data = {"source": "folder", "root": str(images), "val_share": 0.34, "workers": 0, "max_broken": 1.0}
    recipe = write_recipe(home, MIM | {"data": data, "run": MIM["run"] | {"global_batch": 4}})
    assert main(["cache", str(recipe), "--views", "2", "--out", str(home / "cache"), "--dtype", "fp32"]) == 0
    run("mim", recipe, tmp_path / "live", "view.count=2")
    run("mim", recipe, tmp_path / "cached", f"targets.cached={home / 'cache'}")
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")


def test_a_step_from_it_has_no_teacher(home: Path, tmp_path: Path) -> None:
    """In `bench step`: neither a phase nor a forward pass."""
    line = ["bench", "step", str(home / "recipe.yaml"), f"targets.cached={home / 'cache-int8'}", "--to", str(tmp_path / "s.json")]
    assert main(line) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert set(found["phases"]) == {"data", "student", "backward", "optimizer", "rest"}
    assert set(found["forward"]) == {"the student"}


def test_a_disk_that_is_too_small(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert main(["cache", str(home / "recipe.yaml"), "--views", "3", "--out", str(tmp_path / "cache")]) == 2
    assert "and 1e-06 GB are free in" in capsys.readouterr().err


def test_two_writers(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(tmp_path / "cache"):
        assert main(["cache", str(home / "recipe.yaml"), "--views", "2", "--out", str(tmp_path / "cache")]) == 2
    assert f"{tmp_path / 'cache'} is in use by process" in capsys.readouterr().err


def test_views_and_places(home: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["cache", str(home / "recipe.yaml"), "--views", "0", "--out", str(tmp_path / "cache")])
    with pytest.raises(UserError, match="is no cache of features"):
        FeatureStore(tmp_path / "cache")
