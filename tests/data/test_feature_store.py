"""Features that are computed once and kept: on the disk before they have their name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eva_mim.data.feature_store import cached_features
from tests.programs.test_probe import some_batches


def test_features_are_on_the_disk_before_they_have_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, their folder, and then the rename: a power cut leaves no folder with holes that a later run would believe."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noting(number: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        fsync(number)

    def renaming(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    def features(images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :3]

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", renaming)
    cached_features({}, some_batches(), features, 8, torch.device("cpu"))
    before = done[: done.index("rename")]
    assert {"facts.json", "features.npy", "labels.npy", "places.npy"} <= set(before)
    assert before[-1].endswith(".tmp")  # the folder
