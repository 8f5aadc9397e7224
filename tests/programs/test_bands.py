"""Satellite and medical images through the chain: the real programs on hand-made files, their results opened by timm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import eva_mim.trunks.small  # noqa: F401  (makes our small architectures known to timm)
from eva_mim.trunks import TrunkSettings
from eva_mim.weights.export import write_timm
from tests.tiny import MIM, RUN, VIT, run, write_recipe

pytestmark = pytest.mark.slow
Array = npt.NDArray[np.uint16]
CLASSES = ("columns", "rows")
LOW, HIGH = 300, 3000
BANDS = {"channels": 5, "window": [LOW, HIGH]}
FIVE = {"mean": [0.5, 0.5, 0.5, 0.5, 0.45], "std": [0.29, 0.29, 0.29, 0.29, 0.33]}
OPTIM = {"lr": 2e-3, "warmup_epochs": 1}


def stripes(label: int, seed: int) -> Array:
    """[32, 32, 5]: noise, and in the last band stripes along the rows or the columns."""
    rng = np.random.default_rng([label, seed])
    image = rng.integers(LOW, HIGH, (32, 32, 5))
    place = np.mgrid[:32, :32][label] + rng.integers(8)
    image[:, :, 4] = 600 + 1800 * (place // 4 % 2) + rng.integers(0, 200, (32, 32))
    return image.astype(np.uint16)


def write_bands(root: Path, bands: int) -> dict[str, Any]:
    """The first so many bands of all images: arrays to train with, TIFFs with a page a band held out. Data settings."""
    for split, count in (("train", 80), ("val", 40)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = stripes(1 - label, 1000 * (split == "val") + number)[:, :, :bands]
                if split == "train":
                    np.save(folder / f"{number}.npy", image)
                    continue
                first, *others = [Image.fromarray(np.ascontiguousarray(image[:, :, band])) for band in range(bands)]
                first.save(folder / f"{number}.tif", save_all=True, append_images=others)
    return {"root": str(root), "train": "train", "val": "val", "workers": 0}


def by_timm(folder: Path, root: Path, mean: list[float], std: list[float], channels: int) -> dict[str, float]:
    """What timm makes of a result on the held-out files, which numpy and Pillow read: as large as the student's images, so that
    nothing is resized."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.pretrained_cfg["input_size"] == (channels, 32, 32)
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == (mean, std)
    assert model.pretrained_cfg["first_conv"] is None
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((root / "val" / name).iterdir()):
            with Image.open(path) as file:
                pages = []
                for page in range(getattr(file, "n_frames", 1)):
                    file.seek(page)
                    pages.append(np.asarray(file))
            image = np.stack(pages).astype(np.float64)
            image = image / 255 if image.max() < 256 else ((image - LOW) / (HIGH - LOW)).clip(0, 1)
            images.append((image - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1)))
            labels.append(label)
    with torch.no_grad():
        logits = model(torch.tensor(np.stack(images), dtype=torch.float32))
    truth = torch.tensor(labels)
    return {"top1": 100 * float((logits.argmax(1) == truth).float().mean()), "loss": float(F.cross_entropy(logits, truth))}


def figures(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "lineage.json").read_text())["metrics"]
    return found


@pytest.mark.long
def test_what_only_one_band_tells_is_learned_and_not_without_it(tmp_path: Path) -> None:
    """timm's model of the result, on files that numpy reads, gives the very figures of the log."""
    tree = {"run": RUN | {"epochs": 6, "global_batch": 20, "evaluate_every": 6}, "optim": OPTIM}
    data = write_bands(tmp_path / "all", 5)
    student = {"name": "convnet_nano_32", "head_scale": 0.1, **FIVE}
    recipe = write_recipe(tmp_path, tree | {"data": data | BANDS, "student": student}, "all.yaml")
    run("classify", recipe, tmp_path / "out")
    assert figures(tmp_path / "out")["top1"] > 95
    found = by_timm(tmp_path / "out", tmp_path / "all", FIVE["mean"], FIVE["std"], 5)
    assert {name: figures(tmp_path / "out")[name] for name in found} == pytest.approx(found, abs=1e-4)
    data = write_bands(tmp_path / "three", 3)
    blind = {"name": student["name"], "head_scale": 0.1}
    recipe = write_recipe(tmp_path, tree | {"data": data | {"window": [LOW, HIGH]}, "student": blind})
    run("classify", recipe, tmp_path / "blind")
    assert figures(tmp_path / "blind")["top1"] < 70  # of 80 images; chance gives more than 70 once in 4,000


