"""Segmentation by class texts: figures against scikit-learn, windows against loops, the command against open_clip's own model,
and masks that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score
from torch.nn import functional as F

from eva_mim.commands import evaluate as reevaluate
from eva_mim.core.errors import UserError
from eva_mim.data.sources.folder import FolderSource
from eva_mim.data.sources.masks import Masks, read_mask_classes
from eva_mim.evaluate.segmentation import confusion, figures, slid, starts
from tests.conftest import picture
from tests.students.tiny_towers import random_clip
from tests.tiny import finish, python

NAMES = ("wall", "sky", "tree", "sea")


def pairs(root: Path, sizes: list[tuple[int, int]], values: tuple[int, ...] = (0, 1, 2, 3, 255)) -> Path:
    """Pictures of these (width, height) with drawn masks, and a class list."""
    for number, size in enumerate(sizes):
        name = f"validation/{number:02d}"
        for folder, suffix in (("images", "png"), ("annotations", "png")):
            (root / folder / "validation").mkdir(parents=True, exist_ok=True)
            path = root / folder / f"{name}.{suffix}"
            if folder == "images":
                picture(number, size).save(path)
            else:
                cells = np.random.default_rng(number).choice(values, (4, 5)).astype(np.uint8)
                Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(path)
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def test_figures_against_scikit_learn() -> None:
    random = np.random.default_rng(0)
    for classes in (2, 7, 30):
        truth, said = random.integers(-1, classes - 1, (9, 11)), random.integers(0, classes - 1, (9, 11))
        matrix = confusion(torch.from_numpy(truth), torch.from_numpy(said), classes)
        there = truth >= 0
        assert np.array_equal(matrix.numpy(), confusion_matrix(truth[there], said[there], labels=range(classes)))
        found = figures(matrix)
        used = sorted(set(truth[there]) | set(said[there]))
        wanted = jaccard_score(truth[there], said[there], average=None, labels=used)
        assert found.miou == pytest.approx(100 * wanted.mean())
        assert [found.ious[label] for label in used] == pytest.approx((100 * wanted).tolist())
        assert found.pixel_accuracy == pytest.approx(100 * (truth[there] == said[there]).mean())
        assert np.isnan(found.ious[classes - 1])


def test_windows_against_a_loop() -> None:
    """Each pixel's mean over the windows that hold it; of an image of one window, the window's own map."""
    assert starts(32, 32) == [0]
    assert starts(75, 30) == [0, 20, 40, 45]
    assert starts(50, 30) == [0, 20]
    image = torch.rand(3, 40, 26, generator=torch.Generator().manual_seed(0))

    def map_of(windows: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(windows, 4)[:, :2] * windows.mean(dim=(1, 2, 3), keepdim=True)

    scores, counts = torch.zeros(2, 40, 26), torch.zeros(40, 26)
    for top in (0, 13, 20):
        for left in (0, 6):
            window = image[None, :, top : top + 20, left : left + 20]
            scores[:, top : top + 20, left : left + 20] += F.interpolate(map_of(window), (20, 20), mode="bilinear")[0]
            counts[top : top + 20, left : left + 20] += 1
    torch.testing.assert_close(next(slid([image], 20, map_of)), scores / counts)
    whole = image[:, :20, :20]
    alone = F.interpolate(map_of(whole[None]), (20, 20), mode="bilinear")[0]
    several = slid([whole, image, whole], 20, map_of, most=4)
    for one, wanted in zip(several, (alone, scores / counts, alone), strict=True):
        torch.testing.assert_close(one, wanted)


@pytest.mark.parametrize("whole", [False, True])
def test_the_command_against_open_clips_own_model(whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = random_clip(tmp_path / "clip")
    root = pairs(tmp_path / "data", [(40, 32), (32, 32), (30, 64)])
    (tmp_path / "templates.txt").write_text("a photo of a {}.")
    line = [str(clip), "--segment", str(root), "--templates", str(tmp_path / "templates.txt"), *(["--whole"] if whole else [])]
    assert reevaluate.main(line) == 0
    said = capsys.readouterr().out

    model = open_clip.create_model(f"local-dir:{clip}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip}")
    trunk, config = model.visual.trunk, open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        weights = F.normalize(model.encode_text(tokenizer([f"a photo of a {name}." for name in NAMES])), dim=-1)

        def scores(pixels: torch.Tensor) -> torch.Tensor:
            tokens = trunk.forward_features(pixels[None])[:, trunk.num_prefix_tokens :]
            patches = F.normalize(model.visual.head(trunk.fc_norm(tokens)), dim=-1)
            return (patches @ weights.T).transpose(1, 2).unflatten(2, (8, 8))

        truths, answers = [], []
        for number, size in enumerate([(40, 32), (32, 32), (30, 64)]):
            factor = 32 / min(size)
            width, height = (32, 32) if whole else (max(32, round(factor * size[0])), max(32, round(factor * size[1])))
            resized = picture(number, size).resize((width, height), Image.Resampling.BICUBIC)
            pixels = (torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255 - mean) / std
            total, counts = torch.zeros(4, height, width), torch.zeros(height, width)
            for top in starts(height, 32):
                for left in starts(width, 32):
                    window = F.interpolate(scores(pixels[:, top : top + 32, left : left + 32]), (32, 32), mode="bilinear")[0]
                    total[:, top : top + 32, left : left + 32] += window
                    counts[top : top + 32, left : left + 32] += 1
            found = F.interpolate((total / counts)[None], (size[1], size[0]), mode="bilinear")[0].argmax(0)
            with Image.open(root / "annotations" / "validation" / f"{number:02d}.png") as mask:
                truth = np.array(mask)
            truths.append(truth[truth != 255])
            answers.append(found.numpy()[truth != 255])
    truth, answer = np.concatenate(truths), np.concatenate(answers)
    wanted = 100 * jaccard_score(truth, answer, average="macro")
    match = re.match(r"3 images: mIoU ([\d.]+), pixel accuracy ([\d.]+)\n", said)
    assert match is not None, said
    assert float(match[1]) == pytest.approx(wanted, abs=0.05)  # a pixel on the border of two classes may turn
    assert float(match[2]) == pytest.approx(100 * (truth == answer).mean(), abs=0.05)
    with Image.open(clip / "segments.png") as sheet:
        assert sheet.size[1] > 3 * 144
    if not whole:
        two = finish(python("eva_mim.cli", "evaluate", *line, processes=2))
        assert two.stdout.splitlines()[0] == said.splitlines()[0]


def test_masks_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pairs(tmp_path / "data", [(40, 32)] * 6)
    masks = root / "annotations" / "validation"
    Image.new("L", (30, 32)).save(masks / "00.png")
    Image.new("L", (40, 32), 9).save(masks / "01.png")
    Image.new("RGB", (40, 32)).save(masks / "02.png")
    (masks / "03.png").write_bytes(b"no image")
    Image.fromarray(np.full((32, 40), 3, np.uint16)).save(masks / "04.png")
    palette = Image.new("P", (40, 32), 2)
    palette.putpalette([9, 9, 9] * 256)
    palette.save(masks / "05.png")
    classes = read_mask_classes(root / "classes.txt", 255)
    source = FolderSource(root / "images", None, masks=Masks(masks.parent, classes))
    for index, text in enumerate(("it has 40 x 32 pixels, its mask 30 x 32",
                                  "its mask values 9 belong to none of 4 classes and are not ignored (255)",
                                  "its mask has colours (RGB) in place of class numbers", "its mask is no image")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(text)):
            source.read(index)
    for index, value in ((4, 3), (5, 2)):
        found = source.read(index).segmentation
        assert found is not None
        assert (found == value).all()
    (masks / "05.png").unlink()
    with pytest.raises(UserError, match=r"annotations: 1 of 6 images have no mask there, such as validation/05\.png for "):
        FolderSource(root / "images", None, masks=Masks(masks.parent, classes))
    clip = str(random_clip(tmp_path / "clip"))
    assert reevaluate.main([clip, "--segment", str(tmp_path / "clip")]) == 2
    assert "expected folders images and annotations or masks" in capsys.readouterr().err


def test_options_without_their_command_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in ((["--whole"], "--whole and --ignore go with --segment"),
                        (["--segment", "x", "--on", "y"], "has its own data")):
        with pytest.raises(SystemExit, match="2"):
            reevaluate.main(["run", *words])
        assert text in capsys.readouterr().err
