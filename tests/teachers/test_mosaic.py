"""SAM as a teacher: mosaics, several images as one input, against canvases put together by hand; and its own neck and decoder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from eva_mim.cli import main
from eva_mim.teachers import TeacherSettings, build_teacher
from tests.conftest import REPOSITORY
from tests.tiny import MIM, losses, records, run, write_recipe

SAM: dict[str, Any] = {"kind": "timm", "name": "samvit_base_patch16", "image_size": 128}


@pytest.fixture(scope="module", autouse=True)
def small() -> Any:
    """SAM's architecture in a size for tests."""
    from timm.models import register_model
    from timm.models.vision_transformer_sam import _create_vision_transformer

    def samvit_nano(pretrained: bool = False, **options: Any) -> Any:
        sizes = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "window_size": 4, "global_attn_indexes": (1,)}
        more = {"use_rel_pos": True, "neck_chans": 24}
        model = _create_vision_transformer("samvit_base_patch16", pretrained=pretrained, **sizes, **more, **options)
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


SMALL = {"prompt_encoder_config": {"hidden_size": 24, "image_size": 128, "patch_size": 16, "mask_input_channels": 4},
         "mask_decoder_config": {"hidden_size": 24, "mlp_dim": 48, "num_attention_heads": 2, "num_hidden_layers": 1,
                                 "iou_head_hidden_dim": 16}}  # fmt: skip


def sam_of_transformers(width: int) -> Any:
    """A small SAM with random weights, also in its positions and norms."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128, "patch_size": 16,
              "window_size": 4, "global_attn_indexes": [1], "output_channels": 24, "num_pos_feats": 12, "mlp_dim": 4 * width}
    torch.manual_seed(3)
    sam = transformers.SamModel(transformers.SamConfig(vision_config=vision, **SMALL)).eval()
    with torch.no_grad():
        for value in sam.parameters():
            value.add_(0.1 * torch.randn(value.shape))
    return sam


def masks_with_sam() -> Any:
    spec = importlib.util.spec_from_file_location("masks_with_sam", REPOSITORY / "docs" / "examples" / "masks_with_sam.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_what_a_student_learns_of_sam_goes_through_its_neck_and_decoder(small: Any, tmp_path: Path) -> None:
    """The teacher's features, through transformers' neck and mask decoder, are those of SAM's own encoder."""
    sam = sam_of_transformers(48)
    weights = {}
    names = {"layers.": "blocks.", "layer_norm": "norm", "mlp.lin": "mlp.fc", "projection": "proj", "neck.conv1": "neck.0",
             "neck.norm1": "neck.1", "neck.conv2": "neck.2", "neck.norm2": "neck.3"}  # fmt: skip
    for name, value in sam.vision_encoder.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        weights[name] = value.clone()
    save_file(weights, tmp_path / "sam.safetensors")
    made = teacher(weights=str(tmp_path / "sam.safetensors"))
    images = torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    pixels = (images / 255 - torch.tensor(made.mean).view(-1, 1, 1)) / torch.tensor(made.std).view(-1, 1, 1)
    wanted = sam.get_image_embeddings(pixels)
    found = masks_with_sam().image_embeddings(sam, made(images).spatial)
    assert wanted.abs().max() > 1
    assert (found - wanted).abs().max() < 1e-4
    points = torch.tensor([[[[30.0, 50.0]]]] * 2)
    masks, theirs = (sam(input_points=points, **given).pred_masks
                     for given in ({"image_embeddings": found}, {"pixel_values": pixels}))
    assert theirs.std() > 1e-2
    assert (masks - theirs).abs().max() < 1e-5


@pytest.mark.long
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

    # masks from the student's features
    transformers = pytest.importorskip("transformers")
    sam_of_transformers(768).save_pretrained(tmp_path / "sam")
    made = transformers.SamImageProcessor(size={"longest_edge": 128}, pad_size={"height": 128, "width": 128})
    transformers.SamProcessor(made).save_pretrained(tmp_path / "sam")
    Image.effect_mandelbrot((150, 100), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "image.png")
    masks_with_sam().main(tmp_path / "one", tmp_path / "sam", tmp_path / "image.png", 40, 50, tmp_path / "mask.png", "teacher")
    mask = Image.open(tmp_path / "mask.png")
    assert (mask.size, set(mask.getdata()) <= {0, 255}) == ((150, 100), True)
