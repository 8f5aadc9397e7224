"""A CLIP student that starts from a whole CLIP model: the same features, at another size too; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from eva_mim.core.errors import UserError
from eva_mim.students import ClipSettings, TextSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.trunks.pixels import normalise
from eva_mim.weights import HandOverSettings
from eva_mim.weights.clip import init_clip_from_clip, with_text_of
from pretrain.clip import StageRecipe
from tests.convert.golden_files import clip_config, golden, known_to_open_clip
from tests.students.tiny_towers import clip_folder, clip_settings, pairs
from tests.tiny import CLIP, run, write_recipe


@pytest.fixture
def parent(tmp_path: Path) -> tuple[ClipStudent, str]:
    """A student with a moved scale and a bias, and its folder."""
    torch.manual_seed(0)
    student = ClipStudent(clip_settings(init_logit_bias=-3.0, proj_bias=True)).eval()
    with torch.no_grad():
        student.model.logit_scale.fill_(1.5)
    return student, clip_folder(tmp_path / "parent", student)


def child_of(folder: str, **options: Any) -> tuple[ClipStudent, Any]:
    settings = with_text_of(clip_settings(init="clip", proj_bias=True, text={}, **options), folder)
    torch.manual_seed(1)
    student = ClipStudent(settings).eval()
    return student, init_clip_from_clip(student, folder, settings, HandOverSettings())


def test_the_child_says_what_its_parent_says(parent: tuple[ClipStudent, str]) -> None:
    student, folder = parent
    child, report = child_of(folder, init_logit_bias=7.0)
    assert (report.new, report.resized, report.ignored) == ([], [], [])
    assert len(report.loaded) == len(student.model.state_dict())
    images, texts = pairs(0)
    for mine, theirs in zip(child(images, texts), student(images, texts), strict=True):
        assert torch.equal(mine, theirs)
    model = open_clip.create_model(f"local-dir:{folder}").eval()  # what another library makes of the same folder
    torch.testing.assert_close(child.encode_text(texts), model.encode_text(texts, normalize=True), atol=1e-6, rtol=0)


def test_positions_and_context_are_resized_and_what_is_missing_is_new(parent: tuple[ClipStudent, str]) -> None:
    student, folder = parent
    record = Path(folder) / "lineage.json"
    record.write_text(json.dumps({"finished": True, "grid": [4, 4]}))
    child, report = child_of(folder, name="vit_of_tests_48", init_logit_bias=None)
    assert report.resized == ["pos_embed"]
    assert report.ignored == ["logit_bias"]
    positions = load_file(Path(folder) / "open_clip_model.safetensors")["visual.trunk.pos_embed"]
    assert torch.equal(child.trunk.pos_embed, resample_abs_pos_embed(positions, [6, 6], [4, 4]))
    _, texts = pairs(0)
    assert torch.equal(child.encode_text(texts), student.encode_text(texts))


def test_what_is_no_whole_model_or_another_space_is_refused(parent: tuple[ClipStudent, str], tmp_path: Path) -> None:
    student, folder = parent
    with pytest.raises(UserError, match=r"student\.embed_dim=20: visual\.head\.proj\.weight is \[12, 16\]"):
        child_of(folder, embed_dim=20)
    with pytest.raises(UserError, match=r"does not describe its text tower; name its architecture in student\.text\.init_from"):
        with_text_of(clip_settings(init="clip", text={}), str(Path(folder) / "open_clip_model.safetensors"))
    torch.save(student.trunk.state_dict(), tmp_path / "trunk.pt")
    settings = clip_settings(init="clip")
    with pytest.raises(UserError, match="no CLIP model with a timm image tower and a text tower"):
        init_clip_from_clip(ClipStudent(settings), str(tmp_path / "trunk.pt"), settings, HandOverSettings())
    for wrong in ({"weights": "openai", "init_from": "ViT-B-32"}, {"projection": "new"}):
        with pytest.raises(ValueError, match=r"student\.init=clip takes the text tower"):
            clip_settings(init="clip", text=TextSettings(**wrong))
    with pytest.raises(ValueError, match=r"student\.init=clip needs init_from"):
        StageRecipe(**CLIP | {"student": CLIP["student"] | {"init": "clip"}})
    with pytest.raises(ValueError, match=r"student\.lock_image=true .* set init_from"):
        StageRecipe(**CLIP | {"student": CLIP["student"] | {"lock_image": True}})


@pytest.mark.slow
def test_a_stage_goes_on_from_a_whole_stage(tmp_path: Path) -> None:
    """In real runs: nothing learned is lost, and the parent's content is part of the identity."""
    recipe = write_recipe(tmp_path, CLIP)
    run("clip", recipe, tmp_path / "first")
    overrides = [f"init_from={tmp_path / 'first'}", "student.init=clip", "student.text={}", "optim.lr=1.0e-12",
                 "run.epochs=null", "run.samples=50"]
    run("clip", recipe, tmp_path / "second", *overrides)
    first, second = (json.loads((tmp_path / name / "lineage.json").read_text()) for name in ("first", "second"))
    assert second["seeded"]["new"] == second["seeded"]["ignored"] == []
    assert second["parents"]["init_from"]["path"].endswith("first/open_clip_model.safetensors")
    assert (second["steps"], second["samples_seen"]) == (2, 48)  # 50 samples are two steps of 24
    assert second["metrics"] == pytest.approx(first["metrics"], abs=1e-3)


@pytest.mark.parametrize("name", ["clip_eva02_b", pytest.param("EVA02-B-16", marks=pytest.mark.long)])
def test_open_clips_own_eva_models_keep_their_projection(shared: Path, tmp_path: Path, name: str) -> None:
    """There the trunk's own head is the projection; here it stands behind the trunk. The small one has the golden sizes."""
    small = name == "clip_eva02_b"
    config = clip_config(golden(shared, name)) if small else open_clip.get_model_config(name)
    with known_to_open_clip(tmp_path, **({name: config} if small else {})):
        torch.manual_seed(0)
        theirs = open_clip.create_model(name).eval()
        torch.save(theirs.state_dict(), tmp_path / "model.pt")
        settings = ClipSettings(name=config["vision_cfg"]["timm_model_name"], embed_dim=config["embed_dim"], pool="token",
                                proj_bias=True, init="clip", text={"init_from": name})  # fmt: skip
        student = ClipStudent(settings).eval()
        report = init_clip_from_clip(student, str(tmp_path / "model.pt"), settings, HandOverSettings())
    assert (report.new, report.ignored) == ([], [])
    side = config["vision_cfg"]["image_size"]
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs.encode_image(normalise(images, student.mean, student.std), normalize=True)
        torch.testing.assert_close(student.encode_image(images), expected, atol=2e-6, rtol=0)
