"""`eva-mim features`: what timm and open_clip compute on the same folder, image by image."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image

from eva_mim.cli import main
from eva_mim.commands import features as commands_features
from eva_mim.evaluate.sheet import GAP, LINE, TILE
from eva_mim.students import ClassifierSettings, ClipSettings
from eva_mim.students.classifier import Classifier
from eva_mim.students.clip import ClipStudent
from eva_mim.weights.export import write_timm
from tests.conftest import make_folder, picture, png
from tests.students.tiny_towers import clip_folder
from tests.tiny import finish, python

NAMES = [f"{name}/{number:05d}.png" for name in "ab" for number in range(6)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), {"a": 6, "b": 6}, (50, 34))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as a stage exports it, with a crop."""
    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(1)
    settings = ClassifierSettings(name="vit_nano_patch4_32", patch_size=8)
    student = Classifier(settings, 2)
    write_timm(folder, student.trunk, settings, student.trunk.state_dict(), classes=("a", "b"), global_pool="avg", crop_pct=0.8)
    return folder


def views(folder: Path, images: Path) -> tuple[timm.models.VisionTransformer, torch.Tensor]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return model, torch.stack([view(Image.open(images / name)) for name in NAMES])


def test_summaries_are_timms(stage: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", str(stage), "--on", str(images), "--to", str(tmp_path / "v.npy"), "--batch", "5", "--patches"]) == 0
    assert f"{tmp_path / 'v.npy'}: 12 images x 96\n" in capsys.readouterr().out
    found, patches = np.load(tmp_path / "v.npy"), np.load(tmp_path / "v.patches.npy")
    assert (tmp_path / "v.keys.txt").read_text().splitlines() == NAMES
    model, pixels = views(stage, images)
    with torch.inference_mode():
        tokens = model.forward_features(pixels)
        expected = model.forward_head(tokens, pre_logits=True).numpy()
        cells = model.fc_norm(tokens[:, 1:]).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(patches, cells, atol=1e-5)
    assert main(["features", str(stage), "--on", str(images), "--to", str(tmp_path / "m.npy"), "--pool", "mean"]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "m.npy"), cells.mean(1), atol=1e-5)


