"""`eva-mim teacher check`: printed figures against loops over patches, closed forms, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eva_mim.cli import main
from eva_mim.commands.teacher import measure, pictures_of, teacher_settings
from eva_mim.core.contracts import Features, Teacher
from eva_mim.core.errors import UserError
from eva_mim.core.rng import seed_all
from eva_mim.data.views import EvalView
from eva_mim.tasks import TargetTeacherSettings
from eva_mim.teachers import TeacherSettings, build_teacher
from tests.conftest import make_folder, picture

NANO = "timm:vit_nano_patch4_32"
CPU = torch.device("cpu")
PLACES = torch.eye(3).repeat(2, 1)
"""[6, 3] one feature for each column of a 2 x 3 grid."""


def check(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[dict[str, str], str]:
    """The printed table and the error text of the command."""
    assert main(["teacher", "check", *argv]) == code
    said = capsys.readouterr()
    return {line[:16].strip(): line[16:].strip() for line in said.out.splitlines()}, said.err


def first_number(text: str) -> float:
    return float(text.split()[0])


class Fake:
    """A teacher of a 2 x 3 grid that says what a function makes of pixels."""

    image_size, grid, width = 6, (2, 3), 3
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, spatial: Callable[[Tensor], Tensor]):
        self._spatial = spatial

    def __call__(self, images: Tensor) -> Features:
        spatial = self._spatial(images.float())
        return Features(images.float().mean((2, 3)), spatial, self.grid)

    def to(self, device: Any) -> Fake:
        return self

    def fingerprint(self) -> str:
        return "0" * 64

    def facts(self) -> dict[str, Any]:
        return build_teacher(TeacherSettings(kind="pixels", name="patch3", image_size=6)).facts()


def patches(images: Tensor) -> Tensor:
    """[B, 6, 3] mean colours of 3 x 2 pixels."""
    return images.reshape(-1, 3, 2, 3, 3, 2).mean((3, 5)).flatten(2).transpose(1, 2)


# ---- figures


def test_the_printed_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Lengths, mean direction and mirror image of a small random ViT, patch by patch in double precision."""
    folder = make_folder(tmp_path / "pictures", {"": 5}, size=(40, 32))
    table, _ = check(capsys, NANO, "layer=1", "final_norm=false", "image_size=16", "--images", str(folder))
    seed_all(0)
    teacher = build_teacher(TeacherSettings(kind="timm", name="vit_nano_patch4_32", image_size=16, layer=1, final_norm=False))
    images = [EvalView([16])(picture(seed, (40, 32)), random.Random(0))[16] for seed in range(5)]
    vectors, mirrored = [], []
    for image in images:
        there = teacher(image[None]).spatial[0].double().numpy()
        back = teacher(image.flip(-1)[None]).spatial[0].double().numpy()
        for row in range(4):
            for column in range(4):
                one, other = there[4 * row + column], back[4 * row + 3 - column]
                vectors.append(one)
                mirrored.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    lengths = [float(np.linalg.norm(vector)) for vector in vectors]
    shown = [float(word) for word in table["patch norm"].split()[1::2]]
    assert shown == pytest.approx([np.mean(lengths), np.std(lengths), min(lengths), max(lengths)], abs=2e-4)
    assert np.std(lengths) > 0.01
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    direction = np.mean(unit, axis=0) / np.linalg.norm(np.mean(unit, axis=0))
    assert first_number(table["cosine of mean"]) == pytest.approx(np.mean([vector @ direction for vector in unit]), abs=1e-4)
    places = [np.mean([unit[16 * number + place] for number in range(5)], axis=0) for place in range(16)]
    assert first_number(table["cosine of place"]) == pytest.approx(np.mean([np.linalg.norm(p) for p in places]), abs=1e-4)
    assert first_number(table["mirrored"]) == pytest.approx(np.mean(mirrored), abs=1e-4)
    assert np.mean(mirrored) < 0.99
    assert table["fingerprint"] == teacher.fingerprint()[:12]
    assert table["pictures"] == f"5 of the 5 in {folder}"
    assert first_number(table["time"]) > 0


