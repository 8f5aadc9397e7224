"""The segmentation stage: real runs that are killed, shared among processes and measured again by strangers."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, jaccard_score

import eva_mim.trunks.small  # noqa: F401
from eva_mim.commands import convert
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.splits import open_splits
from finetune.segment import StageRecipe
from tests.conftest import picture
from tests.tiny import (
    CLASSIFY,
    SEGMENT,
    VIT,
    environment,
    losses,
    masked_stage,
    records,
    run,
    run_until,
    same_weights,
    write_recipe,
)

pytestmark = pytest.mark.slow
UPERNET = {"kind": "upernet", "width": 16, "dropout": 0.0}


def recipe_of(tree: dict[str, Any]) -> StageRecipe:
    return parse(StageRecipe, tree, "recipe")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), SEGMENT)


@pytest.fixture(scope="module")
def upernet(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stage with UperNet, dropout and stochastic depth, begun from a masked stage."""
    home = tmp_path_factory.mktemp("segment")
    masked_stage(home)
    run("segment", recipe, home / "out", *words(home))
    return home / "out"


def words(home: Path) -> list[str]:
    return ["student.head.kind=upernet", "student.head.width=16", "student.drop_path=0.1", f"init_from={home / 'mim'}",
            "run.ema_decay=0.9"]


def test_a_masked_stage_seeds_the_trunk(upernet: Path) -> None:
    record = json.loads((upernet / "lineage.json").read_text())
    assert record["classes"] == ["ground", "circle", "square", "triangle", "diamond", "ring", "cross"]
    assert (record["headline"], record["grid"]) == ("miou", [4, 4])
    assert not record["seeded"]["new"]
    assert set(record["metrics"]) == {f"{whose}{name}" for whose in ("", "ema_") for name in
                                      ("miou", "pixel_accuracy", "class_accuracy")}
    assert (upernet / "ema" / "program.pt2").is_file()
    mean = np.array(losses(upernet))
    assert mean[-2:].mean() < mean[:2].mean()
    assert {"loss_pixels", "loss_auxiliary", "pixel_accuracy"} <= records(upernet)[0].keys()