@pytest.mark.slow
def test_two_processes_and_what_was_left(stage: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file; what a killed command left is for the same features alone."""
    line = ["features", str(stage), "--on", str(images), "--patches", "--to"]
    assert main([*line, str(tmp_path / "one.npy")]) == 0
    finish(python("eva_mim.cli", *line, tmp_path / "two.npy", processes=2))
    for name in ("npy", "patches.npy", "keys.txt"):
        assert (tmp_path / f"two.{name}").read_bytes() == (tmp_path / f"one.{name}").read_bytes()
    left = tmp_path / "three.npy.partial"
    left.mkdir()
    (left / "store.json").write_text('{"format": 2, "networks": {}, "inputs": {}, "splits": {}}')
    capsys.readouterr()
    assert main([*line, str(tmp_path / "three.npy")]) == 2
    assert f"{left} holds other features; remove it, or choose another folder" in capsys.readouterr().err
    shutil.rmtree(left)
    assert not list(tmp_path.glob("*.partial"))


def test_what_was_left_of_another_folder(
    stage: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files have the same names: features of the one are not taken for those of the other."""
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(images, tmp_path / "other")
    line = ["features", str(stage), "--to", str(tmp_path / "v.npy"), "--on"]
    with monkeypatch.context() as patched:
        patched.setattr(commands_features, "_write", stopped)
        assert main([*line, str(images)]) == 130
    assert main([*line, str(tmp_path / "other")]) == 2
    assert "v.npy.partial holds other features" in capsys.readouterr().err
    assert main([*line, str(images)]) == 0


def test_grey_images_have_the_view_of_the_network(stage: Path, images: Path, tmp_path: Path) -> None:
    """Its crop too: the one channel is shown to it three times."""
    line = ["features", str(stage), "--on", str(images), "data.channels=1", "--to", str(tmp_path / "v.npy")]
    assert main(line) == 0
    model = timm.create_model(f"local-dir:{stage}", pretrained=True).eval()
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = torch.stack([view(Image.open(images / name).convert("L").convert("RGB")) for name in NAMES])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def test_parquet_has_the_same(stage: Path, images: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    line = ["features", str(stage), "--on", str(images), "data.val_share=0.5", "--patches", "--batch", "5"]
    for name in ("v.npy", "v.parquet"):
        assert main([*line, "--to", str(tmp_path / name)]) == 0
    table = parquet.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["key", "split", "summary", "patches"]
    assert table["key"].to_pylist() == NAMES
    assert set(table["split"].to_pylist()) == {"train"}
    np.testing.assert_array_equal(np.array(table["summary"].to_pylist(), np.float32), np.load(tmp_path / "v.npy"))
    np.testing.assert_array_equal(np.array(table["patches"].to_pylist(), np.float32), np.load(tmp_path / "v.patches.npy"))


def test_a_clip_models_are_open_clips(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = ClipSettings(name="vit_nano_patch4_32", embed_dim=16, pool="avg",
                            text={"width": 16, "layers": 2, "heads": 2, "context_length": 12})  # fmt: skip
    folder = clip_folder(tmp_path / "clip", ClipStudent(settings).eval())
    assert main(["features", str(folder), "--on", str(images), "--to", str(tmp_path / "v.npy")]) == 0
    model, _, view = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([view(Image.open(images / name).convert("RGB")) for name in NAMES]))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected.numpy(), atol=1e-5)


def test_features_that_tell_nothing_apart(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "same").mkdir()
    for number in range(5):
        (tmp_path / "same" / f"{number}.png").write_bytes(png(picture(0)))
    to = ["--to", str(tmp_path / "v.npy"), "--nearest", "4", "--workers", "0"]
    assert main(["features", str(stage), "--on", str(tmp_path / "same"), *to]) == 0
    captured = capsys.readouterr()
    assert "10 pairs are alike" in captured.out
    assert "more pairs than images: these features hardly tell the images apart" in captured.err


def test_neighbours_and_pairs_that_are_alike(
    stage: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of an image is its nearest one; a broken file is left out of all."""
    root = tmp_path / "images"
    shutil.copytree(images, root)
    (root / "b" / "copy.png").write_bytes((root / "a" / "00003.png").read_bytes())
    (root / "b" / "broken.png").write_bytes(b"?")
    to = tmp_path / "v.npy"
    assert main(["features", str(stage), "--on", str(root), "--to", str(to), "--nearest", "3", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert f"{to}: 13 images x 96, 1 left out\n" in said
    assert "  a/00003.png  b/copy.png\n" in said
    keys, rows = (tmp_path / "v.keys.txt").read_text().splitlines(), np.load(to)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit.T
    alike = [(keys[i], keys[j]) for i in range(13) for j in range(i + 1, 13) if cosines[i, j] > 0.98]
    assert ("a/00003.png", "b/copy.png") in alike
    assert f"{len(alike)} pairs are alike" in said
    sheet = Image.open(tmp_path / "v.nearest.png")
    assert sheet.size == (4 * (TILE + GAP) + GAP, 8 * (TILE + LINE + GAP) + GAP)
    first = sheet.crop((GAP, GAP, GAP + TILE, GAP + TILE)).resize((8, 8))
    expected = Image.new("RGB", (TILE, TILE), "white")
    tile = picture(0, (50, 34)).resize((TILE, round(TILE * 34 / 50)))
    expected.paste(tile, (0, (TILE - tile.height) // 2))
    assert np.abs(np.asarray(first, float) - np.asarray(expected.resize((8, 8)), float)).mean() < 8


@pytest.mark.parametrize(("words", "said"), [
    (["MODEL", "--to", "v.csv"], "must end in .parquet or .npy"),
    (["MODEL", "--to", "none/v.npy"], "is not a folder"),
    (["IMAGES", "--to", "v.npy"], "neither the folder of a finished stage (config.json) nor a network as KIND:NAME"),
    (["nothing", "--to", "v.npy"], "nothing: neither the folder of a finished stage"),
    (["timm:no_such_net", "--to", "v.npy"], "timm has no 'no_such_net'"),
    (["MODEL", "--to", "v.npy", "--nearest", "12"], "at most 11 fit on a sheet"),
    (["MODEL", "--to", "v.npy", "data.channels=5"], "channels"),
])
def test_mistakes(
    stage: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [{"MODEL": str(stage), "IMAGES": str(images)}.get(word, word) for word in words]
    assert main(["features", *named, "--on", str(images)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(stage: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the file nor what would stand beside it."""
    line = ["features", str(stage), "--on", str(images), "--nearest", "1", "--to"]
    for name, made in [("a.npy", "a.npy"), ("b.npy", "b.keys.txt"), ("c.parquet", "c.nearest.png")]:
        (tmp_path / made).write_text("mine")
        assert main([*line, str(tmp_path / name)]) == 2
        assert f"{tmp_path / made} exists; add --overwrite" in capsys.readouterr().err
        assert (tmp_path / made).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3
    assert main([*line, str(tmp_path / "b.npy"), "--overwrite"]) == 0
    assert (tmp_path / "b.keys.txt").read_text().splitlines() == NAMES


def test_one_image_has_no_neighbours(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.png").write_bytes(png(picture(1)))
    assert main(["features", str(stage), "--on", str(tmp_path), "--to", str(tmp_path / "v.npy"), "--nearest", "2"]) == 0
    assert "1 images x 96" in capsys.readouterr().out
