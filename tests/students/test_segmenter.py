"""Segmentation models against loops and torch's own layers: pyramid, features, every kind of trunk."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.students import SegmenterSettings
from eva_mim.students.segmenter import AUXILIARY, MAIN, Segmenter
from eva_mim.trunks.kernels import Strided, tune
from eva_mim.trunks.levels import levels, pyramid


def segmenter(name: str = "vit_nano_patch4_32", kind: str = "linear", **settings: Any) -> Segmenter:
    torch.manual_seed(0)
    head = {"kind": kind, **({"width": 8} if kind == "upernet" else {}), "dropout": 0.0} | settings.pop("head", {})
    return Segmenter(SegmenterSettings.model_validate({"name": name, "head": head, **settings}), 5)


def test_the_pyramid_against_loops() -> None:
    """A transposed convolution of 2 x 2 and stride 2 writes each cell into four, which do not overlap."""
    torch.manual_seed(0)
    cells = torch.randn(2, 6, 3, 4)

    def doubled(layer: nn.ConvTranspose2d, maps: Tensor) -> Tensor:
        batch, _, rows, columns = maps.shape
        out = torch.zeros(batch, layer.out_channels, 2 * rows, 2 * columns)
        for row in range(rows):
            for column in range(columns):
                for down in range(2):
                    for right in range(2):
                        value = maps[:, :, row, column] @ layer.weight[:, :, down, right]
                        out[:, :, 2 * row + down, 2 * column + right] = value + layer.bias
        return out

    four: Any = pyramid(6, 4).eval()
    norm = four[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    middle = (doubled(four[0], cells) - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
    torch.testing.assert_close(four(cells), doubled(four[3], F.gelu(middle)))
    two: Any = pyramid(6, 2)
    torch.testing.assert_close(two(cells), doubled(two, cells))
    assert torch.equal(pyramid(6, 1)(cells), cells)
    halved = torch.stack([cells[:, :, :2, 2 * column : 2 * column + 2].amax((2, 3)) for column in range(2)], -1)
    assert torch.equal(pyramid(6, 0.5)(cells)[:, :, 0], halved)


def test_the_linear_head_sees_the_last_tokens() -> None:
    """Those of timm's forward_features, after the last norm, without class and register tokens."""
    model = segmenter(registers=3).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(model.trunk.norm.weight)
    pixels = (images / 255 - torch.tensor(model.mean).view(3, 1, 1)) / torch.tensor(model.std).view(3, 1, 1)
    with torch.no_grad():
        tokens = model.trunk.forward_features(pixels)[:, model.trunk.num_prefix_tokens :]
        maps = tokens.transpose(1, 2).unflatten(2, (8, 8))
        classifier: Any = model.head.classifier
        wanted = F.conv2d(maps / (1 + 1e-5) ** 0.5, classifier.weight, classifier.bias)
        torch.testing.assert_close(model(images)[MAIN], wanted, rtol=1e-4, atol=1e-5)


TRUNKS = ("vit_nano_patch4_32", "vitamin_nano_32", "eva02_tiny_patch14_224", "beit_base_patch16_224", "convnext_atto",
          "efficientnet_lite0", "fastvit_t8", "coatnet_nano_rw_224", "swin_tiny_patch4_window7_224", "vitamin_small_224")


@pytest.mark.parametrize("kind", ["linear", "upernet"])
@pytest.mark.parametrize("name", TRUNKS)
def test_every_kind_of_trunk(name: str, kind: str) -> None:
    """One small model of each family: the scores' grid, and each weight of trunk and head has a gradient."""
    size = {"image_size": 56} if "patch14" in name else {"image_size": 64} if name.startswith(("beit", "vitamin_small")) else {}
    model = segmenter(name, kind, **size)
    tune(model, "cpu")
    side = min(model.image_size, 96) if "swin" not in name and "coatnet" not in name else model.image_size
    scores = model(torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8))
    rows = side // model.stride
    assert scores[MAIN].shape[:2] == (2, 5)
    assert scores[MAIN].shape[2] >= rows
    assert scores[MAIN].shape[2] == (rows if kind == "linear" else scores[MAIN].shape[3])
    assert (AUXILIARY in scores) == (kind == "upernet")
    sum(one.square().mean() for one in scores.values()).backward()  # type: ignore[union-attr]
    assert not [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    still = {key.split(".")[1] for key, value in model.named_parameters() if not value.requires_grad}
    assert still <= {"norm", "head", "conv_head", "bn2", "final_conv"}  # behind the last map
    assert AUXILIARY not in model.eval()(torch.zeros(1, 3, side, side))
    assert timm.is_model(name)


def test_strided_convolutions_of_few_channels() -> None:
    """Values and gradients of torch's own on memory that its bug does not concern, channels first."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.Conv2d(8, 8, 1, 2, groups=8), nn.Conv2d(8, 4, 3, 2), nn.Conv2d(4, 4, 1))
    tuned = deepcopy(plain)
    tune(tuned, "cpu")
    assert [type(layer) for layer in tuned] == [Strided, Strided, nn.Conv2d, nn.Conv2d]
    images = torch.randn(2, 3, 31, 40)
    for model in (plain, tuned):
        model(images).square().sum().backward()
    torch.testing.assert_close(tuned(images), plain(images))
    for one, other in zip(plain.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)
    assert tuned.state_dict().keys() == plain.state_dict().keys()


def test_a_network_without_maps_is_refused() -> None:
    with pytest.raises(UserError, match="Linear does not give the maps of its blocks"):
        levels(nn.Linear(2, 2))
