"""What we record, timm and open_clip measure on the exported folder, by a few lines of theirs in a process of its own."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from eva_mim.core.run_folder import RunFolder
from eva_mim.data.views import EvalView
from eva_mim.evaluate.accuracy import FolderClassifier
from tests.conftest import REPOSITORY, picture, png
from tests.tiny import CLASSIFY, CLIP, RUN, environment, finish, python, records, run, write_recipe

SHAPES = [(48, 30), (31, 77), (64, 64), (33, 32), (200, 45), (20, 90)]
"""Of held-out pictures: none has the size or the shape of the network's input."""
BY_TIMM = """
import json, sys, timm, torch
from pathlib import Path
from PIL import Image
root, *folders = sys.argv[1:]
found = []
for folder in folders:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = json.loads((Path(folder) / "config.json").read_text())["label_names"]
    answers = {}
    with torch.inference_mode():
        for path in sorted(Path(root).rglob("*.png")):
            scores = model(view(Image.open(path).convert("RGB"))[None])[0]
            answers["/".join(path.parts[-2:])] = [names[place] for place in scores.argsort(descending=True)[:5]]
    found.append(answers)
assert "eva_mim" not in sys.modules
print(json.dumps(found))
"""
BY_OPEN_CLIP = """
import json, open_clip, sys, torch
from pathlib import Path
from PIL import Image
import eva_mim.trunks.small  # the printed line
root, *folders = sys.argv[1:]
found = []
for folder in folders:
    model, _, view = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    names = sorted(path.name for path in Path(root).iterdir())
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    weights = open_clip.build_zero_shot_classifier(model, words, names, ["a {}".format])
    answers = {}
    with torch.inference_mode():
        for path in sorted(Path(root).rglob("*.png")):
            image = model.encode_image(view(Image.open(path).convert("RGB"))[None], normalize=True)
            answers["/".join(path.parts[-2:])] = [names[place] for place in (image @ weights)[0].argsort(descending=True)[:5]]
    found.append(answers)
print(json.dumps(found))
"""
BY_CLIP_BENCHMARK = """
import sys
sys.path.insert(0, sys.argv.pop())
import json, open_clip, torch
from clip_benchmark.metrics import zeroshot_classification
from torchvision.datasets import ImageFolder
import eva_mim.trunks.small  # the printed line
root, *folders = sys.argv[1:]
found = []
for folder in folders:
    model, _, view = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = ImageFolder(root, transform=view)
    loader = torch.utils.data.DataLoader(images, batch_size=7)
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    figures = zeroshot_classification.evaluate(model.eval(), loader, words, images.classes, ["a {c}"], "cpu", amp=False)
    found.append(100 * figures["acc1"])
print(json.dumps(found))
"""
BY_ONNXRUNTIME = """
import json, numpy, onnxruntime, sys, timm, torch
from pathlib import Path
from PIL import Image
root, folder, graph = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True)  # for its view alone
view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names = json.loads((Path(folder) / "config.json").read_text())["label_names"]
session, answers = onnxruntime.InferenceSession(graph), {}
for path in sorted(Path(root).rglob("*.png")):
    scores = session.run(["output"], {"image": view(Image.open(path).convert("RGB"))[None].numpy()})[0][0]
    answers["/".join(path.parts[-2:])] = [names[place] for place in numpy.argsort(-scores)[:5]]
assert "eva_mim" not in sys.modules
print(json.dumps([answers]))
"""
BY_TRANSFORMERS = """
import json, sys, torch
from pathlib import Path
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
root, folder = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder).eval()
view, answers = AutoImageProcessor.from_pretrained(folder), {}
with torch.inference_mode():
    for path in sorted(Path(root).rglob("*.png")):
        scores = model(**view(Image.open(path).convert("RGB"), return_tensors="pt")).logits[0]
        answers["/".join(path.parts[-2:])] = [model.config.id2label[int(place)] for place in scores.argsort(descending=True)[:5]]
assert "eva_mim" not in sys.modules
print(json.dumps([answers]))
"""
CLIP_BY_ONNXRUNTIME = """
import json, numpy, onnxruntime, open_clip, sys
from pathlib import Path
from PIL import Image
import eva_mim.trunks.small  # the printed line
root, folder, graph = sys.argv[1:]
view = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]  # for its view alone
words = open_clip.get_tokenizer(f"local-dir:{folder}")
names = sorted(path.name for path in Path(root).iterdir())
session, answers = onnxruntime.InferenceSession(graph), {}
texts = words([f"a {name}" for name in names]).numpy()
for path in sorted(Path(root).rglob("*.png")):
    inputs = {"image": view(Image.open(path).convert("RGB"))[None].numpy(), "text": texts}
    image, text = session.run(["image_features", "text_features"], inputs)
    scores = text / numpy.linalg.norm(text, axis=1, keepdims=True) @ image[0]
    answers["/".join(path.parts[-2:])] = [names[place] for place in numpy.argsort(-scores)[:5]]
print(json.dumps([answers]))
"""


