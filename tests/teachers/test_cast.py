"""A teacher's weights are cast once under autocast, to the bits that autocast gives; the exact ones come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import eva_mim.trunks.small  # noqa: F401  registers the architectures
from eva_mim.core.errors import UserError
from eva_mim.teachers import TeacherSettings, build_teacher
from eva_mim.teachers.frozen import FrozenTeacher
from eva_mim.teachers.open_clip import read_tower
from eva_mim.trunks.pixels import normalise

NETWORKS = ["vit_nano_patch4_32", "convnet_nano_32", "eva02_tiny_patch14_224", "convnext_atto", "tf_efficientnet_lite0",
            "open_clip"]  # fmt: skip


class Casts(TorchDispatchMode):
    """Counts the matrices that are brought to another type."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(arguments[0].shape))
        return function(*arguments, **(keywords or {}))


def made(name: str) -> tuple[FrozenTeacher, torch.Tensor]:
    torch.manual_seed(0)
    if name == "open_clip":  # a tower with torch's own attention
        tower, settings = VisionTransformer(32, 8, 32, 3, 2, 2.0, output_dim=16), TeacherSettings(name="tower")
        for value in tower.parameters():
            value.data.add_(0.05 * torch.randn(value.shape))
        pixels = {"image_size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
        return FrozenTeacher(tower, read_tower(tower, settings), settings, **pixels), torch.randint(
            0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    size = {"eva02_tiny_patch14_224": 56}.get(name, 32)
    teacher: Any = build_teacher(TeacherSettings(kind="timm", name=name, image_size=size))
    return teacher, torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_autocast_alone(name: str, dtype: torch.dtype) -> None:
    teacher, images = made(name)
    before, exact = teacher.fingerprint(), teacher(images)
    pixels = normalise(images, teacher.mean, teacher.std)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        alone = teacher.reading.features(pixels)
        first, again = teacher(images), teacher(images)
    for found in (first, again):
        assert torch.equal(found.spatial, alone.spatial)
        assert found.spatial.dtype == alone.spatial.dtype
        assert torch.equal(found.summary, alone.summary)  # type: ignore[arg-type]
    assert not torch.equal(alone.spatial.float(), exact.spatial)
    assert torch.equal(teacher(images).spatial, exact.spatial)
    assert teacher.fingerprint() == before


@pytest.mark.parametrize("name", ["vit_nano_patch4_32", "open_clip"])
def test_a_second_pass_casts_no_matrix(name: str) -> None:
    teacher, images = made(name)
    products = (value for key, value in teacher.network.named_parameters() if "embedding" not in key and key != "proj")
    matrices = {tuple(p.shape) for p in products if p.ndim > 1 and p.shape[0] > 1}
    with torch.autocast("cpu", torch.bfloat16):
        with Casts() as first:
            teacher(images)
        with Casts() as second:
            teacher(images)
    assert matrices <= {*first.shapes}
    assert not matrices & {*second.shapes}


def test_a_weight_that_changes_while_it_is_cast_is_noticed() -> None:
    teacher, images = made("vit_nano_patch4_32")
    with torch.autocast("cpu", torch.bfloat16):
        teacher(images)
    next(p for p in teacher.network.parameters() if p.dtype == torch.bfloat16).data.add_(1)
    with pytest.raises(UserError, match="has changed during the run"):
        teacher.fingerprint()
