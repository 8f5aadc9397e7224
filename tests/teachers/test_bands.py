"""Teachers of images with other channels than theirs, against the teacher on a picture that is put together by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from eva_mim.core.contracts import Teacher
from eva_mim.core.errors import UserError
from eva_mim.teachers import TeacherSettings, build_teacher
from eva_mim.trunks import TrunkSettings
from eva_mim.weights.export import write_timm


def build(channels: int, **settings: Any) -> Teacher:
    torch.manual_seed(0)
    return build_teacher(TeacherSettings(**{"kind": "timm", "name": "vit_nano_patch4_32"} | settings), channels)


def bands(channels: int) -> Tensor:
    return torch.randint(0, 256, (2, channels, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("real", [False, True])
def test_it_sees_the_bands_that_are_named(real: bool) -> None:
    images = bands(13).float() + 0.25 if real else bands(13)
    teacher, plain = build(13, bands=(3, 2, 1)), build(3)
    by_hand = torch.cat([images[:, 3:4], images[:, 2:3], images[:, 1:2]], 1)
    for found, wanted in zip(teacher(images)[:2], plain(by_hand)[:2], strict=True):
        assert torch.equal(found, wanted)
        assert not torch.equal(found, plain(images[:, 1:4])[0 if found.ndim == 2 else 1])  # the order counts
    assert (teacher.grid, teacher.width, teacher.fingerprint()) == (plain.grid, plain.width, plain.fingerprint())
    assert teacher.to("cpu").facts() == plain.facts() | {"bands": [3, 2, 1]}


def test_it_sees_a_grey_image_three_times_and_rgb_as_it_is() -> None:
    images = bands(1)
    assert torch.equal(build(1)(images).spatial, build(3)(images.expand(-1, 3, -1, -1)).spatial)
    assert "bands" not in build(3).facts()


def test_a_stage_of_the_same_channels_sees_them_all(tmp_path: Path) -> None:
    torch.manual_seed(3)
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.2, 0.3, 0.3, 0.4)
    settings = TrunkSettings(name="vit_nano_patch4_32", mean=mean, std=std)
    trunk = timm.create_model(settings.name, num_classes=0, in_chans=5).eval()
    write_timm(tmp_path, trunk, settings, trunk.state_dict(), global_pool="token")
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["first_conv"] is None
    images = bands(5)
    pixels = torch.stack([(images[:, c].float() / 255 - mean[c]) / std[c] for c in range(5)], 1)
    found = build(5, name=f"local-dir:{tmp_path}", weights="pretrained")(images)
    with torch.no_grad():
        assert torch.allclose(found.spatial, trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :], atol=1e-5)


def test_pixels_of_five_bands_are_their_own_target() -> None:
    """Against a loop, without the norm of each patch."""
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.3, 0.4, 0.5, 0.6)
    settings = {"kind": "pixels", "name": "patch16", "image_size": 32, "final_norm": False}
    teacher, images = build(5, **settings, mean=mean, std=std), bands(5)
    assert teacher.width == 16 * 16 * 5
    found = teacher(images).spatial
    for patch, (top, left) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        numbers = [
            (int(images[1, c, top + y, left + x]) / 255 - mean[c]) / std[c]
            for y in range(16) for x in range(16) for c in range(5)
        ]
        assert torch.allclose(found[1, patch], torch.tensor(numbers), atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "settings", "said"),
    [
        (5, {}, r"teacher\.bands: the images have 5 channels and vit_nano_patch4_32 sees 3; name those, counted from 0$"),
        (2, {}, r"teacher\.bands: the images have 2 channels"),
        (5, {"bands": [0, 1]}, r"teacher\.bands=\[0, 1\]: .* sees 3 channels, and those of the images are 0 to 4"),
        (5, {"bands": [0, 1, 5]}, r"teacher\.bands=\[0, 1, 5\]: .* are 0 to 4"),
        (5, {"kind": "pixels", "name": "patch4", "image_size": 32}, r"or give teacher\.mean and teacher\.std for all"),
    ],
)  # fmt: skip
def test_bands_that_are_not_there(channels: int, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(channels, **settings)
