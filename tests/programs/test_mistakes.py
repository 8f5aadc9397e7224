"""Settings and places that cannot work: one line with the values and what to do, before a library says it in a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_mim.core.devices import pick_device
from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.settings import override, parse
from eva_mim.run.state import state_of
from eva_mim.students.classifier import Classifier
from eva_mim.teachers import TeacherSettings, build_teacher
from finetune.classify import StageRecipe
from pretrain.mim_recipe import StageRecipe as MimRecipe
from tests.conftest import REPOSITORY, make_folder
from tests.ranks import Launched, script
from tests.tiny import CLASSIFY, MIM, records, run, write_recipe


def refused(model: Any, tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        parse(model, tree, "r.yaml")
    return str(error.value)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_needs_pairs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """timm asserts it in the first step."""
    tree = CLASSIFY | {"mix": {name: 0.8}, "run": CLASSIFY["run"] | {"global_batch": 21, "micro_batch": 7}}
    said = f"mix.{name}=0.8 mixes the images of a micro-batch in pairs, and run.micro_batch is 7; set"
    assert said in refused(StageRecipe, tree)
    assert parse(StageRecipe, tree | {"mix": {}}, "r.yaml").run.micro_batch == 7
    split = tree | {"run": CLASSIFY["run"] | {"global_batch": 24}}
    assert parse(StageRecipe, split, "r.yaml").mix
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "and run.global_batch=24 / processes is 3" in refused(StageRecipe, split)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"run.device=cuda: torch .* (was built without CUDA|sees no GPU .*); set run.device=cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.setenv(name, "5")
    with pytest.raises(UserError, match="rank 5 is process 5 of its host, which shows 4 GPUs"):
        pick_device("auto")


@pytest.mark.parametrize(("size", "patch", "ways"), [(30, 4, "28 or 32"), (32, 5, "30 or 35")])
def test_an_image_that_is_no_whole_number_of_patches(size: int, patch: int, ways: str) -> None:
    """timm's patch embedding drops the rest without a word."""
    student = {"name": "vit_nano_patch4_32", "image_size": size, "patch_size": patch}
    settings = parse(StageRecipe, CLASSIFY | {"student": student}, "r.yaml").student
    with pytest.raises(UserError, match=f"student.image_size={size}: .* patches of {patch} px; .* Set it to {ways}"):
        Classifier(settings, 3)


def test_hints_lead_to_the_section_and_to_the_name() -> None:
    said = refused(StageRecipe, CLASSIFY | {"run": CLASSIFY["run"] | {"warmup_epochs": 1}})
    assert "run.warmup_epochs: no such setting; did you mean optim.warmup_epochs?" in said
    for kind, name, near in (("timm", "vit_smal_patch16_224", "vit_small_patch16_224"), ("open_clip", "ViT-B-61", "ViT-B-16")):
        with pytest.raises(UserError, match=rf"teacher.name: .*did you mean .*{near}"):
            build_teacher(TeacherSettings(kind=kind, name=name))


def test_a_parent_that_is_missing_is_named_by_its_setting(tmp_path: Path) -> None:
    tree = MIM | {"teacher": {"kind": "stage", "name": str(tmp_path / "clip_teacher")}}
    recipe = parse(MimRecipe, tree, "r.yaml")
    with pytest.raises(UserError, match=f"teacher.name: {tmp_path / 'clip_teacher'} does not exist; where another stage"):
        state_of("mim", recipe, tmp_path / "out")


# ---- YAML


