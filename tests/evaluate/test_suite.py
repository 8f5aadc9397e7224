"""`eva-mim evaluate CLIP --suite`: metrics against scikit-learn, sets against loops over open_clip's model, and mistakes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, jaccard_score, top_k_accuracy_score

from eva_mim.commands import evaluate as reevaluate
from eva_mim.commands.suite import means, read_suite, table
from eva_mim.core.errors import UserError
from eva_mim.evaluate.suite import metrics
from eva_mim.evaluate.suite.measure import prompted
from tests.conftest import REPOSITORY, picture, png, write_tar
from tests.students.tiny_towers import random_clip
from tests.tiny import command, finish, python, started

CLASSES = ("ant", "bee", "tench", "sea fox", "eel", "gnu")
TEMPLATES = ("a {c}.", "the {c} again", "nothing")
CAPTION = "picture {} of {}"
CLIENT = ["clip-benchmark==1.6.2", "webdataset", "braceexpand", "pycocoevalcap", "pycocotools", "ftfy", "wcwidth", "requests",
          "urllib3", "idna", "certifi", "charset-normalizer", "pandas", "python-dateutil", "pytz", "tzdata", "six",
          "numpy==2.2.6"]
"""With what it imports beside our own environment, and a numpy whose arrays of one number are still numbers."""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP model with random weights in a folder as a stage leaves it."""
    return random_clip(tmp_path / "stage")


def npy(*values: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, np.int64))
    return file.getvalue()


