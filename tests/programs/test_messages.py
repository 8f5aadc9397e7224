"""A user's mistake ends in one clear text, exit code 2 and no traceback; broken data in a count and a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eva_mim.data import DataSettings
from eva_mim.data.splits import open_splits
from eva_mim.run.program import guard
from tests.conftest import make_shards
from tests.ranks import Launched, ends
from tests.tiny import CLASSIFY, CLIP, MIM, OPTIM, RUN, VIT, finish, python, records, run, write_recipe

pytestmark = pytest.mark.slow


def folder_of_images(root: Path, broken: int = 0, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Class folders with 40 pictures each; the first `broken` of the first class are not images."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(40):
            path = root / name / f"{index:03d}.png"
            if number == 0 and index < broken:
                path.write_bytes(b"this is no picture")
            else:
                Image.new("RGB", (40, 36), (index * 6, 80 * number, 200)).save(path)
    return root


def on_folder(root: Path, **data: Any) -> dict[str, Any]:
    """A classification recipe on a folder."""
    return {"data": {"source": "folder", "root": str(root), "workers": 0, "val_share": 0.2, **data},
            "run": RUN | {"global_batch": 8, "epochs": 2}, "optim": OPTIM, "student": VIT}


def refused(tmp_path: Path, program: str, tree: dict[str, Any], *overrides: str) -> str:
    """The text of a run that must end with the user's exit code."""
    text = run(program, write_recipe(tmp_path, tree), tmp_path / "run", *overrides, code=2).stderr
    assert "Traceback" not in text, text
    return text


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    """Both name the folder. A program of its own says so as well, with its exit code."""
    recipe = write_recipe(tmp_path, on_folder(tmp_path / "none"))
    assert Launched(ends, "finetune.classify", [str(recipe), "--out", str(tmp_path / "run")], log=tmp_path / "log").wait(200) == 2
    said = (tmp_path / "log").read_text()
    first, *lines = said.splitlines()
    assert first == f"classify {recipe} -> {tmp_path / 'run'}"  # before torch is loaded
    assert lines[0].startswith("error: ")
    assert f"{tmp_path / 'none'} is not a folder" in said
    assert "Traceback" not in said
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: no images here" in refused(tmp_path, "classify", on_folder(tmp_path / "empty"))


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    """Keys and shapes are named."""
    run("classify", write_recipe(tmp_path / "small", CLASSIFY), tmp_path / "small" / "run", "run.epochs=1")
    tree = CLASSIFY | {"student": {"name": "vit_mini_patch4_32"}, "init_from": str(tmp_path / "small" / "run")}
    text = refused(tmp_path, "classify", tree)
    assert "is of another architecture" in text
    assert "blocks.0.attn.proj.bias: [96] in the checkpoint, [128] here" in text


def test_grids_that_do_not_fit_name_both_ways_out(tmp_path: Path) -> None:
    """The sizes in the text really fit."""
    tree = MIM | {"student": {"name": "vit_nano_patch4_32", "image_size": 24}}
    text = refused(tmp_path, "mim", tree)
    assert "student grid 6x6 (24 px) does not match teacher grid 4x4 (16 px)" in text
    assert "set student.image_size=16, or set teacher.image_size=24" in text
    run("mim", tmp_path / "recipe.yaml", tmp_path / "run", "teacher.image_size=24", "run.epochs=1")


def test_broken_images_are_counted_named_and_replaced(tmp_path: Path) -> None:
    """Three of 80 are allowed to be broken here; each is named."""
    root = folder_of_images(tmp_path / "images", broken=3)
    done = run("classify", write_recipe(tmp_path, on_folder(root, max_broken=0.2)), tmp_path / "run")
    assert records(tmp_path / "run")[-1]["broken"] > 0
    assert "broken image replaced: cat/00" in done.stderr


def test_too_many_broken_images_stop_the_run(tmp_path: Path) -> None:
    """Half of the images cannot be read."""
    root = folder_of_images(tmp_path / "images", broken=40)
    text = refused(tmp_path, "classify", on_folder(root))
    assert "images are broken, more than data.max_broken=1.00%" in text


def test_flat_folder_without_labels(tmp_path: Path) -> None:
    """Good for masked pretraining, refused by a classifier."""
    root = tmp_path / "flat"
    root.mkdir()
    for index in range(40):
        Image.new("RGB", (40, 40), (index * 6, 9, 200)).save(root / f"{index}.png")
    run("mim", write_recipe(tmp_path, on_folder(root) | {"teacher": MIM["teacher"]}), tmp_path / "mim")
    assert "knn_top1" not in json.loads((tmp_path / "mim" / "lineage.json").read_text())["metrics"]
    assert "has no labels" in refused(tmp_path, "classify", on_folder(root))


