"""Distillation of a CLIP model's image embeddings from a store, beside the contrastive loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eva_mim.cli import main
from eva_mim.core.batches import ImageTextBatch
from eva_mim.core.settings import parse
from eva_mim.data.sampler import Place
from eva_mim.data.splits import open_splits
from eva_mim.data.store.files import FeatureStore
from eva_mim.data.views import TrainView
from eva_mim.students import ClipSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.tasks.contrastive import Contrastive, ImageText
from eva_mim.teachers import build_teacher
from pretrain import clip
from tests.conftest import make_folder
from tests.students.tiny_towers import clip_folder
from tests.tiny import CLIP, MIM, losses, records, run, same_weights, stopped_after, teacher_file, write_recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a teacher of width 96 in a file, and a cache of two views of it."""
    folder = tmp_path_factory.mktemp("distill") / "clip"
    folder.mkdir()
    teacher = MIM["teacher"] | {"weights": str(teacher_file(folder))}
    recipe = write_recipe(folder, CLIP | {"contrastive": {"distill": {"teacher": teacher | {"weight": 2.0}}},
                                          "run": CLIP["run"] | {"epochs": 3, "checkpoint_every": 2}, "view": {"seed": 3}})
    assert main(["cache", str(recipe), "--views", "2", "--out", str(folder / "cache")]) == 0
    return folder


def recipe_of(home: Path) -> clip.StageRecipe:
    import yaml

    tree = yaml.safe_load((home / "recipe.yaml").read_text())
    tree["contrastive"]["distill"]["cached"] = str(home / "cache")
    return parse(clip.StageRecipe, tree, "recipe")


@pytest.mark.slow
def test_what_comes_with_a_batch_is_the_teachers_of_the_same_crop(home: Path) -> None:
    """Of three epochs, the third with the views of the first; the store has no patches."""
    recipe = recipe_of(home)
    assert recipe.contrastive.distill is not None
    source, teacher = open_splits(recipe.data).train, build_teacher(recipe.contrastive.distill.teacher)
    built = clip.build(recipe, torch.device("cpu"))
    assert set(FeatureStore(home / "cache").row("train", 0, 0)) == {"teacher.summary"}
    view, steps = TrainView(recipe.view, [24, 16]), built.parts.train.steps_per_epoch
    for step, (batch,) in enumerate(built.parts.train.steps(0, 3 * steps)):
        index = int(batch.index[0])
        made = built.parts.train._reader.preparation.draws("view", step // steps % 2, index)  # type: ignore[attr-defined]
        crop = view(source.read(index).image, made)
        assert torch.equal(batch.images[0], crop[24])
        torch.testing.assert_close(batch.stored["teacher.summary"][0], teacher(crop[16][None]).summary[0], atol=1e-5, rtol=1e-5)


def batches(count: int) -> list[ImageTextBatch]:
    made = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 24, 24), dtype=torch.uint8, generator=made)
    texts = torch.randint(1, 1000, (8, 12), generator=made)
    stored = torch.randn(8, 20, generator=made)
    rows = torch.arange(8).chunk(count)
    return [ImageTextBatch(own, images[own], texts[own], torch.arange(len(own)), stored={"t.summary": stored[own]})
            for own in rows]