def wds(folder: Path, records: Iterable[tuple[str, bytes]], split: str = "test", *, classes: bool = True) -> Path:
    """A set in DataComp's layout, in one shard."""
    write_tar(folder / split / "0.tar", records)
    (folder / split / "nshards.txt").write_text("1")
    if classes:
        (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def labelled(first: int, count: int, groups: int = 0) -> list[tuple[str, bytes]]:
    """Pictures with labels; with `groups` a number in KEY.npy, behind another one."""
    found = []
    for seed in range(first, first + count):
        found += [(f"{seed:04d}.png", png(picture(seed, (32, 32)))), (f"{seed:04d}.cls", str(label_of(seed)).encode())]
        if groups:
            found.append((f"{seed:04d}.npy", npy(7, seed % groups)))
    return found


def label_of(seed: int) -> int:
    """Class 5 has no image."""
    return seed * seed % 5


def model_of(folder: Path) -> tuple[Any, Callable[[Image.Image], torch.Tensor], Any]:
    """open_clip's model, its own preparation of an image, and its tokenizer."""
    name = f"local-dir:{folder}"
    model, _, prepare = open_clip.create_model_and_transforms(name)
    return model.eval(), prepare, open_clip.get_tokenizer(name)


@torch.no_grad()
def scores(folder: Path, seeds: Iterable[int], texts: list[list[str]]) -> np.ndarray[Any, Any]:
    """[I, K] cosines of pictures with the mean embeddings of texts, image by image and text by text."""
    model, prepare, tokenizer = model_of(folder)
    unit = torch.nn.functional.normalize
    images = [unit(model.encode_image(prepare(picture(seed, (32, 32)))[None])) for seed in seeds]
    rows = [unit(unit(model.encode_text(tokenizer(each)), dim=-1).mean(0), dim=0) for each in texts]
    return (torch.cat(images) @ torch.stack(rows).T).numpy()


def class_texts() -> list[list[str]]:
    return [[template.replace("{c}", name) for template in TEMPLATES] for name in CLASSES]


def suite_file(folder: Path, *sets: str) -> Path:
    path = folder / "small.yaml"
    path.write_text("sets:\n" + "".join(f"  - {{{one}}}\n" for one in sets))
    return path


def test_metrics_against_scikit_learn() -> None:
    """On made-up answers, with classes that have no image and classes that nobody says."""
    random = np.random.default_rng(0)
    for classes, images in ((3, 40), (12, 200), (50, 90)):
        labels, said = random.integers(1, classes, images), random.integers(0, classes, images)
        said[: images // 2] = labels[: images // 2]
        there, answers = torch.from_numpy(labels), torch.from_numpy(said)
        assert metrics.mean_per_class(there, answers) == pytest.approx(100 * balanced_accuracy_score(labels, said), abs=1e-10)
        f1 = f1_score(labels, said, average="macro", labels=np.unique(labels))
        assert metrics.macro_f1(there, answers) == pytest.approx(100 * f1, abs=1e-10)
        assert metrics.top1(there, answers) == pytest.approx(100 * (labels == said).mean(), abs=1e-10)
        groups, right = random.integers(3, 7, images) * 10, labels == said
        worst = min(right[groups == group].mean() for group in np.unique(groups))
        assert metrics.worst_group(torch.from_numpy(right), torch.from_numpy(groups).double()) == pytest.approx(100 * worst)
    logits = random.normal(size=(80, 12))
    labels = random.integers(0, 12, 80)
    five = torch.from_numpy(logits).topk(5, dim=1).indices
    wanted = top_k_accuracy_score(labels, logits, k=5, labels=range(12))
    assert metrics.top5(torch.from_numpy(labels), five) == pytest.approx(100 * wanted, abs=1e-10)
    for _ in range(20):
        values, correct = random.normal(size=10), random.permutation(10) < 4
        chosen = values >= np.sort(values)[-4]
        found = metrics.jaccard(torch.from_numpy(values), torch.from_numpy(correct))
        assert found == pytest.approx(100 * jaccard_score(correct, chosen), abs=1e-10)


def test_every_kind_of_set_against_a_loop(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes with labels, groups and training images, retrieval, and WinoGAViL's problems; twice, and on two processes."""
    data = tmp_path / "data"
    wds(data / "wds_vtab-first_test", labelled(0, 60))
    wds(data / "wds_vtab-first_test", labelled(100, 50), "train")
    wds(data / "wds_second", labelled(200, 48, groups=3))
    texts = [[CAPTION.format(seed % 7, number) for number in range(2)] for seed in range(300, 320)]
    wds(data / "wds_pairs_test", [member for seed, lines in zip(range(300, 320), texts, strict=True) for member in (
        (f"{seed}.png", png(picture(seed, (32, 32)))), (f"{seed}.txt", "\n".join(f"{line} {seed}" for line in lines).encode()))],
        classes=False)
    (data / "winogavil" / "winogavil_images").mkdir(parents=True)
    for seed in range(400, 412):
        (data / "winogavil" / "winogavil_images" / f"im{seed}.png").write_bytes(png(picture(seed, (32, 32))))
    problems = [("Ant", range(400, 410), (400, 407, 409)), ("bee", range(402, 412), (403, 405)), ("gnu", range(400, 405), (401,))]
    (data / "winogavil" / "winogavil_dataset.csv").write_text("cue,candidates,associations\n" + "".join(
        f'{cue},"{quoted(some)}","{quoted(right)}"\n' for cue, some, right in problems))
    path = suite_file(
        tmp_path, "name: First, task: vtab/first, images: 60, metric: macro_f1, group: VTAB",
        "name: Second, task: fairness/second, images: 50, metric: worst_group_top1, column: 1",
        "name: Five, task: second, images: 48, metric: worst_group_top5, column: 1",
        "name: Pairs, task: retrieval/pairs, images: 20, metric: mean_r1, group: retrieval",
        "name: Wino, task: misc/winogavil, images: 3, metric: jaccard, folders: [winogavil]",
        "name: Nowhere, task: nowhere, images: 1, group: ImageNet",
    )
    line = [str(clip), "--suite", str(path), "--data", str(data), "--probe", "--workers", "0", "--batch", "16"]
    assert reevaluate.main(line) == 0
    said = capsys.readouterr()
    assert "1 of 6 sets are not in" in said.err
    assert "no probe for want of training images (train/0.tar, ...): Second, Five" in said.err
    assert "First: 1 of 3 templates have no \"{c}\" for the class, and are used as they are: 'nothing'" in said.err
    found = json.loads((clip / "small.json").read_text())
    sets = found["sets"]

    first = scores(clip, range(60), class_texts())
    labels, best = np.array([label_of(seed) for seed in range(60)]), first.argmax(1)
    assert len(set(best.tolist())) > 1
    assert sets["First"]["top1"] == pytest.approx(100 * (labels == best).mean())
    assert sets["First"]["mean_per_class"] == pytest.approx(100 * balanced_accuracy_score(labels, best))
    assert sets["First"]["macro_f1"] == pytest.approx(
        100 * f1_score(labels, best, average="macro", labels=np.unique(labels)))
    assert sets["First"]["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, first, k=5, labels=range(6)))
    assert sets["First"]["probe_top1"] > sets["First"]["top1"] / 2 > 0

    second, labels = scores(clip, range(200, 248), class_texts()), np.array([label_of(seed) for seed in range(200, 248)])
    groups = np.arange(200, 248) % 3
    for name, k in (("Second", 1), ("Five", 5)):
        right = (np.argsort(-second, 1)[:, :k] == labels[:, None]).any(1)
        worst = min(right[groups == group].mean() for group in range(3))
        assert sets[name][f"worst_group_top{k}"] == pytest.approx(100 * worst)

    lines = [f"{line} {seed}" for seed, some in zip(range(300, 320), texts, strict=True) for line in some]
    pairs, owner = scores(clip, range(300, 320), [[line] for line in lines]), np.repeat(np.arange(20), 2)
    assert sets["Pairs"]["image_to_text_r1"] == pytest.approx(100 * (owner[pairs.argmax(1)] == np.arange(20)).mean())
    assert sets["Pairs"]["text_to_image_r1"] == pytest.approx(100 * (pairs.argmax(0) == owner).mean())
    top = np.argsort(-pairs, 1)[:, :5]
    assert sets["Pairs"]["image_to_text_r5"] == pytest.approx(100 * (owner[top] == np.arange(20)[:, None]).any(1).mean())

    of_problem = []
    for cue, some, right in problems:
        near = scores(clip, some, [[prompted(cue)]])[:, 0]
        chosen = {list(some)[place] for place in np.argsort(near)[-len(right):]}
        of_problem.append(100 * len(chosen & set(right)) / len(chosen | set(right)))
    assert sets["Wino"]["jaccard"] == pytest.approx(np.mean(of_problem[:2]))
    assert sets["Wino"]["jaccard_all"] == pytest.approx(np.mean(of_problem))
    assert found["means"]["average"] == {"value": None, "sets": "5 of 6"}
    assert found["means"]["VTAB"]["value"] == sets["First"]["macro_f1"]
    assert (clip / "small.md").read_text().startswith("| set | images | metric | image_to_text_r1 |")

    shutil.rmtree(data / "wds_pairs_test" / "test")  # embeddings are kept, but a set that is not there is not measured
    shutil.rmtree(data / "wds_pairs_test")
    two = finish(python("eva_mim.cli", "evaluate", *line, "--to", str(tmp_path / "two.json"), processes=2))
    again = json.loads((tmp_path / "two.json").read_text())["sets"]
    assert again == {name: figures for name, figures in sets.items() if name != "Pairs"}, two.stderr
    assert "Second                         48* worst_group_top1 " in two.stdout
    assert "* other numbers of images than the suite has: Second 48, not 50\n" in two.stdout


def quoted(seeds: Iterable[int]) -> str:
    return "[" + ", ".join(f'""im{seed}""' for seed in seeds) + "]"


def test_means_of_the_published_suite() -> None:
    """38 sets, each with 50 %, ImageNet with 60: the groups of DataComp's aggregate_scores.py and its average."""
    known = read_suite("datacomp38")
    assert len(known.sets) == 38
    found = {one.name: {one.metric: 60.0 if one.name == "ImageNet 1k" else 50.0, "images": 1.0} for one in known.sets}
    rows = {name: (value, remark) for name, value, remark in means(known, found)}
    assert rows["ImageNet"] == (60.0, "of 1")
    assert (rows["ImageNet shifts"][1], rows["VTAB"][1], rows["retrieval"][1]) == ("of 6", "of 13", "of 3")
    assert rows["average"] == (pytest.approx(50 + 10 / 38), "of 38")
    assert rows["robustness gap"] == (pytest.approx(10 / 38 - 10), "mean of 38 sets - ImageNet")
    del found["MNIST"]
    rows = {name: (value, remark) for name, value, remark in means(known, found)}
    assert rows["average"] == (None, "37 of 38")
    assert max(map(len, table(known, found).splitlines())) <= 80


@pytest.mark.long
def test_clip_benchmark_measures_the_same(shared: Path, tmp_path: Path) -> None:
    """clip-benchmark 1.6.2, in an environment of its own, on real images and captions, with a CLIP model that has learned a
    little: equal to the last digit."""
    theirs = tmp_path / "theirs"
    installed = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(theirs), *CLIENT],
                               capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"clip-benchmark cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    stage, cifar = tmp_path / "clip", shared / "data" / "cifar10"
    started(command("clip", REPOSITORY / "configs" / "clip" / "cifar10_teacher.yaml", stage, f"data.root={cifar}", "run.epochs=1",
                    "data.limit=5000", "run.global_batch=100"))
    data = tmp_path / "data"
    names = (cifar / "classes.txt").read_text()
    photos = taken(cifar / "test-000000.tar.gz", 1000)
    for name in ("wds_cifar10_test", "wds_vtab-pets_test"):
        wds(data / name, photos, classes=False)
        (data / name / "classnames.txt").write_text(names)
        (data / name / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na blurry photo of the {c}.\n")
    captions = {row["key"]: row["captions"] for row in map(
        json.loads, (shared / "data" / "captions" / "flickr8k_test_captions.jsonl").read_text().splitlines())}
    pairs = [(name, "\n".join(captions[name[:-4]]).encode() if name.endswith(".txt") else content)
             for name, content in taken(shared / "data" / "captions" / "flickr8k_test-000000.tar", 600)]
    flickr = wds(data / "wds_flickr30k", pairs, classes=False)
    (flickr / "dataset_type.txt").write_text("retrieval")
    started(python("eva_mim.cli", "evaluate", stage, "--suite", "datacomp38", "--data", data, "--to", tmp_path / "ours.json"))
    ours = json.loads((tmp_path / "ours.json").read_text())["sets"]
    for name, folder, figures in (
        ("CIFAR-10", "wds_cifar10_test", {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}),
        ("Oxford-IIIT Pet", "wds_vtab-pets_test", {"mean_per_class": "mean_per_class_recall"}),
        ("Flickr", "wds_flickr30k", {f"{mine}_r{k}": f"{other}_retrieval_recall@{k}" for k in (1, 5, 10)
                                     for mine, other in (("text_to_image", "image"), ("image_to_text", "text"))}),
    ):
        out = tmp_path / f"{folder}.json"
        task = "zeroshot_retrieval" if name == "Flickr" else "zeroshot_classification"
        started([sys.executable, "-c", "import eva_mim.trunks.small; from clip_benchmark.cli import main; main()", "eval",
                 "--dataset", f"wds/{folder}", "--dataset_root", str(data / folder), "--task", task, "--model",
                 f"local-dir:{stage}", "--pretrained", "", "--no_amp", "--recall_k", "1", "5", "10", "--num_workers", "0",
                 "--output", str(out)],
                PYTHONPATH=str(theirs))
        said = json.loads(out.read_text())["metrics"]
        for mine, other in figures.items():
            assert ours[name][mine] == pytest.approx(100 * said[other], abs=1e-5), (name, mine)  # theirs are fp32
    assert ours["CIFAR-10"]["top1"] > 15


def taken(shard: Path, images: int) -> list[tuple[str, bytes]]:
    """The first records of a shard."""
    with tarfile.open(shard) as archive:
        members = [member for _, member in zip(range(2 * images), archive, strict=False)]
        return [(member.name, archive.extractfile(member).read()) for member in members]  # type: ignore[union-attr]


def test_prompts_of_cues() -> None:
    assert (prompted("Owl"), prompted("bee"), prompted("Ice cream")) == ("An owl", "A bee", "An ice cream")


def test_mistakes_are_said_before_anything_is_computed(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    path = suite_file(tmp_path, "name: One, task: one, images: 6", "name: Two, task: two, images: 6")

    def refused(suite: Path = path) -> str:
        assert reevaluate.main([str(clip), "--suite", str(suite), "--data", str(data), "--workers", "0"]) == 2
        return capsys.readouterr().err

    assert f"none of the 2 sets is there; expected folders such as {data}/wds_one_test/test/0.tar" in refused()
    one = wds(data / "wds_one_test", labelled(0, 6))
    two = wds(data / "wds_two_test", labelled(0, 6))
    shutil.move(two / "test", two / "validation")
    assert f"Two: no shards {two}/test/0.tar, ...: the layout is that of DataComp's" in refused()
    shutil.move(two / "validation", two / "test")
    (two / "test" / "nshards.txt").write_text("3\n")
    assert "nshards.txt says 3 shards, but 1 are there" in refused()
    (two / "test" / "nshards.txt").write_text("1\n")
    (two / "zeroshot_classification_templates.txt").unlink()
    assert "Two: " in (said := refused())
    assert "zeroshot_classification_templates.txt is missing, from which the prompts are made" in said
    wds(two, [("a.png", png(picture(1))), ("a.cls", b"6")])
    assert "has 6 names, but 0.tar/a has label 6" in refused()
    wds(two, [("a.png", png(picture(1)))])
    assert "Two: 1 records of" in refused()
    wds(two, [("a.png", png(picture(1))), ("a.cls", b"0"), ("a.npy", b"no array")])
    grouped = suite_file(tmp_path, "name: Two, task: two, images: 1, metric: worst_group_top1, column: 1")
    assert "a.npy has no number at place 1" in refused(grouped)
    wds(two, [("a.png", png(picture(1))), ("a.cls", b"0")])
    assert "1 records have no group (KEY.npy), such as 0.tar/a" in refused(grouped)
    pairs = suite_file(tmp_path, "name: Two, task: two, images: 1, metric: mean_r1")
    assert "Two: 1 of 1 records have no caption (KEY.txt), such as 0.tar/a" in refused(pairs)
    wds(two, [("a.png", png(picture(1))), ("a.txt", b"one"), ("b.png", png(picture(2)))])
    assert "Two: 1 of 2 records have no caption (KEY.txt), such as 0.tar/b" in refused(pairs)
    wds(two, [("a.png", png(picture(1))), ("a.txt", b" \n")])
    assert "Two: the caption of 0.tar/a is empty" in refused(pairs)
    line = [str(clip), "--suite", str(path), "--data", str(data), "--to", str(tmp_path / "none" / "x.json")]
    assert reevaluate.main(line) == 2
    assert "x.json cannot be written: choose another place with --to" in capsys.readouterr().err
    wino = suite_file(tmp_path, "name: Two, task: two, images: 1, metric: jaccard")
    assert "unpacked from winogavil_images.zip of the data set nlphuji/winogavil" in refused(wino)
    with pytest.raises(UserError, match="needs `column`, the group's place in KEY"):
        read_suite(str(suite_file(tmp_path, "name: Two, task: two, images: 1, metric: worst_group_top1")))
    with pytest.raises(UserError, match=r"recipe configs/suites/vtab\.yaml does not exist"):
        read_suite("vtab")
    for wrong, text in ((["--probe"], "--probe goes with --suite"), (["--suite", "datacomp38"], "--suite needs the folder"),
                        (["--suite", "x", "--data", str(one), "--classes", "c"], "--suite takes classes and templates from")):
        with pytest.raises(SystemExit):
            reevaluate.main([str(clip), *wrong])
        assert text in capsys.readouterr().err