def by_client(code: str, *words: str | Path) -> list[Any]:
    """What a program without a line of ours found for each folder: of each image the five best classes, or its one figure."""
    line = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def accuracy(answers: dict[str, list[str]], k: int) -> float:
    return 100 * sum(image.split("/")[0] in five[:k] for image, five in answers.items()) / len(answers)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes: 16 square pictures to train on, and 36 of all shapes that are held out."""
    root = tmp_path_factory.mktemp("data")
    for split, sizes in (("train", [(40, 40)] * 16), ("val", SHAPES * 6)):
        for number, size in enumerate(sizes):
            folder = root / split / "abc"[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            tint = Image.new("RGB", size, [(255, 0, 0), (0, 255, 0), (0, 0, 255)][number % 3])
            mixed = Image.blend(picture(1000 * (split == "val") + number, size), tint, 0.15)
            (folder / f"{number:03d}.png").write_bytes(png(mixed))
    return root


def recipe(folder: Path, data: Path, tree: dict[str, Any]) -> Path:
    return write_recipe(folder, tree | {
        "data": {"root": str(data), "train": "train", "val": "val", "workers": 0} | {
            key: value for key, value in tree["data"].items() if key == "templates"},
        "run": RUN | {"global_batch": 8, "epochs": 1, "precision": "bf16", "ema_decay": 0.9}})


@pytest.mark.slow
def test_timm_repeats_a_classifiers_figures(data: Path, tmp_path: Path) -> None:
    """Of a run in bf16 with a crop: on its weights and on their average. Its own evaluation in bf16 is beside it in the log."""
    tree = CLASSIFY | {"view": {"crop_pct": 0.8}}
    out = tmp_path / "out"
    run("classify", recipe(tmp_path, data, tree), out)
    recorded = RunFolder(out).record()["metrics"]
    weights, average = by_client(BY_TIMM, data / "val", out, out / "ema")
    assert len(weights) == len(average) == 36
    assert accuracy(weights, 1) == pytest.approx(recorded["top1"], abs=1e-9)
    assert accuracy(average, 1) == pytest.approx(recorded["ema_top1"], abs=1e-9)
    assert len({five[0] for five in weights.values()}) > 1
    (final,) = records(out, "final")
    assert all(final[name] == value for name, value in recorded.items())
    (during,) = records(out, "eval")
    assert during["loss"] != final["loss"]
    csv = tmp_path / "classes.csv"
    done = finish(python("eva_mim.cli", "evaluate", out, "--on", data / "val", "--csv", csv))
    assert f"{recorded['top1']:>8.3f}" in done.stdout
    again = finish(python("eva_mim.cli", "evaluate", out))
    assert all(line.endswith("equal") for line in again.stdout.splitlines()[1:]), again.stdout


@pytest.mark.slow
def test_open_clip_repeats_a_clip_models_figures(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("clip", recipe(tmp_path, data, CLIP), out)
    recorded = RunFolder(out).record()["metrics"]
    weights, average = by_client(BY_OPEN_CLIP, data / "val", out, out / "ema")
    assert accuracy(weights, 1) == pytest.approx(recorded["zeroshot_top1"], abs=1e-9)
    assert accuracy(average, 1) == pytest.approx(recorded["ema_zeroshot_top1"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.long
def test_transformers_and_onnxruntime_repeat_the_figures(data: Path, tmp_path: Path) -> None:
    """Of a classifier, and onnxruntime of a CLIP model, which transformers has no class for."""
    pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    trees = {"classify": CLASSIFY | {"view": {"crop_pct": 0.8}}, "clip": CLIP}
    for program, tree in trees.items():
        out, graph = tmp_path / program, tmp_path / f"{program}.onnx"
        run(program, recipe(tmp_path, data, tree), out)
        finish(python("eva_mim.cli", "convert", out, graph, "--to", "onnx"))
        recorded = RunFolder(out).record()["metrics"]
        if program == "classify":
            clients = [(BY_ONNXRUNTIME, out, graph), (BY_TRANSFORMERS, out)]
        else:
            clients = [(CLIP_BY_ONNXRUNTIME, out, graph)]
        for code, *words in clients:
            (answers,) = by_client(code, data / "val", *words)
            assert accuracy(answers, 1) == pytest.approx(recorded["top1" if program == "classify" else "zeroshot_top1"], abs=1e-9)
            assert len({five[0] for five in answers.values()}) > 1


@pytest.fixture(scope="session")
def clip_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip_benchmark in a folder of its own, with a numpy that it works with: 1.6.2 fails with 2.4."""
    folder = tmp_path_factory.mktemp("clip_benchmark")
    for words in (["--no-deps", "clip_benchmark==1.6.2"], ["scikit-learn", "numpy==2.2.6"]):
        line = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *words]
        if subprocess.run(line, capture_output=True, check=False, timeout=300).returncode:
            pytest.skip("pip could not install clip_benchmark")
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_clip_benchmark_repeats_a_clip_models_figures(data: Path, tmp_path: Path, clip_benchmark: Path) -> None:
    out = tmp_path / "out"
    run("clip", recipe(tmp_path, data, CLIP), out)
    recorded = RunFolder(out).record()["metrics"]
    weights, average = by_client(BY_CLIP_BENCHMARK, data / "val", out, out / "ema", clip_benchmark)
    assert weights == pytest.approx(recorded["zeroshot_top1"], abs=1e-4)
    assert average == pytest.approx(recorded["ema_zeroshot_top1"], abs=1e-4)


