"""The segmentation probe of patches: classes of cells against loops, and the figure of a real run against the exported trunk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

import eva_mim.trunks.small  # noqa: F401
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.splits import open_splits
from eva_mim.evaluate.features import fit_ridge
from eva_mim.evaluate.patches import patch_classes
from tests.tiny import MIM, SCENES, run, teacher_file, write_recipe


def test_classes_of_cells_against_a_loop() -> None:
    random = np.random.default_rng(0)
    for height, width, grid in ((12, 20, (3, 4)), (7, 9, (3, 2)), (5, 5, (5, 5)), (32, 48, (4, 4))):
        truth = random.integers(-1, 4, (height, width))
        truth[: height // 3, : width // 2] = -1
        found = patch_classes(torch.from_numpy(truth), grid, 4)
        for row in range(grid[0]):
            for column in range(grid[1]):
                inside = [truth[y, x] for y in range(height) for x in range(width)
                          if y * grid[0] // height == row and x * grid[1] // width == column and truth[y, x] >= 0]
                wanted = max(range(4), key=inside.count) if inside else -1
                assert found[row, column] == wanted


@pytest.mark.slow
def test_the_figure_is_that_of_the_exported_trunk(tmp_path: Path) -> None:
    """All but the ridge regression itself (`tests/evaluate/test_features.py`) is done another way; two processes say the same."""
    data = SCENES | {"scenes": {"size": 32, "train": 40, "val": 30, "labels": "coarse"}, "segmentation": {}, "val_limit": 20}
    tree = MIM | {"teacher": MIM["teacher"] | {"weights": str(teacher_file(tmp_path))},
                  "evaluate": MIM["evaluate"] | {"segmentation": data}}
    recipe = write_recipe(tmp_path, tree)
    run("mim", recipe, tmp_path / "out", "run.epochs=1")
    found = json.loads((tmp_path / "out" / "lineage.json").read_text())["metrics"]
    trunk = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(trunk.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    rows, labels, scores = [], [], []
    train, val = open_splits(parse(DataSettings, data | {"val_limit": None}, "data"))

    @torch.no_grad()
    def patches(image: object) -> torch.Tensor:
        pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        return trunk.forward_features(pixels[None])[0, trunk.num_prefix_tokens :]

    for sample in map(train.read, range(40)):
        rows.append(patches(sample.image))
        assert sample.segmentation is not None
        cells = sample.segmentation.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
        labels += [int(np.bincount(cell).argmax()) for cell in cells]
    ridge = fit_ridge(torch.cat(rows), torch.tensor(labels), 7, device=torch.device("cpu"), total=lambda part: part)
    truths = []
    for sample in map(val.read, range(20)):
        said = (patches(sample.image).double() - ridge.centre) @ ridge.weights + ridge.offset
        map_of = F.interpolate(said.T.reshape(1, 7, 4, 4).float(), (32, 32), mode="bilinear")[0].argmax(0)
        scores.append(map_of.numpy().ravel())
        assert sample.segmentation is not None
        truths.append(sample.segmentation.ravel())
    wanted = 100 * jaccard_score(np.concatenate(truths), np.concatenate(scores), average=None,
                                 labels=sorted({*np.concatenate(truths), *np.concatenate(scores)}))
    assert found["segmentation_miou"] == pytest.approx(wanted.mean(), abs=0.05)
    assert found["segmentation_accuracy"] == pytest.approx(
        100 * (np.concatenate(truths) == np.concatenate(scores)).mean(), abs=0.05)

    words = ["run.epochs=1", "optim.lr=1e-9", "run.engine=deepspeed"]
    for name, processes in (("one", 1), ("two", 2)):
        run("mim", recipe, tmp_path / name, *words, processes=processes)
    one, two = (json.loads((tmp_path / name / "lineage.json").read_text())["metrics"] for name in ("one", "two"))
    assert two["segmentation_miou"] == pytest.approx(one["segmentation_miou"], abs=0.05)


def test_a_probe_without_maps_is_refused(tmp_path: Path) -> None:
    tree = MIM | {"evaluate": {"segmentation": SCENES}}
    said = run("mim", write_recipe(tmp_path, tree), tmp_path / "out", code=2).stderr
    assert "evaluate.segmentation.segmentation must be given: the maps" in said
