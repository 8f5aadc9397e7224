"""Mosaics: several images as one input of a teacher, against canvases put together by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from eva_mim.cli import main
from eva_mim.teachers import TeacherSettings, build_teacher
from tests.tiny import MIM, losses, records, run, write_recipe

SAM: dict[str, Any] = {"kind": "timm", "name": "samvit_base_patch16", "image_size": 128}


@pytest.fixture(scope="module", autouse=True)
def small() -> Any:
    """SAM's architecture in a size for tests."""
    from timm.models import register_model
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    def samvit_nano(pretrained: bool = False, **options: Any) -> Any:
        options = {name: value for name, value in options.items() if name in ("img_size", "num_classes", "in_chans")}
        model = VisionTransformerSAM(patch_size=16, embed_dim=48, depth=2, num_heads=2, window_size=4,
                                     global_attn_indexes=(1,), use_rel_pos=True, neck_chans=24, **options)
        model.pretrained_cfg = {"input_size": (3, 128, 128), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
        return model

    samvit_nano.__module__ = __name__
    register_model(samvit_nano)
    return samvit_nano


def teacher(**mosaic: Any) -> Any:
    torch.manual_seed(0)
    settings = TeacherSettings.model_validate({"kind": "timm", "name": "samvit_nano", "image_size": 128, **mosaic})
    made = build_teacher(settings)
    return made


@torch.no_grad()
def test_a_canvas_by_hand() -> None:
    """Four images of 48 px in the middle of their quarters, as far as whole patches allow, and a fifth alone."""
    whole, mosaic = teacher(), teacher(mosaic=True)
    assert mosaic.seen((3, 3)) == (48, (3, 3))
    assert mosaic.seen((9, 9)) == (128, (8, 8))  # larger than the canvas: its own grid
    images = torch.randint(256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    canvas = torch.tensor([128, 102, 76], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 128, 128).clone()
    for number, image in enumerate(images):
        top, left = number % 4 // 2 * 64, number % 2 * 64
        canvas[number // 4, :, top : top + 48, left : left + 48] = image
    expected = whole(canvas).spatial.unflatten(1, (8, 8))
    found = mosaic(images)
    assert (found.grid, mosaic.summary_width, mosaic.images_on(48)) == ((3, 3), 0, 4)
    assert found.spatial.shape == (5, 9, 48)
    for number in range(5):
        top, left = number % 4 // 2 * 4, number % 2 * 4
        wanted = expected[number // 4, top : top + 3, left : left + 3].flatten(0, 1)
        assert (found.spatial[number] - wanted).abs().max() < 1e-5
    full = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    assert torch.equal(mosaic(full).spatial, whole(full).spatial)


@torch.no_grad()
def test_sixteen_places_of_which_nine_are_filled() -> None:
    """Four across of 32 px; the rest of the canvas has the mean colour."""
    whole, mosaic = teacher(), teacher(mosaic=True)
    images = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert mosaic.images_on(32) == 16
    canvas = torch.tensor([128, 102, 76], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 128, 128).clone()
    for number, image in enumerate(images):
        canvas[0, :, number // 4 * 32 : number // 4 * 32 + 32, number % 4 * 32 : number % 4 * 32 + 32] = image
    expected = whole(canvas).spatial.unflatten(1, (8, 8))
    assert (mosaic(images).spatial[5] - expected[0, 2:4, 2:4].flatten(0, 1)).abs().max() < 1e-5


@torch.no_grad()
def test_sam_is_read_before_its_neck_and_has_no_summary(small: Any) -> None:
    torch.manual_seed(0)
    made, images = teacher(), torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8)
    torch.manual_seed(0)
    model = timm.create_model("samvit_nano", img_size=128, num_classes=0).eval()
    x: Tensor = (images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)) / 0.2
    x = model.patch_embed(x) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    features = made(images)
    assert (features.spatial - x.flatten(1, 2)).abs().max() < 1e-4
    assert (features.summary.shape, made.facts()["summary"]) == ((2, 0), None)


@pytest.mark.slow
def test_a_mosaic_run_is_the_same_on_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teacher": SAM | {"mosaic": True}, "objective": {"kind": "mse"}, "normaliser": {"kind": "channel"},
        "mask": {"ratio": 0.0}, "run": MIM["run"] | {"epochs": 1},
    }
    recipe = write_recipe(tmp_path, tree)
    run("mim", recipe, tmp_path / "one")
    run("mim", recipe, tmp_path / "two", "run.engine=deepspeed", "run.micro_batch=4", processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=5e-5)
    assert records(tmp_path / "one")[-1]["loss"] < records(tmp_path / "one")[0]["loss"]
    done = run("mim", recipe, tmp_path / "odd", "run.micro_batch=6", code=2)
    assert "teacher.mosaic: 4 images of 64 px share an input, and a micro-batch has 6" in done.stderr
    assert main(["cache", str(recipe), "--program", "mim", "--views", "1", "--out", str(tmp_path / "cache")]) == 2
    assert "teacher.mosaic: features would depend on the other images" in capsys.readouterr().err
