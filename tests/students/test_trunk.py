"""What every student's trunk can be told: slower patch embeddings, rates of stochastic depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva_mim.core.errors import UserError
from eva_mim.data.view_settings import MaskSettings
from eva_mim.students import ClassifierSettings, ClipSettings, DecoderSettings, MaskedSettings, TextSettings
from eva_mim.students.classifier import Classifier, LinearProbe
from eva_mim.students.clip import ClipStudent
from eva_mim.students.masked import MaskedStudent
from eva_mim.trunks import TrunkSettings
from eva_mim.trunks.create import build_trunk
from eva_mim.trunks.meta import meta_device
from tests.students.test_masked import images_and_mask, randomise

TEXT = TextSettings(width=32, layers=1, heads=2, context_length=12)


def masked_gradients(name: str, form: Any, scale: float) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Predictions and gradients; everything but `scale` is the same at each call."""
    torch.manual_seed(0)
    settings = MaskedSettings(name=name, form=form, patch_grad_scale=scale, decoder=DecoderSettings(width=32, depth=1, heads=2))
    made = randomise(MaskedStudent(settings, 10, MaskSettings(kind="random", ratio=0.5)).eval())
    images, _, _ = images_and_mask(made)
    masked = torch.arange(3 * made.patches).reshape(3, -1) % 2 == 0
    prediction = made(images, masked, masked.flatten().nonzero()[:, 0])
    prediction.square().sum().backward()
    return prediction.detach(), {key: parameter.grad for key, parameter in made.named_parameters()}


def compare(slow: dict[str, Tensor | None], full: dict[str, Tensor | None], scale: float) -> None:
    """Patch embeddings have `scale` times the gradient, the rest the same one, bit for bit (scale: a power of two or 0)."""
    assert slow.keys() == full.keys()
    patch = [key for key in full if "patch_embed." in key]
    assert patch
    for key, expected in full.items():
        assert expected is not None
        if scale == 0 and key in patch:
            assert slow[key] is None
        else:
            assert torch.equal(slow[key], expected * (scale if key in patch else 1)), key
        assert expected.any() or key not in (*patch, "mask_token"), key


@pytest.mark.parametrize("scale", [0.25, 0.0])
@pytest.mark.parametrize(
    ("name", "form"),
    [("vit_nano_patch4_32", "mask_tokens"), ("vit_nano_patch4_32", "visible"), ("dynamic_vit", "mask_tokens"),
     ("golden_eva01_relpos", "mask_tokens"), ("golden_eva02_b_mim", "visible")],
)
def test_only_the_patch_embedding_is_slowed(name: str, form: str, scale: float) -> None:
    """The mask token takes the same way out of the patch embedding, and keeps its gradient. What is computed is unchanged."""
    prediction, slow = masked_gradients(name, form, scale)
    expected, full = masked_gradients(name, form, 1.0)
    assert torch.equal(prediction, expected)
    compare(slow, full, scale)


def gradients(student: nn.Module, *inputs: Tensor) -> dict[str, Tensor | None]:
    """After a pass whose output has no symmetry that would make a gradient 0."""
    output = student(*inputs)
    loss = output.square().sum() if isinstance(output, Tensor) else (output[0] * output[1].flip(0)).sum() * output[2]
    loss.backward()
    return {key: parameter.grad for key, parameter in student.named_parameters() if parameter.requires_grad or "patch" in key}


@pytest.mark.parametrize("scale", [0.5, 0.0])
@pytest.mark.parametrize("name", ["vit_nano_patch4_32", "xcit_nano_12_p16_224"])
def test_classifiers_slow_or_freeze_it(name: str, scale: float) -> None:
    """XCiT's patch embedding returns its grid as well."""
    def classifier(scale: float) -> Classifier:
        torch.manual_seed(0)
        size = 32 if name.startswith("xcit") else None
        made = Classifier(ClassifierSettings(name=name, image_size=size, patch_grad_scale=scale), 5).eval()
        nn.init.normal_(made.get_parameter("trunk.head.weight"))
        return made

    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    compare(gradients(classifier(scale), images), gradients(classifier(1), images), scale)


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_clip_towers_slow_or_freeze_it(scale: float) -> None:
    def clip(scale: float) -> ClipStudent:
        torch.manual_seed(0)
        return ClipStudent(ClipSettings(name="vit_nano_patch4_32", embed_dim=16, patch_grad_scale=scale, text=TEXT)).eval()

    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    texts = torch.randint(1, 400, (4, 12))
    compare(gradients(clip(scale), images, texts), gradients(clip(1), images, texts), scale)


@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_a_trunk_without_patch_embedding_is_refused(scale: float) -> None:
    options: dict[str, Any] = {"name": "convnet_nano_32", "patch_grad_scale": scale}
    for build in (
        lambda: Classifier(ClassifierSettings(**options), 5),
        lambda: LinearProbe(ClassifierSettings(**options), 5),
        lambda: ClipStudent(ClipSettings(**options, text=TEXT)),
    ):
        with pytest.raises(UserError, match=rf"student\.patch_grad_scale={scale}: convnet_nano_32 .* set it to 1"):
            build()


@pytest.mark.parametrize(
    ("name", "depth"), [("vit_mini_patch4_32", 6), ("eva02_tiny_patch14_224", 12), ("golden_eva01_relpos", 2)]
)
def test_drop_path_rises_linearly_from_zero(name: str, depth: int) -> None:
    with meta_device():
        trunk: Any = build_trunk(TrunkSettings(name=name, drop_path=0.3))
    for branch in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, branch), "drop_prob", 0.0) for block in trunk.blocks]
        assert rates == pytest.approx([0.3 * number / (depth - 1) for number in range(depth)])
