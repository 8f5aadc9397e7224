"""ViTamins of any size: timm's own at their sizes, the choice of a size by parameters, and folders that strangers open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError

from eva_mim.core.errors import UserError
from eva_mim.evaluate.zeroshot import FolderClip
from eva_mim.students import ClipSettings
from eva_mim.students.clip import ClipStudent
from eva_mim.trunks import TrunkSettings
from eva_mim.trunks.create import build_trunk
from eva_mim.trunks.meta import meta_device
from eva_mim.trunks.vitamin import count, name_of
from tests.conftest import REPOSITORY
from tests.students.tiny_towers import clip_folder
from tests.tiny import environment

PUBLISHED = {"vitamin_small_224": (384, 14), "vitamin_base_224": (768, 14), "vitamin_large_224": (1024, 31),
             "vitamin_xlarge_256": (1152, 32)}  # fmt: skip


def settings(**tree: object) -> TrunkSettings:
    return TrunkSettings.model_validate({"name": "vitamin"} | tree)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_timms(name: str) -> None:
    """Names and shapes of all tensors; the largest has no positions at timm's."""
    width, depth = PUBLISHED[name]
    with meta_device():
        theirs, ours = timm.create_model(name, num_classes=0), build_trunk(settings(width=width, depth=depth), num_classes=0)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (theirs, ours)]
    assert {key: shape for key, shape in shapes[1].items() if key in shapes[0]} == shapes[0]
    assert shapes[1].keys() - shapes[0].keys() == ({"pos_embed"} if name == "vitamin_xlarge_256" else set())
    total = sum(value.numel() for value in ours.state_dict().values())
    assert count(width, depth) == pytest.approx(total, rel=0.005)


def test_the_same_numbers_as_timms() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vitamin_small_224", num_classes=0, depth=1).eval()
    ours = build_trunk(settings(width=384, depth=1), num_classes=0).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_a_size_by_parameters() -> None:
    """Those of S, B and L come back; between them the closest multiple of a head."""
    assert [name_of(None, None, count(*PUBLISHED[name])) for name in list(PUBLISHED)[:3]] == [
        "vitamin_w384_d14", "vitamin_w768_d14", "vitamin_w1024_d31"]
    assert settings(params=100e6).name == "vitamin_w832_d14"
    assert abs(count(832, 14) - 100e6) < min(abs(count(width, 14) - 100e6) for width in (768, 896))


@pytest.mark.parametrize(("tree", "said"), [
    ({}, "needs either student.width and student.depth, or student.params"),
    ({"width": 384}, "needs either student.width and student.depth"),
    ({"width": 384, "depth": 2, "params": 1e6}, "needs either"),
    ({"width": 100, "depth": 2}, r"student.width=100, student.depth=2: the width must be a multiple of 64"),
    ({"params": "100M"}, r"student.params=100M: expected numbers, such as params: 100e\+6"),
])
def test_mistakes(tree: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(**tree)


def test_a_name_that_no_heads_fit_is_refused() -> None:
    with pytest.raises(UserError, match="vitamin_w100_d2: the width must be a multiple of 64"):
        build_trunk(TrunkSettings(name="vitamin_w100_d2"))


def test_a_tower_opens_elsewhere(tmp_path: Path) -> None:
    """A CLIP model in a folder: by our own commands, which know it by its name, and by open_clip after one line."""
    torch.manual_seed(0)
    text = {"width": 16, "layers": 1, "heads": 2, "context_length": 8}
    size = {"name": "vitamin", "width": 64, "depth": 1}
    student = ClipStudent(ClipSettings.model_validate(size | {"embed_dim": 16, "text": text})).eval()
    folder = Path(clip_folder(tmp_path / "clip", student))
    code = (
        "import sys, torch\n"
        "from eva_mim.trunks.vitamin import register\n"
        "register('vitamin_w64_d1')\n"
        "import open_clip\n"
        "model = open_clip.create_model('local-dir:' + sys.argv[1]).eval()\n"
        "images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))\n"
        "torch.save(model.encode_image(images).detach(), sys.argv[2])\n"
    )
    line = [sys.executable, "-c", code, str(folder), str(tmp_path / "said.pt")]
    done = subprocess.run(line, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    clip = FolderClip(folder, precision="fp32", device=torch.device("cpu"))
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = student.model.encode_image(images)
        assert torch.allclose(clip.model.encode_image(images), wanted, atol=1e-6)
    assert torch.allclose(torch.load(tmp_path / "said.pt", weights_only=True), wanted, atol=1e-6)
