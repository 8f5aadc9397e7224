"""Views against Pillow by hand, the original transform's pixels and torchvision's crop law."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torchvision.transforms import v2

from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.rng import isolated
from eva_mim.data.view_settings import ViewSettings
from eva_mim.data.views import EvalView, TrainView, crop_box
from eva_mim.trunks.pixels import normalise
from tests.conftest import REPOSITORY, picture

BICUBIC = Image.Resampling.BICUBIC


def fixed_crop(image: Image.Image, width: int, height: int, **more: object) -> ViewSettings:
    """Settings whose every crop is `width` x `height`, at a random place."""
    share, ratio = width * height / (image.width * image.height), width / height
    return ViewSettings(crop_scale=(share, share), crop_ratio=(ratio, ratio), **more)  # type: ignore[arg-type]


def pixels(image: Image.Image) -> Tensor:
    """[3, H, W] int32, by numpy alone."""
    return torch.from_numpy(np.moveaxis(np.asarray(image), -1, 0).astype(np.int32))


def all_crops(image: Image.Image, width: int, height: int, size: int, mirror: bool) -> dict[tuple[int, int], Tensor]:
    """Every crop of that size, cut out and then resized by Pillow."""
    crops = {}
    for left in range(image.width - width + 1):
        for top in range(image.height - height + 1):
            view = image.crop((left, top, left + width, top + height)).resize((size, size), BICUBIC)
            crops[left, top] = pixels(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else view)
    return crops


@pytest.mark.parametrize("mirror", [False, True])
def test_teacher_and_student_see_the_same_crop(mirror: bool) -> None:
    """Of all crops by hand, the one nearest to the student's view is the one nearest to the teacher's."""
    image = picture(3, (24, 20))
    view = TrainView(fixed_crop(image, 15, 12, flip=float(mirror)), [16, 28])
    by_hand = {size: all_crops(image, 15, 12, size, mirror) for size in (16, 28)}
    places = set()
    for seed in range(12):
        student, teacher = view(image, random.Random(seed)).values()
        assert (student.shape, teacher.shape) == ((3, 16, 16), (3, 28, 28))
        nearest = []
        for mine in (student, teacher):
            crops = by_hand[mine.shape[-1]]
            distance = {place: (crop - mine).abs().float().mean().item() for place, crop in crops.items()}
            nearest.append(min(distance, key=distance.__getitem__))
            assert distance[nearest[-1]] < 3  # grey levels of 255; a crop one pixel off is more than twice as far
        assert nearest[0] == nearest[1], seed
        places.add(nearest[0])
    assert len(places) > 8


def test_equal_sizes_are_one_view() -> None:
    for view in (TrainView(ViewSettings(), [16, 24, 16]), EvalView([16, 24, 16])):
        assert {size: tuple(found.shape) for size, found in view(picture(0), random.Random(0)).items()} == {
            16: (3, 16, 16), 24: (3, 24, 24)}


def test_pixels_outside_the_crop_do_not_matter() -> None:
    """A crop is cut out and then resized (torchvision, EVA): what lies beside it cannot bleed into its border."""
    image = picture(5, (24, 20))
    view = TrainView(fixed_crop(image, 12, 10, flip=0.0), [16])
    by_hand = all_crops(image, 12, 10, 16, mirror=False)
    for seed in range(6):
        mine = view(image, random.Random(seed))[16]
        worst = {place: (crop - mine).abs().max().item() for place, crop in by_hand.items()}
        assert min(worst.values()) == 0, f"nearest crop differs by {min(worst.values())} grey levels"


@pytest.mark.parametrize("flip", [0, 1])
def test_views_are_the_original_transforms(shared: Path, flip: int) -> None:
    """Student 56 px and teacher 64 px of one box; the original mirrors first, so its box counts from the other side."""
    golden = load_file(shared / "golden" / "transform.safetensors")
    facts = json.loads((shared / "golden" / "transform.json").read_text())
    if PIL.__version__.split(".")[0] != facts["pillow"].split(".")[0]:
        pytest.skip(f"golden pixels are of Pillow {facts['pillow']}; {PIL.__version__} resizes otherwise (up to 12 grey levels)")
    image = Image.fromarray(golden["in/decoded_rgb"].numpy())
    top, left, height, width = facts["crop_box_top_left_height_width"]
    if flip:
        left = image.width - left - width
    settings = fixed_crop(image, width, height, flip=float(flip))
    box = (left, top, left + width, top + height)
    law = (image.size, settings.crop_scale, settings.crop_ratio)
    seed = next(seed for seed in range(100_000) if crop_box(*law, random.Random(seed)) == box)
    views = TrainView(settings, [56, 64])(image, random.Random(seed))
    for size, name in ((56, "student_56"), (64, "teacher_64")):
        mine = normalise(views[size][None], tuple(facts["mean"]), tuple(facts["std"]))[0]
        levels = (mine - golden[f"out/{name}_flip{flip}"]) * torch.tensor(facts["std"])[:, None, None] * 255
        assert levels.abs().max() < 0.01, f"{name}: {levels.abs().max():.1f} grey levels"


def test_boxes_are_the_original_codes_boxes(shared: Path) -> None:
    """The same generator gives the fixture's 200 boxes when numbers are drawn in the original's order."""
    golden = load_file(shared / "golden" / "transform.safetensors")["out/random_boxes"].tolist()
    rng = random.Random(8300)
    for number, (top, left, height, width) in enumerate(golden):
        box = crop_box((150, 110), (0.2, 1.0), (3 / 4, 4 / 3), rng)
        assert box == (left, top, left + width, top + height), number


def test_flip_mirrors_the_same_crop_at_its_rate() -> None:
    image = picture(1)
    straight, mirrored = (TrainView(ViewSettings(flip=flip), [12, 20]) for flip in (0.0, 1.0))
    for seed in range(10):
        for one, other in zip(*(view(image, random.Random(seed)).values() for view in (straight, mirrored)), strict=True):
            assert torch.equal(one.flip(-1), other)
    often = TrainView(ViewSettings(flip=0.3), [12])
    same = sum(torch.equal(often(image, random.Random(s))[12], straight(image, random.Random(s))[12]) for s in range(400))
    assert same / 400 == pytest.approx(0.7, abs=0.08)


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 96)])
def test_eval_view_is_resize_and_centre_crop(size: tuple[int, int]) -> None:
    """torchvision's Resize and CenterCrop, where its whole-pixel rounding does not move the crop."""
    image = picture(7, size)
    resized = v2.CenterCrop(16)(v2.Resize(16, interpolation=v2.InterpolationMode.BICUBIC)(image))
    mine = EvalView([16])(image, random.Random(0))[16]
    assert (pixels(resized) - mine).abs().max() <= 1


