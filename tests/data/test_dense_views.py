"""Views of images with their maps: both stay together, in crops and whole; what is drawn, and what lies outside."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from eva_mim.data.dense_views import DenseEvalView, DenseTrainView, resized_size
from eva_mim.data.sources.masks import Segmentation
from eva_mim.data.view_settings import DenseViewSettings
from tests.conftest import picture

MEAN = (0.4, 0.5, 0.6)


def speaking(size: tuple[int, int], cell: int = 16) -> tuple[Image.Image, Segmentation]:
    """A picture whose red channel says the class of each pixel: 20 times its number; cells of 16 px."""
    width, height = size
    cells = np.random.default_rng(0).integers(0, 12, (-(-height // cell), -(-width // cell)))
    classes = np.kron(cells, np.ones((cell, cell), int))[:height, :width]
    pixels = np.stack([20 * classes, np.full_like(classes, 7), np.full_like(classes, 200)], 2).astype(np.uint8)
    return Image.fromarray(pixels), classes.astype(np.int16)


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.2, 0.4), (1.0, 1.0)])
def test_image_and_map_stay_together(scale: tuple[float, float]) -> None:
    """Where the red channel is flat, away from edges, it says the map's class; outside the image both say nothing."""
    image, truth = speaking((96, 80))
    view = DenseTrainView(DenseViewSettings(scale=scale, flip=0.5), 64, MEAN)
    outside = [round(255 * value) for value in MEAN]
    known = 0
    for seed in range(20):
        pixels, found = view(image, truth, random.Random(seed))
        assert pixels.shape == (3, 64, 64)
        assert found.shape == (64, 64)
        assert (pixels.dtype, found.dtype) == (torch.uint8, torch.int16)
        beyond = found == -1
        assert torch.equal(pixels[:, beyond], torch.tensor(outside, dtype=torch.uint8)[:, None].expand(-1, int(beyond.sum())))
        assert torch.equal(beyond, pixels[1] != 7)
        red = pixels[0].float()
        around = F.unfold(F.pad(red[None, None], (2, 2, 2, 2), mode="replicate"), 5)[0].view(25, 64, 64)
        flat = ((around - red).abs().amax(0) == 0) & ~beyond
        known += int(flat.sum())
        assert torch.equal(red[flat] / 20, found[flat].float())
    assert known > 100


def test_a_view_is_a_function_of_its_draws() -> None:
    image, truth = picture(1, (50, 40)), np.zeros((40, 50), np.int16)
    view = DenseTrainView(DenseViewSettings(photometric=True, max_share=1.0), 32, MEAN)
    torch.manual_seed(0)
    first, before = view(image, truth, random.Random(5)), torch.get_rng_state()
    torch.manual_seed(1)
    second = view(image, truth, random.Random(5))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(first[0], view(image, truth, random.Random(6))[0])
    torch.manual_seed(0)
    assert torch.equal(before, torch.get_rng_state())  # nothing was drawn from the global generator
    plain = DenseTrainView(DenseViewSettings(max_share=1.0), 32, MEAN)(image, truth, random.Random(5))
    assert torch.equal(first[1], plain[1])
    assert not torch.equal(first[0], plain[0])


def test_crops_of_one_class_are_drawn_again() -> None:
    """The picture's left nine tenths are one class: nearly every crop is of it alone, unless others are sought."""
    truth = np.zeros((64, 640), np.int16)
    truth[:, 576:] = 1
    image = Image.new("RGB", (640, 64))
    shares = {}
    for limit in (1.0, 0.75):
        view = DenseTrainView(DenseViewSettings(scale=(1.0, 1.0), max_share=limit), 64, MEAN)
        maps = torch.stack([view(image, truth, random.Random(seed))[1] for seed in range(100)])
        shares[limit] = float(((maps == 1).any((1, 2)) & (maps == 0).any((1, 2))).float().mean())
    assert shares[1.0] < 0.2 < 0.3 < shares[0.75]


def test_sizes() -> None:
    assert resized_size((300, 400), 512) == (512, 683)
    assert resized_size((400, 300), 256) == (341, 256)
    assert resized_size((100, 1000), 512) == (205, 2048)  # as 2048 x 512 in mmsegmentation
    image, truth = speaking((100, 70))
    for view, size in ((DenseEvalView(64), (64, 91)), (DenseEvalView(64, 16), (64, 96))):
        pixels, found = view(image, truth, random.Random(0))
        assert pixels.shape[1:] == size
        assert np.array_equal(found.numpy(), truth)
    pixels, _ = DenseEvalView(64)(Image.new("RGB", (1000, 20)), np.zeros((20, 1000), np.int16), random.Random(0))
    assert pixels.shape[1:] == (64, 256)  # neither side is shorter than a window