@pytest.mark.parametrize("width", [20, 32])
def test_the_second_loss(width: int) -> None:
    """One minus the mean cosine, times its weight, beside the contrastive loss; in micro-batches the same gradient."""
    torch.manual_seed(0)
    student = ClipStudent(ClipSettings(**CLIP["student"] | {"embed_dim": 20}), distilled={"image": width}).eval()
    assert isinstance(student.distilled["image"], nn.Identity) == (width == 20)
    whole = [replace(batch, stored={"t.summary": nn.functional.pad(batch.stored["t.summary"], (0, width - 20))})
             for batch in batches(1)]
    task = ImageText(student, Contrastive(), {"image": "t.summary"}, 3.0)
    found = task.loss(student, whole[0])
    image, text, scale, guess = student(whole[0].images, whole[0].texts)
    target = whole[0].stored["t.summary"]
    cosines = [float(torch.dot(a, b) / a.norm() / b.norm()) for a, b in zip(guess.detach(), target, strict=True)]
    expected = Contrastive()(image, text, scale).loss + 3.0 * (1 - sum(cosines) / 8)
    assert float(found.loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(found.terms["distill_image"].metrics["image_cosine"]) == pytest.approx(sum(cosines) / 8, rel=1e-5)
    found.loss.backward()
    gradient = {name: one.grad for name, one in student.named_parameters() if one.grad is not None}
    assert ("distilled.image.weight" in gradient) == (width != 20)
    student.zero_grad()
    parts = [replace(batch, stored={"t.summary": nn.functional.pad(batch.stored["t.summary"], (0, width - 20))})
             for batch in batches(4)]
    for batch in task.prepare(student, parts):
        (task.loss(student, batch).loss / 4).backward()
    for name, value in gradient.items():
        torch.testing.assert_close(dict(student.named_parameters())[name].grad, value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_run_with_it(home: Path, tmp_path: Path) -> None:
    """The embedding comes nearer to the teacher's, a stopped run ends bit for bit alike, two processes follow; open_clip opens
    the result, which has nothing of the linear layer; the teacher is in the record."""
    recipe, cached = home / "recipe.yaml", f"contrastive.distill.cached={home / 'cache'}"
    said = run("clip", recipe, tmp_path / "one", cached).stderr
    assert "contrastive.distill.cached: 3 epochs take turns with 2 views of each image" in said
    cosines = [record["image_cosine"] for record in records(tmp_path / "one", "train")]
    assert cosines[-1] > cosines[0] + 0.1
    resumed = stopped_after(6, tmp_path / "one", tmp_path / "resumed")
    run("clip", recipe, resumed, cached)
    same_weights(resumed / "model.safetensors", tmp_path / "one" / "model.safetensors")
    run("clip", recipe, tmp_path / "two", cached, "run.engine=deepspeed", "run.micro_batch=6", processes=2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    open_clip.create_model(f"local-dir:{tmp_path / 'one'}")
    assert not [name for name in load_file(tmp_path / "one" / "open_clip_model.safetensors") if "distill" in name]
    taught = json.loads((tmp_path / "one" / "lineage.json").read_text())["teachers"]["teacher"]
    assert taught["sha256"] == FeatureStore(home / "cache").facts.networks["teacher"].network["sha256"]


@pytest.mark.slow
def test_captions_too(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A caption belongs to its view: open_clip's embedding of it comes along; of three epochs the third has those of the first.
    The student's comes nearer to it. A cache without captions is refused, and a teacher without a text tower."""
    torch.manual_seed(2)
    folder = clip_folder(tmp_path / "teacher", ClipStudent(ClipSettings(**CLIP["student"] | {"embed_dim": 20})).eval())
    teacher = {"kind": "stage", "name": str(folder)}
    root = make_folder(tmp_path / "images", {"cat": 30, "dog": 30}, (24, 24))
    data = {"root": str(root), "val_share": 0.2, "templates": ["a {}", "one {}", "{} here"], "workers": 0}
    tree = CLIP | {"data": data, "contrastive": {"distill": {"teacher": teacher, "captions": True}}, "view": {"seed": 3},
                   "run": CLIP["run"] | {"epochs": 3}}
    recipe, cache = write_recipe(tmp_path / "clip", tree), tmp_path / "cache"
    assert main(["cache", str(recipe), "--views", "2", "--out", str(cache)]) == 0
    tree["contrastive"]["distill"]["cached"] = str(cache)
    built = clip.build(parse(clip.StageRecipe, tree, "recipe"), torch.device("cpu"))
    model, tokenize = open_clip.create_model(f"local-dir:{folder}").eval(), open_clip.get_tokenizer(f"local-dir:{folder}")
    reader, steps = built.parts.train._reader, built.parts.train.steps_per_epoch  # type: ignore[attr-defined]
    seen: dict[int, set[str]] = {}
    for step, (batch,) in enumerate(built.parts.train.steps(0, 3 * steps)):
        for row, index in enumerate(batch.index.tolist()):
            place = Place(step // steps, index)
            (text,) = reader.preparation._texts(reader.source.read(index), place, reader.source.classes)
            seen.setdefault(index, set()).add(text)
            if row == 0:
                with torch.no_grad():
                    expected = model.encode_text(tokenize([text]))[0]
                torch.testing.assert_close(batch.stored["teacher.caption"][row], expected, atol=1e-5, rtol=1e-5)
    assert {len(texts) for texts in seen.values()} == {1, 2}
    run("clip", recipe, tmp_path / "run", f"contrastive.distill.cached={cache}")
    found = records(tmp_path / "run", "train")
    assert found[-1]["text_cosine"] > found[0]["text_cosine"] + 0.1
    run("clip", recipe, tmp_path / "alone", f"contrastive.distill.cached={cache}", "contrastive.distill.captions=false")
    assert "text_cosine" not in records(tmp_path / "alone", "train")[0]
    said = run("clip", home / "recipe.yaml", tmp_path / "no", f"contrastive.distill.cached={home / 'cache'}",
               "contrastive.distill.captions=true", code=2).stderr
    assert "has no embeddings of captions; make another one" in said
    line = ["cache", str(home / "recipe.yaml"), "--views", "1", "--out", str(tmp_path / "c"), "contrastive.distill.captions=true"]
    assert main(line) == 2
    assert "contrastive.distill.teacher.kind=timm has no text tower for captions" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("words", "said"), [
    ([], "contrastive.distill.cached must be given: `eva-mim cache RECIPE --views K --out DIR` makes it"),
    (["CACHED", "contrastive.distill.teacher.final_norm=false"], "teachers.teacher.final_norm: True -> False"),
    (["CACHED", "view.crop_scale=[0.5,1.0]"], "view.crop_scale: [0.9, 1.0] -> [0.5, 1.0]"),
])
def test_what_is_refused(words: list[str], said: str, home: Path, tmp_path: Path) -> None:
    given = [f"contrastive.distill.cached={home / 'cache'}" if word == "CACHED" else word for word in words]
    refused = run("clip", home / "recipe.yaml", tmp_path / "run", *given, code=2).stderr
    assert said in refused
    assert "Traceback" not in refused


@pytest.mark.slow
@pytest.mark.parametrize(("program", "words", "said"), [
    ("clip", ["--pca", "8"], "--dtype, --pca and --hidden are for features of patches"),
    ("clip", ["contrastive.distill=null"], "contrastive.distill.teacher must be given"),
    ("classify", [], "which has no teacher: a cache is for mim and clip"),
])
def test_what_a_cache_is_refused_for(
    program: str, words: list[str], said: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = home / "recipe.yaml" if program == "clip" else write_recipe(tmp_path / program, {})
    assert main(["cache", str(recipe), "--views", "1", "--out", str(tmp_path / "cache"), *words]) == 2
    assert said in capsys.readouterr().err
