"""Zero-shot accuracy on videos: a CLIP model in a folder against open_clip's own model and transforms; broken files are found."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.nn import functional as F

from eva_mim.cli import main
from eva_mim.commands import evaluate
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.splits import open_splits
from tests.conftest import picture
from tests.data.test_videos import contents, encoded
from tests.students.tiny_towers import random_clip


@torch.no_grad()
def test_the_command_against_open_clips_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, root = random_clip(tmp_path / "clip"), tmp_path / "videos"
    for label, name in enumerate(("jumping_high", "running")):
        for number in range(4):
            (root / name / str(number)).mkdir(parents=True)
            for frame in range(7):
                picture(100 * label + 10 * number + frame, (48, 40)).save(root / name / str(number) / f"{frame}.png")
    (tmp_path / "templates.txt").write_text("a video of {}.")
    line = [str(folder), "--video", str(root), "data.video.frames=true", "--frames", "3"]
    assert evaluate.main([*line, "--templates", str(tmp_path / "templates.txt")]) == 0
    said = capsys.readouterr().out

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = model.eval().encode_text(tokenizer(["a video of jumping high.", "a video of running."]), normalize=True)
    settings = parse(DataSettings, {"source": "folder", "root": str(root), "video": {"frames": True}, "val_share": 0.01}, "data")
    source, right = open_splits(settings).train.source, 0
    for index in range(8):
        sample = source.read(index)
        video: Any = sample.image
        frames = torch.stack([transform(frame) for frame in video.frames([1, 3, 5])])
        mean = F.normalize(model.encode_image(frames, normalize=True).mean(0), dim=0)
        right += int((texts @ mean).argmax()) == sample.label
    assert re.match(r"8 videos, 3 frames each: top-1 ([\d.]+), top-5 100\.00\n", said)
    assert float(said.split("top-1 ")[1].split(",")[0]) == pytest.approx(100 * right / 8, abs=0.01)


def test_what_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = str(random_clip(tmp_path / "clip"))
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.mp4").write_bytes(encoded(5))
    assert evaluate.main([clip, "--video", str(tmp_path / "flat")]) == 2
    assert "has no class folders" in capsys.readouterr().err
    for words, text in ((["--frames", "3"], "--frames goes with --video"), (["--video", "x", "--on", "y"], "has its own data")):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([clip, *words])
        assert text in capsys.readouterr().err


def test_broken_clips_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents(tmp_path / "videos", "files")
    path = tmp_path / "videos" / "run" / "1.mp4"
    path.write_bytes(path.read_bytes()[:700])
    words = ["data", "verify", str(tmp_path / "videos"), "data.video={}", "--out", str(tmp_path / "bad.json"), "--processes", "1"]
    assert main(words) == 0
    assert "6 images, 1 broken" in capsys.readouterr().out
    assert "1.mp4" in json.dumps(json.loads((tmp_path / "bad.json").read_text()))