def test_figures_in_closed_form() -> None:
    """Flat pictures: crops do not matter, so both crops of one agree and those of two have their colours' cosine."""
    colours = [(200, 0, 0), (0, 100, 0), (90, 90, 0), (10, 20, 30)]
    flat = [Image.new("RGB", (9, 9), colour) for colour in colours]
    figures = measure(Fake(patches), flat, CPU)
    unit = [np.array(colour) / np.linalg.norm(colour) for colour in colours]
    other = np.mean([unit[i] @ unit[j] for i in range(4) for j in range(4) if i != j])
    assert figures["same"] == pytest.approx(1.0, abs=1e-6)
    assert figures["other"] == pytest.approx(other, abs=1e-6)
    assert figures["mirrored"] == pytest.approx(1.0, abs=1e-6)
    assert figures["cosine_of_mean"] == pytest.approx(np.linalg.norm(np.mean(unit, axis=0)), abs=1e-6)
    assert figures["cosine_of_place"] == pytest.approx(figures["cosine_of_mean"], abs=1e-6)
    assert figures["norm_max"] == pytest.approx(200.0)
    assert figures["norm_min"] == pytest.approx((10**2 + 20**2 + 30**2) ** 0.5)


def test_a_mirror_image_is_mirrored_along_its_rows() -> None:
    """Colours of patches move with the mirror: the cosine is 1 for them, and not for a teacher that numbers its places."""
    pictures = [picture(seed, (6, 6)) for seed in range(3)]
    assert measure(Fake(patches), pictures, CPU)["mirrored"] == pytest.approx(1.0, abs=1e-6)

    def numbered(images: Tensor) -> Tensor:
        return PLACES.expand(len(images), 6, 3)

    figures = measure(Fake(numbered), pictures, CPU)
    assert figures["mirrored"] == pytest.approx(1 / 3)  # the middle column alone stays where it is
    assert figures["cosine_of_place"] == pytest.approx(1.0)
    assert figures["cosine_of_mean"] == pytest.approx(3**-0.5)


def test_many_pictures_are_seen_in_parts() -> None:
    """More pictures than one pass takes, one of them left over; each counts once."""
    flat = [Image.new("RGB", (6, 6), (0, 10 * number, 255 - 10 * number)) for number in range(17)]
    lengths = [np.hypot(10 * number, 255 - 10 * number) for number in range(17)]
    figures = measure(Fake(patches), flat, CPU)
    assert figures["norm_mean"] == pytest.approx(np.mean(lengths), rel=1e-6)
    assert figures["norm_sd"] == pytest.approx(np.std(lengths), rel=1e-4)


# ---- what is shown


