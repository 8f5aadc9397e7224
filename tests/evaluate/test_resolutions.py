"""The sweep over image sizes: figures against plain torch, the picture, and jumps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

import eva_mim
from eva_mim.cli import main
from eva_mim.commands.resolutions import sizes_of
from eva_mim.core.errors import UserError
from eva_mim.evaluate.resolutions import AtSize, jumps
from tests.targets.test_lessons import held_out, held_out_bytes
from tests.tiny import MIM, finish, python, run, teacher_file, write_recipe


@pytest.mark.slow
@torch.no_grad()
def test_figures_are_those_of_plain_torch(tmp_path: Path) -> None:
    network = {"kind": "timm", "name": "vit_nano_patch4_32", "image_size": 16, "weights": str(teacher_file(tmp_path))}
    tree = {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teachers": {"vit": network, "token": network | {"objective": {"kind": None, "summary": "cosine"}}},
        "objective": {"kind": "mse", "summary": "cosine"}, "normaliser": {"kind": "phi_s"}, "run": MIM["run"] | {"epochs": 1},
        "student": MIM["student"] | {"positions": "cropped", "position_grid": 8},
    }
    out = tmp_path / "run"
    run("mim", write_recipe(tmp_path, tree), out)
    done = finish(python("eva_mim.cli", "evaluate", out, "--resolution-sweep", "24..56:16", "--jump", "0.9"))
    rows = {(line.split()[0], int(line.split()[1])): line.split()[2:] for line in done.stdout.splitlines()[1:7]}
    assert {size for _, size in rows} == {24, 40, 56}
    model: Any = eva_mim.load(out)
    teacher = timm.create_model("vit_nano_patch4_32", num_classes=0, img_size=16).eval()
    teacher.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    tokens = teacher.forward_features(held_out(16))
    wanted, summary = tokens[:, 1:], teacher.forward_head(tokens)
    for size in (24, 40, 56):
        said = model(held_out_bytes(size), adaptors=["vit", "token"])
        maps = said["vit"].spatial.transpose(1, 2).unflatten(2, (size // 8, size // 8))
        patches = F.interpolate(maps, (4, 4), mode="bilinear").flatten(2).transpose(1, 2)
        cosine = F.cosine_similarity(patches, wanted, dim=-1).mean()
        error = (patches - wanted).square().sum() / (wanted - wanted.mean((0, 1))).square().sum()
        there = F.cosine_similarity(said["vit"].summary, summary, dim=-1).mean()
        assert [float(value) for value in rows["vit", size]] == pytest.approx(
            [cosine.item(), error.item(), there.item()], abs=2e-4)
        assert rows["token", size][:2] == ["-", "-"]
    with Image.open(out / "resolutions.png") as picture:
        assert picture.size == (710, 420)
        assert len(picture.convert("RGB").getcolors(100_000) or ()) > 10
    jumped = finish(python("eva_mim.cli", "evaluate", out, "--resolution-sweep", "24..56:16", "--jump", "0.0001",
                           "--to", tmp_path / "other.png"), 1)
    assert "jump of more than 0.0001: vit, patches: cosine" in jumped.stdout
    assert (tmp_path / "other.png").is_file()


def test_a_jump_is_a_change_between_neighbours() -> None:
    nothing = math.nan
    rows = [AtSize(256, 0.8, 0.3, nothing), AtSize(512, 0.75, 0.3, nothing), AtSize(768, 0.3, 1.5, nothing)]
    assert jumps({"clip": rows}, 0.1) == ["clip, patches: cosine 0.750 at 512 px, 0.300 at 768 px"]
    assert jumps({"clip": rows}, 0.5) == []
    up = [AtSize(256, nothing, nothing, 0.2), AtSize(512, nothing, nothing, 0.9)]
    assert jumps({"sam": up}, 0.5) == ["sam, summary: cosine 0.200 at 256 px, 0.900 at 512 px"]


def test_sizes_are_whole_patches() -> None:
    assert sizes_of("128..256:64", 16) == [128, 192, 256]
    assert sizes_of("128..1024", 16) == [128, 160, 208, 272, 368, 464, 608, 784, 1024]
    for text in ("128", "128..64", "0..64", "64..128:0", "a..b"):
        with pytest.raises(UserError, match="--resolution-sweep"):
            sizes_of(text, 16)


@pytest.mark.slow
def test_what_is_no_masked_stage_is_refused(tmp_path: Path) -> None:
    done = finish(python("eva_mim.cli", "evaluate", tmp_path, "--resolution-sweep", "32..64"), 2)
    assert "--resolution-sweep is for a finished masked stage (mim)" in done.stderr


@pytest.mark.parametrize("words", [["--jump", "0"], ["--images", "5"], ["--to", "x.png"]])
def test_options_of_a_sweep_without_one_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "run", *words])
    assert re.search("(--jump and --images go|--to goes) with --resolution-sweep", capsys.readouterr().err)
