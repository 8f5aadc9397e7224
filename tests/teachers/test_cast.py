"""A teacher's weights are cast once under autocast, to the bits that autocast gives; the exact ones come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eva_mim.trunks.small  # noqa: F401  registers the architectures
from eva_mim.core.errors import UserError
from eva_mim.teachers import TeacherSettings, build_teacher
from eva_mim.teachers.frozen import FrozenTeacher
from eva_mim.trunks.pixels import normalise

NETWORKS = ["vit_nano_patch4_32", "convnet_nano_32", "eva02_tiny_patch14_224", "convnext_atto", "tf_efficientnet_lite0"]


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


def test_a_second_pass_casts_no_matrix() -> None:
    teacher, images = made("vit_nano_patch4_32")
    matrices = {tuple(p.shape) for p in teacher.network.parameters() if p.ndim > 1 and p.shape[0] > 1}
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