def test_five_bands_through_masked_training_classifier_and_probe(tmp_path: Path) -> None:
    """An RGB teacher sees three of the bands; the trunk starts from one of RGB."""
    torch.manual_seed(1)
    parent = timm.create_model("vit_nano_patch4_32", patch_size=8, num_classes=0)
    (tmp_path / "rgb").mkdir()
    write_timm(tmp_path / "rgb", parent, TrunkSettings(**VIT), parent.state_dict(), global_pool="token")
    data, student = write_bands(tmp_path / "data", 5) | BANDS, VIT | FIVE
    tree = MIM | {
        "data": data, "student": student, "teacher": MIM["teacher"] | {"bands": [4, 1, 0]}, "init_from": str(tmp_path / "rgb"),
        "run": RUN | {"epochs": 1, "global_batch": 20, "ema_decay": 0.9}, "optim": OPTIM | {"lr": 5e-4},
    }
    recipe = write_recipe(tmp_path, tree)
    run("mim", recipe, tmp_path / "mim")
    record = json.loads((tmp_path / "mim" / "lineage.json").read_text())
    assert record["teachers"]["teacher"]["bands"] == [4, 1, 0]
    assert record["seeded"]["resized"] == ["patch_embed.proj.weight"]
    for folder in (tmp_path / "mim", tmp_path / "mim" / "ema"):
        model, weights = timm.create_model(f"local-dir:{folder}", pretrained=True), load_file(folder / "model.safetensors")
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert weights["patch_embed.proj.weight"].shape == (96, 5, 8, 8)
    tuned = {"data": data, "student": student, "init_from": str(tmp_path / "mim"), "run": RUN | {"global_batch": 20},
             "optim": OPTIM}
    run("classify", write_recipe(tmp_path, tuned, "classify.yaml"), tmp_path / "classify")
    found = by_timm(tmp_path / "classify", tmp_path / "data", FIVE["mean"], FIVE["std"], 5)
    assert {name: figures(tmp_path / "classify")[name] for name in found} == pytest.approx(found, abs=1e-4)
    probe = write_recipe(tmp_path, tuned | {"probe": {"cached": True}}, "probe.yaml")
    run("probe", probe, tmp_path / "probe")
    found = by_timm(tmp_path / "probe", tmp_path / "data", FIVE["mean"], FIVE["std"], 5)
    assert {name: figures(tmp_path / "probe")[name] for name in found} == pytest.approx(found, abs=1e-4)
    # Other pixels are other features, whatever lies in the cache.
    run("probe", probe, tmp_path / "other", "data.window=[0, 9000]")
    assert figures(tmp_path / "other")["loss"] != pytest.approx(figures(tmp_path / "probe")["loss"], abs=1e-3)
    rgb = ["data.channels=3", "student.mean=null", "student.std=null"]
    done = run("classify", write_recipe(tmp_path, tuned, "rgb.yaml"), tmp_path / "rgb_child", *rgb, code=2)
    assert "the patch kernel is for images of 5 channels and cannot be made one for 3" in done.stderr


def test_grey_images_through_masked_training_and_classifier(tmp_path: Path) -> None:
    """8 bits, one channel; the teacher of RGB sees it three times."""
    for split, count in (("train", 24), ("val", 12)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                image = stripes(1 - label, 1000 * (split == "val") + number)[:, :, 4] // 16
                Image.fromarray(image.astype(np.uint8)).save(tmp_path / "data" / split / name / f"{number}.png")
    data = {"root": str(tmp_path / "data"), "train": "train", "val": "val", "workers": 0, "channels": 1}
    student = VIT | {"mean": [0.37], "std": [0.22]}
    run("mim", write_recipe(tmp_path, MIM | {"data": data, "student": student}), tmp_path / "mim")
    assert json.loads((tmp_path / "mim" / "lineage.json").read_text())["teachers"]["teacher"]["bands"] == [0, 0, 0]
    tuned = {"data": data, "student": student, "init_from": str(tmp_path / "mim"), "run": RUN, "optim": OPTIM,
             "view": {"erase": 0.25}, "mix": {"mixup": 0.2}}
    run("classify", write_recipe(tmp_path, tuned, "classify.yaml"), tmp_path / "classify")
    found = by_timm(tmp_path / "classify", tmp_path / "data", [0.37], [0.22], 1)
    assert {name: figures(tmp_path / "classify")[name] for name in found} == pytest.approx(found, abs=1e-4)
    if sys.platform == "linux":  # the run measures itself again, from its own settings
        from eva_mim.run.stage import evaluate_stage

        now, logged = evaluate_stage(tmp_path / "classify")
        assert now == pytest.approx(logged)
