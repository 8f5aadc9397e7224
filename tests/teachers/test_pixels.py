"""Pixels as targets, against a loop over patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eva_mim.core.contracts import Teacher
from eva_mim.core.errors import UserError
from eva_mim.teachers import TeacherSettings, build_teacher

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's: MAE normalises with them."""


def build(**settings: Any) -> Teacher:
    return build_teacher(TeacherSettings(**{"kind": "pixels", "name": "patch4", "image_size": 12, **settings}))


@pytest.mark.parametrize("final_norm", [True, False])
def test_targets_are_normalised_patches(final_norm: bool) -> None:
    """Row by row, pixel by pixel, colour by colour, in double precision; one patch is flat, where the variance is 0."""
    teacher = build(final_norm=final_norm)
    images = torch.randint(0, 256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[1, :, 4:8, 8:12] = torch.tensor([30, 60, 90], dtype=torch.uint8).reshape(3, 1, 1)
    found = teacher(images)
    assert (found.grid, teacher.grid, teacher.width) == ((3, 3), (3, 3), 48)
    for number, image in enumerate(images.double().numpy()):
        for row in range(3):
            for column in range(3):
                numbers = [
                    (image[c, 4 * row + y, 4 * column + x] / 255 - MEAN[c]) / STD[c]
                    for y in range(4) for x in range(4) for c in range(3)
                ]
                expected = np.array(numbers)
                if final_norm:
                    mean = sum(numbers) / 48
                    variance = sum((value - mean) ** 2 for value in numbers) / 47
                    expected = (expected - mean) / (variance + 1e-6) ** 0.5
                assert np.abs(found.spatial[number, 3 * row + column].numpy() - expected).max() < 2e-5
    assert torch.allclose(found.summary, found.spatial.mean(1))


def test_its_fingerprint_is_what_it_does() -> None:
    teacher = build()
    assert teacher.to("cpu").fingerprint() == build().fingerprint()
    others = [build(name="patch2"), build(image_size=16), build(final_norm=False)]
    assert len({teacher.fingerprint(), *(other.fingerprint() for other in others)}) == 4
    assert teacher.facts() == {
        "network": "pixels", "parameters": 0, "image_size": 12, "grid": [3, 3], "width": 48, "mean": list(MEAN),
        "std": list(STD), "layer": None, "blocks": None, "final_norm": True, "project": False,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "16"}, r"teacher\.name: '16' does not say the patch side in pixels; write one such as patch16"),
        ({"name": "patch0"}, r"teacher\.name: 'patch0'"),
        ({"image_size": None}, r"teacher\.image_size: must be given"),
        ({"image_size": 14}, r"teacher\.image_size: 14 px are no whole number of patches of 4 px"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(**settings)