def test_eval_view_draws_nothing() -> None:
    rng = random.Random(0)
    state = rng.getstate()
    EvalView([8, 16])(picture(0), rng)
    assert rng.getstate() == state


def largest_gap(first: list[float], second: list[float]) -> float:
    """Kolmogorov-Smirnov distance of two samples of the same length."""
    points = np.sort(np.concatenate([first, second]))
    ranks = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (first, second)]
    return float(np.abs(ranks[0] - ranks[1]).max())


@pytest.mark.parametrize("size", [(150, 110), (40, 160)])
def test_crop_law_is_torchvisions(size: tuple[int, int]) -> None:
    """Area, aspect and place have torchvision's distribution (the second size often falls back to the centre)."""
    count, scale, ratio = 1200, (0.2, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(8, scale=scale, ratio=ratio), Image.new("RGB", size)
    theirs = [crop.make_params([image]) for _ in range(count)]
    rng = random.Random(0)
    mine = [crop_box(size, scale, ratio, rng) for _ in range(count)]
    measured = {
        "area": ([p["width"] * p["height"] for p in theirs], [(r - x) * (b - y) for x, y, r, b in mine]),
        "aspect": ([p["width"] / p["height"] for p in theirs], [(r - x) / (b - y) for x, y, r, b in mine]),
        "left": ([p["left"] for p in theirs], [x for x, _, _, _ in mine]),
        "top": ([p["top"] for p in theirs], [y for _, y, _, _ in mine]),
    }
    for name, (first, second) in measured.items():
        assert largest_gap(first, second) < 1.63 * math.sqrt(2 / count), name  # the 1 % level
    assert all(0 <= x < r <= size[0] and 0 <= y < b <= size[1] for x, y, r, b in mine)


def outer_draws() -> tuple[float, float, float]:
    """The next number of each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_isolated_leaves_the_outer_state_alone() -> None:
    def seeded() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seeded()
    expected = outer_draws()
    seeded()
    with isolated(99):
        inner = outer_draws()
    assert outer_draws() == expected
    seeded()
    with pytest.raises(ZeroDivisionError), isolated(99):
        assert 1 / (outer_draws() != inner)
    assert outer_draws() == expected


def test_randaugment_is_a_function_of_the_sample_seed() -> None:
    image = picture(2)
    view = TrainView(ViewSettings(randaugment="rand-m9-n2-mstd0.5", crop_scale=(1.0, 1.0), flip=0.0), [16])
    plain = TrainView(ViewSettings(crop_scale=(1.0, 1.0), flip=0.0), [16])
    random.seed(5)
    np.random.seed(5)
    first = [view(image, random.Random(seed))[16] for seed in range(8)]
    random.seed(6)
    np.random.seed(6)
    before = random.getstate()
    again = [view(image, random.Random(seed))[16] for seed in range(8)]
    assert random.getstate() == before
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({one.numpy().tobytes() for one in first}) > 5
    changed = [not torch.equal(one, plain(image, random.Random(seed))[16]) for seed, one in enumerate(first)]
    assert sum(changed) > 4


def test_no_bits_are_a_black_image() -> None:
    """At magnitude 10 timm's "increasing" posterize keeps 0 bits, of which Pillow made black until version 13 refused them."""
    view = TrainView(ViewSettings(randaugment="rand-m10-n1-inc1", crop_scale=(1.0, 1.0), flip=0.0), [16])
    blacks = sum(not view(picture(2), random.Random(seed))[16].any() for seed in range(400))
    assert 5 < blacks < 35  # one of 15 operations, half of the time


def augmentations() -> list[dict[str, Any]]:
    """Each distinct augmentation of the recipes' training views."""
    found, names = [], ("randaugment", "jitter", "jitter_prob", "grayscale", "erase")
    for path in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        view = read_yaml(path).get("view", {})
        kept = {name: view[name] for name in names if name in view}
        if kept and kept not in found:
            found.append(kept)
    return found


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("augmentation", augmentations(), ids=str)
def test_no_draw_of_a_recipes_augmentation_fails(augmentation: dict[str, Any]) -> None:
    """20,000 views: what happens to one image of 600 happens here 30 times."""
    view = TrainView(ViewSettings(**augmentation), [16], (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    image = picture(2, (16, 16))
    shown = {view(image, random.Random(seed))[16].numpy().tobytes() for seed in range(20_000)}
    assert len(shown) > 15_000


def test_unknown_randaugment_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="randaugment"):
        TrainView(ViewSettings(randaugment="augmix-m9"), [16])


def test_held_out_images_are_cut_as_timm_cuts_them() -> None:
    image, rng = picture(3, (80, 64)), random.Random(0)
    theirs = create_transform(28, crop_pct=0.875, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))(image) * 255
    ours = EvalView([28], 0.875)(image, rng)[28].float()
    assert (ours - theirs).abs().max() <= 1.01  # they round twice
    assert (EvalView([28])(image, rng)[28].float() - theirs).abs().mean() > 3


def test_jitter_and_greys_are_torchvisions() -> None:
    """The same draws from the same generator; both sizes get the same colours."""
    image, whole = picture(4, (24, 24)), {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    view = TrainView(ViewSettings(jitter=(0.4, 0.3, 0.2, 0.1), jitter_prob=1.0, grayscale=0.3, **whole), [24, 24, 12])
    for seed in range(6):
        mine = view(image, random.Random(seed))
        rng = random.Random(seed)
        crop_box(image.size, (1.0, 1.0), (1.0, 1.0), rng)
        rng.random()  # the mirror's draw
        with isolated(rng.getrandbits(62)):
            expected = v2.RandomGrayscale(0.3)(v2.RandomApply([v2.ColorJitter(0.4, 0.3, 0.2, 0.1)], p=1.0)(image))
        assert torch.equal(mine[24].int(), pixels(expected)), seed
    greys = [view(image, random.Random(seed)) for seed in range(200)]
    grey = [bool((views[24] == views[24][:1]).all()) for views in greys]
    assert 0.2 < sum(grey) / 200 < 0.4
    assert grey == [bool((views[12] == views[12][:1]).all()) for views in greys]
    never = TrainView(ViewSettings(jitter=(0.9, 0.9, 0.9, 0.5), jitter_prob=0.0, **whole), [24])
    assert torch.equal(never(image, random.Random(0))[24].int(), pixels(image))


def test_erased_pixels_are_noise_as_the_student_sees_it() -> None:
    grey, mean, std = Image.new("RGB", (64, 64), (90, 90, 90)), (0.5, 0.4, 0.6), (0.1, 0.1, 0.1)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    view = TrainView(ViewSettings(erase=0.6, **whole), [64, 32], (mean, std))
    state, count, noise = random.getstate(), 0, []
    for seed in range(120):
        student, smaller = view(grey, random.Random(seed)).values()
        changed = (student != 90).any(0)
        assert bool((smaller != 90).any()) == bool(changed.any())
        if not changed.any():
            continue
        count += 1
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        top, left, height, width = int(rows[0]), int(columns[0]), len(rows), len(columns)
        # timm's law: 2 % to a third of the area, rounded to whole pixels
        assert 0.015 * 64**2 <= height * width <= (1 / 3) * 64**2 + 64
        noise.append(normalise(student[None], mean, std)[0, :, top : top + height, left : left + width].flatten(1))
        assert torch.equal(student[:, ~changed], torch.full_like(student[:, ~changed], 90))
    assert 0.48 < count / 120 < 0.72
    drawn = torch.cat(noise, dim=1)
    assert drawn.mean(1).abs().max() < 0.02
    assert (drawn.std(1) - 1).abs().max() < 0.02
    assert random.getstate() == state
    assert torch.equal(view(grey, random.Random(3))[64], view(grey, random.Random(3))[64])