@pytest.mark.parametrize(("text", "said"), [
    ("run:\n  epochs: 1\n  seed: 2\n  epochs: 30\n", "line 4: epochs stands in line 2 already"),
    ("data: {root: a}\nrun: {}\ndata: {root: b}\n", "line 3: data stands in line 1 already"),
    ("data:\n  mixture:\n  - {root: a, root: b}\n", "line 3: root stands in line 3 already"),
    ("data:\n  label_map:\n    on: [a]\n", "line 3: the key on is read as True, no text; write it in quotes"),
    ("data:\n  label_map:\n    1: [a]\n", "line 3: the key 1 is read as 1, no text"),
    ("? [a, b]\n: 1\n", "no text"),
])
def test_keys_that_yaml_reads_otherwise_than_meant(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert said in str(error.value)


def test_merged_keys_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(path)["b"] == {"x": 1, "y": 3}
    with pytest.raises(UserError, match="stands in line 1 already"):
        override({}, ["a={x: 1, x: 2}"])


# ---- places


def test_out_is_not_the_data(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", {"train/cat": 2, "train/dog": 2, "val/cat": 1})
    recipe = parse(StageRecipe, CLASSIFY | {"data": {"root": str(root), "train": "train", "val": "val"}}, "r.yaml")
    for out in (root / "train" / "run", root / "val" / "a" / "run", root / ".." / "images" / "train" / "run"):
        with pytest.raises(UserError, match=r"lies in data.root=.*, among the images, and would be taken for a class"):
            state_of("classify", recipe, out)
    with pytest.raises(UserError, match=r"is the folder of data.root; choose another one"):
        state_of("classify", recipe, root)
    assert state_of("classify", recipe, root / "runs" / "one").plan() == "runs"  # beside the splits
    parent = CLASSIFY | {"init_from": str(root)}
    with pytest.raises(UserError, match="is the folder of init_from"):
        state_of("classify", parse(StageRecipe, parent, "r.yaml"), root)


READ_ONLY = """
import ctypes, subprocess, sys
def mounted(*words): return subprocess.run(["mount", *words], stderr=subprocess.DEVNULL).returncode == 0
place = sys.argv.pop(1)
if ctypes.CDLL(None).unshare(0x00020000) or not mounted("--make-rprivate", "/") or not mounted(
        "-t", "tmpfs", "-o", "ro", "tmpfs", place):
    sys.exit(77)
from eva_mim.run.program import leave
from eva_mim.cli import main
leave(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_out_that_cannot_be_written(tmp_path: Path) -> None:
    """A file, a folder below a file, a read-only file system."""
    recipe = write_recipe(tmp_path, CLASSIFY)
    (tmp_path / "file").write_text("mine")
    for out, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        said = run("classify", recipe, out, code=2).stderr
        assert f"error: --out {out}: {why}; choose another folder" in said
        assert "Traceback" not in said
    (tmp_path / "disk").mkdir()
    for words in (["classify", str(recipe), "--out", str(tmp_path / "disk")],
                  ["classify", str(recipe), "--out", str(tmp_path / "disk" / "run")]):
        log = tmp_path / "log"
        process = Launched(script, READ_ONLY, str(tmp_path / "disk"), *words, log=log)
        if process.wait(60) == 77:
            pytest.skip("no mount namespace here")
        assert process.wait(1) == 2, log.read_text()
        assert "Read-only file system; choose another folder" in log.read_text()
        assert "Traceback" not in log.read_text()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_reader_that_ends_early(tmp_path: Path) -> None:
    """`eva-mim data inspect DATA | head -1`: no traceback, and the code of a broken pipe."""
    root = make_folder(tmp_path / "images", {f"class{number:03d}": 1 for number in range(40)})
    command = f"{sys.executable} -m eva_mim.cli data inspect {root} --processes 1"
    line = f"{command} 2>err | (exec <&-; sleep 0); echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin",
                          "EVA_MIM_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True, check=True)
    assert done.stdout == "141\n", (tmp_path / "err").read_text()
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert "BrokenPipe" not in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_settings_of_gpus_are_said_to_have_no_effect_on_a_cpu(tmp_path: Path) -> None:
    """And the final figures are measured once more, exactly."""
    recipe = write_recipe(tmp_path, CLASSIFY | {"run": CLASSIFY["run"] | {"epochs": 1}})
    done = run("classify", recipe, tmp_path / "run", "run.tf32=true", "run.deterministic=true")
    assert "local, fp32 (without effect on a CPU: run.tf32, run.deterministic)" in " ".join(done.stderr.split())
    during, final = (records(tmp_path / "run", kind) for kind in ("eval", "final"))
    assert [row["top1"] for row in final] == [row["top1"] for row in during]