def test_the_facts_of_a_recipes_teacher(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: {kind: timm, name: vit_nano_patch4_32, image_size: 16}\nstudent: {name: vit_nano_patch4_32}\n")
    table, error = check(capsys, str(recipe), "layer=-3", "--student", "vit_nano_patch4_32", "--student-image-size", "16")
    assert {name: table[name] for name in ("kind", "name", "weights", "image size", "grid", "width")} == {
        "kind": "timm", "name": "vit_nano_patch4_32", "weights": "none, random", "image size": "16 px",
        "grid": "4x4 patches of 4 px", "width": "96",
    }
    assert table["layer"] == "1 of 0 to 3"
    assert (table["final norm"], table["projection"]) == ("yes", "no")
    assert table["mean"].split() == ["0.4815", "0.4578", "0.4082"]
    # 16 patches and a class token with positions, a 4 px stem, 4 blocks of 12 D^2 + 13 D, a norm
    parameters = 96 + 17 * 96 + 49 * 96 + 4 * (12 * 96 * 96 + 13 * 96) + 2 * 96
    assert table["network"] == f"VisionTransformer, {parameters / 1e6:.2f} M parameters"
    assert table["pictures"] == "32 built-in drawings"
    assert table["student"] == "vit_nano_patch4_32 at 16 px fits: 4x4 patches"
    assert error == ""


def test_the_same_random_teacher_every_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(make_folder(tmp_path, {"": 3}))
    first, _ = check(capsys, NANO, "--images", folder)
    torch.manual_seed(5)
    second, _ = check(capsys, NANO, "--images", folder)
    assert first | {"time": ""} == second | {"time": ""}


@pytest.mark.parametrize(
    ("text", "kind", "name", "weights"),
    [
        ("open_clip:ViT-B-16:openai", "open_clip", "ViT-B-16", "openai"),
        ("open_clip:ViT-B-16:/a:b/c.pt", "open_clip", "ViT-B-16", "/a:b/c.pt"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "timm", "vit_small_patch14_dinov2.lvd142m", None),
        ("stage:runs/a:b/clip", "stage", "runs/a:b/clip", None),
        ("pixels:patch16", "pixels", "patch16", None),
    ],
)
def test_a_teacher_in_one_word(text: str, kind: str, name: str, weights: str | None) -> None:
    settings = teacher_settings(text, ["image_size=336", "final_norm=false"])
    assert settings == TargetTeacherSettings(kind=kind, name=name, weights=weights, image_size=336, final_norm=False)


def test_pictures_are_spread_over_the_folder(tmp_path: Path) -> None:
    """The first, the last and every second between them."""
    make_folder(tmp_path, {"a": 40, "b": 23}, size=(8, 8))
    shown, pictures = pictures_of(tmp_path)
    assert shown == f"32 of the 63 in {tmp_path}"
    assert [image.tobytes() for image in pictures] == [picture(seed, (8, 8)).tobytes() for seed in range(0, 63, 2)]


# ---- refusals


def test_a_student_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    _, error = check(capsys, NANO, "image_size=16", "--student", "vit_nano_patch4_32", code=2)
    assert "student grid 8x8 (32 px) does not match teacher grid 4x4 (16 px); set student.image_size=16" in error
    _, error = check(capsys, NANO, "--student", "convnet_nano_32", code=2)
    assert "convnet_nano_32 is not a plain ViT" in error
    with pytest.raises(SystemExit) as left:
        main(["teacher", "check", NANO, "--student-image-size", "16"])
    assert left.value.code == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["timm:vit_nanno"], "vit_nanno"),
        (["tim:vit_nano_patch4_32"], "did you mean timm?"),
        (["configs/mim/scene.yaml"], "did you mean configs/mim/scenes.yaml?"),
        (["configs/clip/scenes_vit.yaml"], "no teacher section"),
        ([NANO, "layer=4"], "teacher.layer: 4 does not exist; vit_nano_patch4_32 has 4 blocks"),
        ([NANO, "image_sise=4"], "image_sise: no such setting; did you mean image_size?"),
        (["open_clip:ViT-Z"], "'ViT-Z' is not among open_clip's"),
        (["stage:/nonexistent"], "/nonexistent has no open_clip_config.json"),
        (["pixels:patch4"], "teacher.image_size: must be given"),
        ([NANO, "--images", "/nonexistent"], "--images: /nonexistent is not a folder"),
    ],
)
def test_mistakes_end_with_code_2_and_a_reason(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    _, error = check(capsys, *argv, code=2)
    assert error.startswith("error: ")
    assert said in error


def test_pictures_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_folder(tmp_path, {"": 1})
    _, error = check(capsys, NANO, "--images", str(tmp_path), code=2)
    assert "has one picture; at least two are needed" in error
    (tmp_path / "broken.png").write_bytes(b"no picture")
    _, error = check(capsys, NANO, "--images", str(tmp_path), code=2)
    assert "--images: broken.png: UnidentifiedImageError" in error


@pytest.mark.parametrize(
    ("spatial", "said"),
    [
        (lambda images: torch.ones(len(images), 6, 3), "the features are the same for every image"),
        (lambda images: PLACES + 1e-5 * patches(images), "the features are the same for every image"),
        (lambda images: torch.zeros(len(images), 6, 3), "the features are the same for every image"),
        (lambda images: patches(images).where(PLACES == 0, torch.nan), "48 of 144 features are not finite"),
    ],
)
def test_features_without_use_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spatial: Callable[[Tensor], Tensor], said: str
) -> None:
    def build(settings: TeacherSettings) -> Teacher:
        return Fake(spatial)

    monkeypatch.setattr("eva_mim.commands.teacher.build_teacher", build)
    _, error = check(capsys, "pixels:patch3", "image_size=6", code=2)
    assert said in error
    monkeypatch.setattr("eva_mim.commands.teacher.build_teacher", lambda settings: Fake(patches))
    table, _ = check(capsys, "pixels:patch3", "image_size=6")
    assert first_number(table["cosine of place"]) < 0.999


def test_help_lists_check(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["teacher", "--help"], ["teacher", "check", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 0
        assert "check: its facts" in capsys.readouterr().out


def test_an_override_needs_a_value() -> None:
    with pytest.raises(UserError, match="'layer' is not an override"):
        teacher_settings(NANO, ["layer"])