def test_figures_are_those_of_a_plain_script_and_scikit_learn(upernet: Path, tmp_path: Path) -> None:
    """The script in the folder needs neither this package nor timm; scikit-learn counts what it says."""
    source = open_splits(parse(DataSettings, SEGMENT["data"], "data")).val
    truths, said = [], []
    script = runpy.run_path(str(upernet / "segment_image.py"))  # as a program it would be started once for each picture
    about = json.loads((upernet / "segmentation.json").read_text())
    program = torch.export.load(upernet / "program.pt2").module()
    for index in range(len(source)):
        sample = source.read(index)
        assert sample.segmentation is not None
        with torch.inference_mode():
            said.append(script["segment"](program, about, sample.image).numpy().ravel())
        truths.append(sample.segmentation.ravel())
    truth, answer = np.concatenate(truths), np.concatenate(said)
    found = json.loads((upernet / "lineage.json").read_text())["metrics"]
    labels = sorted(set(truth) | set(answer))
    ious = 100 * jaccard_score(truth, answer, average=None, labels=labels)
    assert found["miou"] == pytest.approx(ious.mean(), abs=1e-4)
    assert found["pixel_accuracy"] == pytest.approx(100 * (truth == answer).mean(), abs=1e-4)
    matrix = confusion_matrix(truth, answer)
    there = matrix.sum(1) > 0
    assert found["class_accuracy"] == pytest.approx(100 * (matrix.diagonal()[there] / matrix.sum(1)[there]).mean(), abs=1e-4)
    with (upernet / "segmentation.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    assert [int(row["pixels"]) for row in rows.values()] == np.bincount(truth, minlength=7).tolist()
    assert [float(rows[name]["iou"]) for name in list(rows) if rows[name]["iou"]] == pytest.approx(ious.tolist(), abs=1e-3)

    first = source.read(0)
    first.image.save(tmp_path / "picture.png")  # type: ignore[union-attr]
    done = subprocess.run([sys.executable, upernet / "segment_image.py", tmp_path / "picture.png", tmp_path / "map.png"],
                          env=environment(), capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "map.png") as image:
        assert np.array_equal(np.asarray(image).ravel(), said[0])


def test_the_folder_is_a_trunk_for_timm_and_for_the_next_stage(upernet: Path, recipe: Path, tmp_path: Path) -> None:
    trunk = timm.create_model(f"local-dir:{upernet}", pretrained=True)
    assert trunk(torch.zeros(1, 3, 32, 32)).shape == (1, 96)
    run("segment", recipe, tmp_path / "out", f"init_from={upernet}", "student.frozen=true", "run.epochs=1")
    same_weights(tmp_path / "out" / "model.safetensors", upernet / "model.safetensors")  # a frozen trunk does not move
    assert set(load_file(tmp_path / "out" / "head.safetensors")) == {
        "head.norm.weight", "head.norm.bias", "head.norm.running_mean", "head.norm.running_var", "head.norm.num_batches_tracked",
        "head.classifier.weight", "head.classifier.bias"}


def test_as_an_onnx_graph(upernet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime says what the exported program says, of other numbers of images too."""
    assert convert.main([str(upernet), str(tmp_path / "s.onnx"), "--to", "onnx"]) == 0
    assert "scores" in capsys.readouterr().out
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (scores,) = onnxruntime.InferenceSession(str(tmp_path / "s.onnx")).run(["scores"], {"image": images.numpy()})
    wanted = torch.export.load(upernet / "program.pt2").module()(images)
    torch.testing.assert_close(torch.from_numpy(scores), wanted, rtol=1e-4, atol=1e-4)


def test_pictures_of_predictions(upernet: Path) -> None:
    with Image.open(upernet / "predictions.png") as sheet:
        assert sheet.width > 6 * 144
        assert len(sheet.convert("RGB").getcolors(1 << 20) or ()) > 50
    boards = list((upernet / "tensorboard").iterdir())
    assert any(b"held_out" in board.read_bytes() for board in boards)


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_goes_on_bit_for_bit(step: int, upernet: Path, recipe: Path, tmp_path: Path) -> None:
    """Between evaluations, in the middle of an epoch."""
    more = [*words(upernet.parent), "run.evaluate_every=2"]
    run_until(step, "segment", recipe, tmp_path / "out", *more)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    run("segment", recipe, tmp_path / "out", *more)
    for name in ("model.safetensors", "head.safetensors", "ema/model.safetensors", "ema/head.safetensors"):
        same_weights(tmp_path / "out" / name, upernet / name)


@pytest.mark.parametrize("head", [{"kind": "linear", "dropout": 0.0}, UPERNET], ids=["linear", "upernet"])
def test_two_processes_learn_what_one_learns(head: dict[str, Any], tmp_path: Path) -> None:
    """Batch norms have the statistics of both."""
    path = write_recipe(tmp_path, SEGMENT | {"student": VIT | {"head": head}})
    more = ["run.engine=deepspeed", "run.zero_stage=2", "run.epochs=1", "optim.lr=1e-4"]
    run("segment", path, tmp_path / "one", *more)
    run("segment", path, tmp_path / "two", *more, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name in ("model.safetensors", "head.safetensors"):
        one, two = (load_file(tmp_path / run_ / name) for run_ in ("one", "two"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=2e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
    found = [json.loads((tmp_path / name / "lineage.json").read_text())["metrics"] for name in ("one", "two")]
    assert found[1] == pytest.approx(found[0], abs=0.5)


def test_whole_images_and_windows(upernet: Path, tmp_path: Path) -> None:
    """Of square pictures both are one window; of long ones the whole image has positions of its own."""
    for name, size in (("square", (32, 32)), ("long", (32, 75))):
        for number in range(48):
            split = "train" if number < 24 else "val"
            mask = Image.fromarray(np.random.default_rng(number).integers(0, 2, (4, 4)).astype(np.uint8))
            for folder, image in (("images", picture(number, size)), ("masks", mask.resize(size, Image.Resampling.NEAREST))):
                (tmp_path / name / folder / split).mkdir(parents=True, exist_ok=True)
                image.save(tmp_path / name / folder / split / f"{number:02d}.png")
        (tmp_path / name / "classes.txt").write_text("a\nb\n")
        data = {"source": "folder", "root": str(tmp_path / name), "train": "images/train", "val": "images/val", "workers": 0,
                "segmentation": {"classes": "classes.txt", "train": "masks/train", "val": "masks/val"}}
        path = write_recipe(tmp_path / name, SEGMENT | {"data": data})
        more = [f"init_from={upernet}", "run.epochs=1"]
        run("segment", path, tmp_path / name / "windows", *more)
        run("segment", path, tmp_path / name / "whole", *more, "evaluate.images=whole")
    figures = {name: [json.loads((tmp_path / name / how / "lineage.json").read_text())["metrics"] for how in ("windows", "whole")]
               for name in ("square", "long")}
    assert figures["square"][0] == figures["square"][1]
    assert figures["long"][0] != figures["long"][1]
    assert figures["long"][0]["pixel_accuracy"] == pytest.approx(figures["long"][1]["pixel_accuracy"], abs=15)


@pytest.mark.parametrize(("changes", "text"), [
    (["student.frozen=true"], "student.frozen=true needs init_from"),
    (["student.head.width=9"], "student.head.width: is for student.head.kind=upernet"),
    (["student.head.blocks=[0,9]"], "student.head.blocks=[0, 9]: the trunk has blocks 0 to 3, each once (9)"),
    (["student.head.blocks=[1,-3]"], "one stands there twice"),
    (["student.head={kind: upernet, blocks: [1, 2]}"], "student.head.blocks=[1, 2]: UperNet sees four"),
    (["data.segmentation=null"], "data.segmentation must be given"),
    (["evaluate={images: whole, stride: 0.5}"], "evaluate.stride: is for evaluate.images=windows"),
    (["view.scale=[2, 1]"], "view.scale: [2.0, 1.0] must rise"),
    (["view.crop_pct=0.9"], "view.crop_pct: no such setting"),
    (["student.image_size=30"], "30 px are not a whole number of patches of 8 px"),
])  # fmt: skip
def test_settings_that_do_not_fit(changes: list[str], text: str, recipe: Path, tmp_path: Path) -> None:
    said = run("segment", recipe, tmp_path / "out", *changes, code=2).stderr
    assert text in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "resolved.yaml").exists()


def test_maps_are_for_this_stage_alone(tmp_path: Path) -> None:
    said = run("classify", write_recipe(tmp_path, CLASSIFY | {"data": SEGMENT["data"]}), tmp_path / "out", code=2).stderr
    assert "data.segmentation is for the stage `segment`, and has no effect here" in said
