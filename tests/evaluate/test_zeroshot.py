"""`eva-mim evaluate CLIP --on`: a CLIP model as a classifier, against open_clip's own prompts and a loop over images."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from eva_mim.commands import evaluate as reevaluate
from eva_mim.core.errors import UserError
from eva_mim.data.class_lists import class_id, layout_of
from eva_mim.data.prompts import imagenet_names
from eva_mim.data.views import to_tensor
from eva_mim.evaluate.zeroshot import ZeroShot, named_classes
from eva_mim.trunks.pixels import normalise
from tests.conftest import make_folder
from tests.evaluate.test_accuracy import rows
from tests.students.tiny_towers import random_clip
from tests.tiny import finish, python

CLASSES = ("ant", "bee", "n01440764 tench", "dog", "eel", "sea fox", "gnu")
TEMPLATES = ("a {}.", "the {} again", "no {} here, no {}")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A CLIP model with random weights in a folder as a stage leaves it."""
    return random_clip(tmp_path / "stage")


def reference(stage: Path, folder: Path) -> tuple[int, int, int]:
    """(images, right, right among five), image by image, with open_clip's own class features."""
    model = open_clip.create_model(f"local-dir:{stage}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{stage}")
    words = ("ant", "bee", "tench", "dog", "eel", "sea fox", "gnu")
    made = [lambda name, t=template: t.replace("{}", name) for template in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, words, made, num_classes_per_batch=3, device="cpu")
    images = right = five = 0
    config = open_clip.get_model_preprocess_cfg(model)
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / class_id(name)).iterdir()):
            pixels = normalise(to_tensor(Image.open(path))[None], tuple(config["mean"]), tuple(config["std"]))
            with torch.no_grad():
                order = (model.encode_image(pixels, normalize=True) @ weights)[0].argsort(descending=True).tolist()
            images, right, five = images + 1, right + (order[0] == label), five + (label in order[:5])
    return images, right, five


def test_zero_shot_against_open_clips_own(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_folder(tmp_path / "data", {class_id(name): 3 + number for number, name in enumerate(CLASSES)}, (32, 32))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    line = [str(stage), "--on", f"val={data}", "--classes", str(tmp_path / "classes.txt"), "--workers", "0",
            "--templates", str(tmp_path / "templates.txt")]
    assert reevaluate.main(line) == 0
    images, right, five = reference(stage, data)
    assert rows(capsys.readouterr().out)["val"] == [str(images), f"{100 * right / images:.3f}", f"{100 * five / images:.3f}", "7"]
    assert 0 < right < five < images
    two = finish(python("eva_mim.cli", "evaluate", *line, processes=2))
    assert rows(two.stdout)["val"][:3] == [str(images), f"{100 * right / images:.3f}", f"{100 * five / images:.3f}"], two.stderr


def test_the_class_folders_are_the_classes(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a data set that is none of ImageNet's, without --classes: the same figures as with a list of them."""
    names = ("ant", "bee", "cow", "dog", "eel", "sea fox")
    data = make_folder(tmp_path / "data", dict.fromkeys(names, 4), (32, 32))
    (tmp_path / "classes.txt").write_text("\n".join(names))
    line = [str(stage), "--on", str(data), "--workers", "0", "--templates", "simple"]
    assert reevaluate.main(line) == 0
    own = capsys.readouterr()
    assert f"the classes are the 6 folders of {data}: ant, bee, cow and 3 more; name others with --classes" in own.err
    assert reevaluate.main([*line, "--classes", str(tmp_path / "classes.txt")]) == 0
    assert rows(capsys.readouterr().out) == rows(own.out)


def test_the_outputs_are_cosines(stage: Path, tmp_path: Path) -> None:
    """A class of one prompt: open_clip's own unit features of image and text, multiplied."""
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    (tmp_path / "templates.txt").write_text("a {}.")
    model = ZeroShot(stage, classes=str(tmp_path / "classes.txt"), templates=str(tmp_path / "templates.txt"), precision=None,
                     device=torch.device("cpu"))  # fmt: skip
    clip, tokenizer = open_clip.create_model(f"local-dir:{stage}").eval(), open_clip.get_tokenizer(f"local-dir:{stage}")
    config = open_clip.get_model_preprocess_cfg(clip)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = clip.encode_image(normalise(pixels, tuple(config["mean"]), tuple(config["std"])))
        text = clip.encode_text(tokenizer(["a ant.", "a gnu."]))
        wanted = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
        torch.testing.assert_close(model(pixels)[:, [0, 6]], wanted, atol=1e-5, rtol=0)


def test_names_are_imagenets_in_its_order() -> None:
    names = imagenet_names()
    assert layout_of(names) == "imagenet-1k"
    assert (names[0], names[134], names[517]) == ("n01440764 tench", "n02012849 crane bird", "n03126707 construction crane")
    assert named_classes(None) == names


def test_what_cannot_be_prompted_is_refused(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--classes imagenet-1k: 1000 classes have a synset id and no name: n01440764"):
        named_classes("imagenet-1k")
    line = [str(stage), "--on", f"val={tmp_path}", "--templates", str(tmp_path / "none.txt")]
    assert reevaluate.main(line) == 2
    assert "--templates: " in capsys.readouterr().err
    (stage / "open_clip_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="open_clip cannot open it"):
        ZeroShot(stage, classes=None, templates="simple", precision="fp32", device=torch.device("cpu"))
