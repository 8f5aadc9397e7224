"""The text tower's start: from another one, whole, cut, stretched or refused; every tensor accounted for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_mim.core.errors import UserError
from eva_mim.students import TextSettings
from eva_mim.students.clip import ClipStudent, text_source
from tests.students.tiny_towers import clip_folder, clip_settings, pairs


@pytest.fixture
def parent(tmp_path: Path) -> tuple[ClipStudent, str]:
    """A student and its folder."""
    torch.manual_seed(0)
    student = ClipStudent(clip_settings())
    return student, clip_folder(tmp_path / "parent", student)


def test_every_tensor_is_accounted_for(parent: tuple[ClipStudent, str]) -> None:
    student, folder = parent
    child = ClipStudent(clip_settings(embed_dim=20, text={"init_from": folder}))
    report = child.text_report
    assert report is not None
    names = {f"text.{name}" for name in student.model.text.state_dict()}
    assert {*report.loaded, "text.text_projection"} == names
    assert (report.new, report.ignored, report.resized) == (["text.text_projection"], ["text.text_projection"], [])
    assert child.model.text.text_projection.shape == (8, 20)
    for name, value in child.model.text.state_dict().items():
        assert name == "text_projection" or torch.equal(value, student.model.text.state_dict()[name]), name
    assert ClipStudent(clip_settings()).text_report is None


@pytest.mark.parametrize("options", [{"lock_text": True}, {"projection": "reused"}])
def test_a_reused_projection_gives_the_same_text_features(parent: tuple[ClipStudent, str], options: dict[str, object]) -> None:
    student, folder = parent
    text = {"init_from": folder} | {name: value for name, value in options.items() if name == "projection"}
    settings = clip_settings("vitamin_of_tests", text=text, lock_text="lock_text" in options)
    child = ClipStudent(settings)
    assert child.text_report is not None
    assert child.text_report.new == []
    _, texts = pairs(0)
    torch.testing.assert_close(child.encode_text(texts), student.encode_text(texts), atol=1e-6, rtol=0)


def test_fewer_positions_are_the_first_ones(parent: tuple[ClipStudent, str]) -> None:
    """Captions that fit keep their features: attention looks back only."""
    student, folder = parent
    child = ClipStudent(clip_settings(lock_text=True, text={"init_from": folder, "context_length": 5}))
    report = child.text_report
    assert report is not None
    assert report.resized == ["text.positional_embedding"]
    assert report.reasons["text.positional_embedding"] == "9 positions -> 5: the first ones"
    _, texts = pairs(0, 3, 5)
    longer = torch.cat([texts, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(child.encode_text(texts), student.encode_text(longer), atol=1e-6, rtol=0)
    assert child.tokenizer()(["one two three four five six"]).shape == (1, 5)


def test_more_positions_lie_between_the_old_ones(parent: tuple[ClipStudent, str]) -> None:
    student, folder = parent
    child = ClipStudent(clip_settings(text={"init_from": folder, "context_length": 14}))
    assert child.text_report is not None
    assert child.text_report.reasons["text.positional_embedding"] == "9 positions -> 14: interpolated"
    old = student.model.text.positional_embedding.detach().numpy()
    centres = (np.arange(14) + 0.5) * 9 / 14 - 0.5
    wanted = np.stack([np.interp(centres, np.arange(9), column) for column in old.T], axis=1)
    np.testing.assert_allclose(child.model.text.positional_embedding.detach().numpy(), wanted, atol=1e-7)
    assert child.open_clip_config()["model_cfg"]["text_cfg"]["context_length"] == 14


def test_another_size_is_refused(parent: tuple[ClipStudent, str]) -> None:
    _, folder = parent
    for what, asked, has in (("width", 16, 8), ("layers", 3, 2), ("heads", 4, 2)):
        with pytest.raises(UserError, match=rf"student\.text\.{what}={asked}: the text tower of .*parent has {has}"):
            ClipStudent(clip_settings(text={"init_from": folder, what: asked}))
    ClipStudent(clip_settings(text={"init_from": folder, "width": 8, "layers": 2, "heads": 2}))
    file = Path(folder) / "open_clip_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"text.ln_final.weight": torch.ones(7)}, file)
    with pytest.raises(UserError, match=r"(?s)student\.text: .*parent: .*size mismatch for text\.ln_final\.weight"):
        ClipStudent(clip_settings(text={"init_from": folder}))


def test_what_open_clips_names_say_is_followed() -> None:
    """Configurations alone; nothing is built."""
    openai = text_source(TextSettings(init_from="ViT-B-32-quickgelu"))
    assert (openai.quick_gelu, openai.config["width"], openai.config["context_length"], openai.weights) == (True, 512, 77, {})
    assert not text_source(TextSettings(init_from="ViT-B-32-quickgelu", quick_gelu=False)).quick_gelu
    locked = text_source(TextSettings(init_from="ViTamin-S-LTT", context_length=32))
    assert (locked.quick_gelu, locked.config["width"], locked.config["context_length"]) == (False, 768, 32)
    foreign = {"ViT-B-16-SigLIP": "hf_tokenizer_name", "coca_ViT-B-32": "embed_cls", "roberta-ViT-B-32": "hf_model_name"}
    for name, part in foreign.items():
        with pytest.raises(UserError, match=rf"the text tower of {name} needs {part}="):
            text_source(TextSettings(init_from=name))
    with pytest.raises(UserError, match=r"student\.text\.init_from: ViT-Z is neither a folder nor an open_clip name"):
        text_source(TextSettings(init_from="ViT-Z"))
    with pytest.raises(ValueError, match=r"student\.text\.weights=openai needs the architecture's name"):
        TextSettings(weights="openai")


def test_the_approximated_gelu_reaches_the_text_tower() -> None:
    torch.manual_seed(0)
    exact = ClipStudent(clip_settings())
    torch.manual_seed(0)
    text = {"width": 8, "layers": 2, "heads": 2, "context_length": 9, "quick_gelu": True}
    quick = ClipStudent(clip_settings(text=text))
    x = torch.linspace(-3, 3, 13)
    block = quick.model.text.transformer.resblocks[0].mlp.gelu
    torch.testing.assert_close(block(x), x / (1 + torch.exp(-1.702 * x)))
    torch.testing.assert_close(exact.model.text.transformer.resblocks[0].mlp.gelu(x), torch.nn.functional.gelu(x))
    assert quick.open_clip_config()["model_cfg"]["quick_gelu"]