# ---- a network of others


def photographs(shared: Path, count: int) -> list[tuple[str, int, bytes]]:
    """(key, class, file) of the first ImageNet photographs."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shared / "data" / "imagenet_samples" / "imagenet_samples-000000.tar") as archive:
        for member in archive:
            key, _, kind = member.name.partition(".")
            file = archive.extractfile(member)
            if file is not None and kind in ("jpg", "cls"):
                found.setdefault(key, {})[kind] = file.read()
            if len(found) > count:
                break
    return [(key, int(one["cls"]), one["jpg"]) for key, one in list(found.items())[:count]]


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted folder of an EfficientNet that nobody here trained."""
    shared = Path(os.environ.get("EVA_MIM_SHARED", REPOSITORY.parent / "shared"))
    source = shared / "models" / "tf_efficientnet_lite0.safetensors"
    if not source.is_file():
        pytest.skip(f"no {source}")
    folder = tmp_path_factory.mktemp("lite")
    finish(python("eva_mim.cli", "convert", source, folder / "hf", "--to", "hf", "--architecture", "tf_efficientnet_lite0"))
    return folder / "hf"


def test_a_converted_network_keeps_timms_view(lite: Path, shared: Path) -> None:
    """crop_pct 0.875, not 1: 85.7 instead of 87.3 % of the photographs."""
    written = json.loads((lite / "config.json").read_text())["pretrained_cfg"]
    cfg = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    assert (written["crop_pct"], written["interpolation"]) == (cfg.crop_pct, cfg.interpolation) == (0.875, "bicubic")


@pytest.mark.long
def test_figures_of_a_network_of_others(lite: Path, shared: Path, tmp_path: Path) -> None:
    """On 1,000 photographs: lines of timm, transformers and onnxruntime answer as ours, and as many are right as its README
    says."""
    transformers, onnxruntime = pytest.importorskip("transformers"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = shared / "models" / "tf_efficientnet_lite0.safetensors"
    words = ["--to", "onnx", "--architecture", "tf_efficientnet_lite0"]
    finish(python("eva_mim.cli", "convert", source, tmp_path / "net.onnx", *words))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    hub = transformers.AutoModelForImageClassification.from_pretrained(lite).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(lite)
    names = [str(number) for number in range(1000)]
    model = FolderClassifier(lite, "imagenet-1k")
    theirs = timm.create_model(f"local-dir:{lite}", pretrained=True).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    view = EvalView([model.image_size], **model.resizing)
    right = 0
    for _, label, content in photographs(shared, 1000):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        with torch.inference_mode():
            ours = int(model.eval()(view(image, random.Random(0))[model.image_size][None]).argmax())
            pixels = transform(image)[None]
            others = [theirs(pixels), hub(**processor(image, return_tensors="pt")).logits,
                      session.run(["output"], {"image": pixels.numpy()})[0]]
        assert [int(scores.argmax()) for scores in others] == [ours] * 3
        right += ours == label
        folder = tmp_path / "v2" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{label}.jpg").write_bytes(content)
    assert right > 865
    done = finish(python("eva_mim.cli", "evaluate", lite, "--on", f"v2={tmp_path / 'v2'}", "--classes", "imagenet-1k"))
    assert f"{right / 10:>8.3f}" in done.stdout
