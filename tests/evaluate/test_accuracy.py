"""`eva-mim evaluate --on`: a finished classifier from its folder, against its log, a loop, and on two processes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from eva_mim.commands import evaluate as reevaluate
from eva_mim.data.class_lists import layout_classes
from eva_mim.data.views import to_tensor
from eva_mim.students import ClassifierSettings
from eva_mim.students.classifier import Classifier
from eva_mim.weights.export import write_timm
from tests.conftest import make_folder
from tests.tiny import CLASSIFY, finish, python, records, run, write_recipe

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def finished(folder: Path, classes: tuple[str, ...] = CLASSES, named: bool = True) -> Classifier:
    """A classifier with random weights, and its folder as a stage leaves it."""
    torch.manual_seed(0)
    settings = ClassifierSettings(name="vit_nano_patch4_32", head_scale=1.0)
    student = Classifier(settings, len(classes)).eval()
    folder.mkdir(exist_ok=True)
    weights = student.timm_weights(dict(student.state_dict()))
    write_timm(folder, student.trunk, settings, weights, classes=classes, global_pool="avg")
    if not named:
        config = json.loads((folder / "config.json").read_text())
        del config["label_names"]
        (folder / "config.json").write_text(json.dumps(config))
    return student


def rows(text: str) -> dict[str, list[str]]:
    """Lines of the table by their first word."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


def test_a_folder_of_images_against_a_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = finished(tmp_path / "stage")
    data = make_folder(tmp_path / "data", {name: 2 + number for number, name in enumerate(CLASSES)}, (32, 32))
    right, five, images = [0] * 7, [0] * 7, [0] * 7
    for label, name in enumerate(CLASSES):
        for path in sorted((data / name).iterdir()):
            with torch.inference_mode():
                logits = student(to_tensor(Image.open(path))[None])[0].tolist()
            order = sorted(range(7), key=lambda place, logits=logits: -logits[place])
            images[label] += 1
            right[label] += order[0] == label
            five[label] += label in order[:5]
    for given in (f"val={data}", str(data)):
        options = ["--data", given, "--csv", str(tmp_path / "x.csv"), "--workers", "0"]
        assert reevaluate.main([str(tmp_path / "stage"), *options]) == 0
        found = rows(capsys.readouterr().out)
        assert found["val"] == ["35", f"{100 * sum(right) / 35:.3f}", f"{100 * sum(five) / 35:.3f}", "7"]
    table = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [(line["class"], int(line["images"])) for line in table] == list(zip(CLASSES, images, strict=True))
    for line, first, near in zip(table, right, five, strict=True):
        assert (float(line["top1"]), float(line["top5"])) == pytest.approx(
            (100 * first / int(line["images"]), 100 * near / int(line["images"])), abs=1e-3
        )


def test_a_classifier_of_other_channels_is_not_for_these_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ClassifierSettings(name="vit_nano_patch4_32", mean=(0.5,), std=(0.2,))
    student = Classifier(settings, len(CLASSES))
    (tmp_path / "stage").mkdir()
    weights = student.timm_weights(dict(student.state_dict()))
    write_timm(tmp_path / "stage", student.trunk, settings, weights, classes=CLASSES, global_pool="avg")
    data = make_folder(tmp_path / "data", dict.fromkeys(CLASSES, 1), (32, 32))
    assert reevaluate.main([str(tmp_path / "stage"), "--data", str(data), "--workers", "0"]) == 2
    assert "it is for images of 1 channels; these test sets are RGB" in capsys.readouterr().err


def test_several_sets_at_once_and_their_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head for the 200 classes of ImageNet-A looks at two copies of them."""
    names = layout_classes("imagenet-a")
    finished(tmp_path / "stage", names)
    data = make_folder(tmp_path / "data", dict.fromkeys(names, 1), (32, 32))
    code = reevaluate.main([str(tmp_path / "stage"), "--on", f"a={data}", "--on", f"val={data}", "--workers", "0"])
    assert code == 0
    found = rows(capsys.readouterr().out)
    assert found["a"] == found["val"]
    assert found["a"][0] == found["a"][-1] == "200"
    assert found["average"][0] == found["a"][1]
    assert found["gap"][0] == "0.000"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--on", "v2=DATA"], "--on v2=DATA: expected 1000 class folders with images; 1000 missing: 0, 1, 10, "),
        (["--on", "w=DATA"], "--on w=DATA: no such test set; known: val, v2, real"),
        (["--on", "DATA", "data.root=/x"], "data.root=/x: settings are those of a run with its own data"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    finished(tmp_path / "stage")
    data = make_folder(tmp_path / "data", dict.fromkeys(CLASSES, 1))
    given = [argument.replace("DATA", str(data)) for argument in arguments]
    assert reevaluate.main([str(tmp_path / "stage"), *given]) == 2
    assert text.replace("DATA", str(data)) in capsys.readouterr().err


def test_a_head_that_does_not_name_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = layout_classes("mini-imagenet")
    finished(tmp_path / "stage", names, named=False)
    data = make_folder(tmp_path / "data", dict.fromkeys(names, 1), (32, 32))
    command = [str(tmp_path / "stage"), "--on", str(data), "--workers", "0"]
    assert reevaluate.main(command) == 2
    assert "does not name the classes of its 100 outputs; say them with --classes mini-imagenet" in capsys.readouterr().err
    assert reevaluate.main([*command, "--classes", "imagenet-a"]) == 2
    assert "has 100 outputs, but --classes imagenet-a has 200 classes" in capsys.readouterr().err
    assert reevaluate.main([*command, "--classes", "mini-imagenet"]) == 0
    assert rows(capsys.readouterr().out)["val"][0] == "100"
    assert reevaluate.main([str(tmp_path / "data"), "--on", str(data)]) == 2
    assert "is no classifier that timm opens" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_stage_has_the_figures_of_its_log_on_any_number_of_processes(tmp_path: Path) -> None:
    """Student and average, in the run's precision; 49 held-out images do not divide by two."""
    val = {name: 4 + number for number, name in enumerate(CLASSES)}
    for split, classes in (("train", dict.fromkeys(CLASSES, 20)), ("val", val)):
        make_folder(tmp_path / "data" / split, classes, (36, 32))
    data = {"source": "folder", "root": str(tmp_path / "data"), "train": "train", "val": "val", "workers": 0}
    recipe = write_recipe(tmp_path, CLASSIFY | {"data": data})
    out = tmp_path / "run"
    run("classify", recipe, out, "run.ema_decay=0.9", "run.precision=bf16", "run.global_batch=20")
    logged = records(out, "eval")[-1]
    for folder, prefix, processes in ((out, "", 1), (out, "", 2), (out / "ema", "ema_", 1)):
        done = finish(python("eva_mim.cli", "evaluate", folder, "--on", tmp_path / "data" / "val", processes=processes))
        expected = ["49", f"{logged[prefix + 'top1']:.3f}", f"{logged[prefix + 'top5']:.3f}", "7"]
        assert rows(done.stdout)["val"] == expected, (folder, processes)