def test_batches_that_do_not_divide(tmp_path: Path) -> None:
    """Both numbers are in the text."""
    assert "run.global_batch=24 is not a multiple of run.micro_batch=7 x 1" in refused(
        tmp_path, "classify", CLASSIFY, "run.micro_batch=7"
    )
    assert "run.global_batch=500 is more than the 96 training images" in refused(
        tmp_path, "classify", CLASSIFY, "run.global_batch=500"
    )


def test_mistakes_of_the_clip_stage(tmp_path: Path) -> None:
    """Captions that are missing, a text tower of another width, fewer images in a step than processes."""
    root = folder_of_images(tmp_path / "images")
    for path in root.glob("*/*.png"):
        path.rename(root / f"{path.parent.name}{path.name}")
    for name in ("cat", "dog"):
        (root / name).rmdir()
    tree = on_folder(root) | {"student": CLIP["student"]}
    text = refused(tmp_path, "clip", tree)
    assert "no caption (KEY.txt, KEY.json, data.captions, data.columns.captions) and no class name" in text
    text = refused(tmp_path, "clip", CLIP, "student.text={init_from: ViT-B-32, width: 64}")
    assert "student.text.width=64: the text tower of ViT-B-32 has 512; leave it out" in text
    few = ("run.engine=deepspeed", "run.global_batch=1")
    done = run("clip", write_recipe(tmp_path, CLIP), tmp_path / "run", *few, processes=2, code=2)
    said = "error: run.global_batch=1 is not a multiple of 2 processes; nearest: run.global_batch=2"
    assert done.stderr.count(said) == 2  # on every rank
    assert "Traceback" not in done.stderr


def test_captions_that_are_cut_are_said(tmp_path: Path) -> None:
    """Those of every tenth image have more words than the text tower has places, with those of start and end."""
    root = folder_of_images(tmp_path / "images")
    for number, path in enumerate(sorted(root.glob("*/*.png"))):
        path.with_suffix(".txt").write_text(" ".join(["word"] * (30 if number % 10 == 7 else 10)))
    tree = on_folder(root) | {"student": CLIP["student"]}
    train = open_splits(DataSettings.model_validate(tree["data"])).train
    long = sum(len(train.read(place).captions[0]) > 100 for place in range(len(train)))
    assert long > 3
    said = run("clip", write_recipe(tmp_path, tree), tmp_path / "run", "run.epochs=1").stderr
    assert f"captions: {long} of 64 looked at are cut after student.text.context_length=12 tokens; the longest has 32" in said


def test_class_lists_that_are_not_the_heads(tmp_path: Path) -> None:
    """Labels beyond the list, a held-out set with other classes, words in the place of classes, an unknown layout."""
    make_shards(tmp_path / "shards", classes=3)
    (tmp_path / "shards" / "classes.txt").write_text("ant\nbee\n")
    shards = {"source": "shards", "root": str(tmp_path / "shards"), "classes": "classes.txt", "workers": 0}
    text = refused(tmp_path, "classify", CLASSIFY | {"data": shards})
    assert "data.classes: classes.txt has 2 names, but train-000000.tar/00002 has label 2" in text
    root = folder_of_images(tmp_path / "train")
    held_out = {"held_out": {"root": str(folder_of_images(tmp_path / "other", classes=("cat", "eel")))}}
    text = refused(tmp_path, "classify", on_folder(root, **held_out))
    assert "data.held_out: its classes (no layout of ImageNet) are not those of the training images" in text
    text = refused(tmp_path, "classify", on_folder(root, class_names="imagenet"))
    assert "data.class_names=imagenet is for captions" in text
    done = finish(python("eva_mim.cli", "labels", root, "--expect", "imagenet-21k-p-winter"), 2)
    assert "Traceback" not in done.stderr
    assert "did you mean imagenet-21k-p-winter21?" in done.stderr


def test_unknown_names_list_known_ones(tmp_path: Path) -> None:
    """Of the project's own registry and of timm's."""
    assert "data.source: 'shard' is not known; did you mean shards?" in refused(
        tmp_path, "classify", CLASSIFY, "data.source=shard", "data.root=."
    )
    assert "did you mean vit_nano_patch4_32" in refused(tmp_path, "classify", CLASSIFY, "student.name=vit_nano_patch4_33")


def test_no_space_left_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever was to be written; other errors of the system stay errors of the program."""
    assert guard(lambda: Path("/dev/full").write_text("figures")) == 2
    assert capsys.readouterr().err == (
        "error: a file: No space left on device; make room, then the same command goes on from the last checkpoint\n")
    with pytest.raises(IsADirectoryError):
        guard(lambda: Path("/dev").read_text())


def test_only_a_broken_collective_is_a_lost_process() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        guard(lambda: torch.zeros(2).view(3))
