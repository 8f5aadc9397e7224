"""Captions beside images, in shards and in files: what is read, what is drawn, what is refused."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from eva_mim.core.contracts import Sample, Source
from eva_mim.core.errors import UserError
from eva_mim.core.settings import parse
from eva_mim.data import DataSettings
from eva_mim.data.class_lists import spoken
from eva_mim.data.loader import EvalLoader, TrainLoader
from eva_mim.data.preparation import ImageTextPreparation, MaskedPreparation
from eva_mim.data.prompts import prompt_templates
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.sources.captions import CaptionFile
from eva_mim.data.sources.shards import open_shards
from eva_mim.data.splits import open_splits
from eva_mim.data.view_settings import ViewSettings
from eva_mim.data.views import EvalView, TrainView
from tests.conftest import make_folder, make_shards, picture, png, write_tar
from tests.data.test_loader import tokenize
from tests.data.test_sources import folder, shards


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def captions(source: Source) -> list[tuple[str, ...]]:
    return [source.read(index).captions for index in range(len(source))]


BESIDE = {
    "0.txt": b" one\nline more ", "1.json": b'{"captions": ["a", " b "]}', "2.json": b'{"caption": "c"}', "2.txt": b"not this",
    "3.json": b'{"caption": null, "width": 3}', "3.txt": b"d", "5.txt": b" \n",
}
EXPECTED = [("one\nline more",), ("a", "b"), ("c",), ("d",), (), ("",)]


def test_captions_beside_an_image_and_in_its_record(tmp_path: Path) -> None:
    """JSON before text; a JSON file about other things says nothing; an empty text is an empty caption."""
    (tmp_path / "f").mkdir()
    files = {f"{number}.png": png(picture(number)) for number in range(6)} | BESIDE
    for name, content in files.items():
        (tmp_path / "f" / name).write_bytes(content)
    write_tar(tmp_path / "s" / "x.tar", sorted(files.items()))
    assert captions(folder(tmp_path / "f")) == EXPECTED
    assert captions(shards(tmp_path / "s")) == EXPECTED
    by_line = [("one", "line more"), *EXPECTED[1:]]
    assert captions(folder(tmp_path / "f", caption_lines=True)) == by_line
    assert captions(shards(tmp_path / "s", caption_lines=True)) == by_line


def test_a_text_that_comes_later_is_seen(tmp_path: Path) -> None:
    """The index knows which folders have captions at all."""
    make_folder(tmp_path, {"a": 2, "b": 1})
    assert captions(folder(tmp_path)) == [(), (), ()]
    (tmp_path / "a" / "00001.txt").write_text("one")
    assert captions(folder(tmp_path)) == [(), ("one",), ()]
    (tmp_path / "b" / "00000.json").write_text('{"caption": "two"}')
    assert captions(folder(tmp_path)) == [(), ("one",), ("two",)]


@pytest.mark.parametrize("content", [b"{", b'["a"]', b'{"captions": [1]}', b'{"caption": 3}'])
def test_broken_json_breaks_its_record_alone(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "x.tar", [("a.png", png(picture(0))), ("a.json", content), ("b.png", png(picture(1)))])
    source = shards(tmp_path)
    with pytest.raises(ValueError, match=r"."):
        source.read(0)
    assert source.read(1).captions == ()


def test_a_caption_file_goes_by_key_and_before_the_records_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any order, with blank lines; keys of no record are counted and named."""
    make_shards(tmp_path, "a-0.tar", count=2)
    make_shards(tmp_path, "a-1.tar", count=2, first=2)
    rows = [{"key": f"{n:05d}", "captions": [f"{n} é", f" {n}!"]} for n in (3, 9, 1, 0)]
    path = write_lines(tmp_path / "c.jsonl", *rows, {"key": "00002", "caption": "two", "licence": "x"})
    path.write_text(path.read_text().replace("\n", "\n\n", 2))
    source = shards(tmp_path, captions="c.jsonl")
    assert captions(source) == [("0 é", "0!"), ("1 é", "1!"), ("two",), ("3 é", "3!")]
    assert "c.jsonl: 1 of 5 keys are none of the 4 records of" in capsys.readouterr().err


def test_a_folders_keys_are_paths_without_suffix(tmp_path: Path) -> None:
    make_folder(tmp_path / "f", {"ant": 1, "bee": 1})
    write_lines(tmp_path / "f.jsonl", {"key": "bee/00000", "caption": "b"}, {"key": "ant/00000", "caption": "a"})
    assert captions(folder(tmp_path, train="f", captions="f.jsonl")) == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"key": "00000", "caption": "a"}], r"no captions for 5 of the 6 records of .*: 00001, 00002, 00003, 00004, 00005"),
        ([{"key": "00000", "captions": []}], r"c\.jsonl:1: no captions for key 00000"),
        ([{"key": "a", "caption": "a"}, {"key": "b", "captions": ["x", " "]}], r"c\.jsonl:2: an empty caption for key b"),
        ([{"key": "a", "caption": "a"}, {"key": "a", "caption": "b"}], r"c\.jsonl:2: key a stands on an earlier line"),
        ([{"caption": "a"}], r'c\.jsonl:1: no "key"'),
        ([{"key": 3, "caption": "a"}], r"c\.jsonl:1: the key must be a text, not 3"),
        ([{"key": "a", "captions": ["a", 3]}], r"c\.jsonl:1: .*must be a text, found int"),
        ([["a"]], r"c\.jsonl:1: not a line of captions"),
    ],
)
def test_mistakes_of_a_caption_file_are_found_at_the_start(tmp_path: Path, rows: list[object], message: str) -> None:
    make_shards(tmp_path)
    write_lines(tmp_path / "c.jsonl", *rows)
    with pytest.raises(UserError, match=message):
        shards(tmp_path, captions="c.jsonl")


def test_missing_files_and_ambiguous_keys_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, "a.tar")
    make_shards(tmp_path, "b.tar")
    with pytest.raises(UserError, match=r"data\.captions: .*c\.jsonl does not exist"):
        shards(tmp_path, captions="c.jsonl")
    write_lines(tmp_path / "c.jsonl", *({"key": f"{n:05d}", "caption": "x"} for n in range(6)))
    with pytest.raises(UserError, match=r"6 keys stand for several records .* such as 00000"):
        shards(tmp_path, captions="c.jsonl")
    with pytest.raises(UserError, match=r"data\.val_captions: .*v\.jsonl does not exist"):
        shards(tmp_path, "val", captions="c.jsonl", val="b.tar", val_captions="v.jsonl")
    with pytest.raises(UserError, match=r"data\.val_captions=v\.jsonl needs data\.val"):
        parse(DataSettings, {"source": "shards", "root": tmp_path, "val_captions": "v.jsonl"}, "recipe")


def test_the_places_of_the_lines_are_made_once_and_again_when_anything_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(split: str = "train") -> list[tuple[str, ...]]:
        return captions(shards(tmp_path, split, train="a.tar", val="b.tar", captions="c.jsonl"))

    def made() -> int:
        return capsys.readouterr().err.count(f"indexed {path}, for ")

    make_shards(tmp_path, "a.tar", count=2)
    make_shards(tmp_path, "b.tar", count=2, first=2)
    path = write_lines(tmp_path / "c.jsonl", *({"key": f"{n:05d}", "caption": f"say {n}"} for n in (3, 1, 0, 2)))
    assert (opened(), opened("val")) == ([("say 0",), ("say 1",)], [("say 2",), ("say 3",)])
    assert made() == 2
    source = shards(tmp_path, train="a.tar", captions="c.jsonl")
    assert made() == 0
    sent = pickle.dumps(source.captions)  # type: ignore[attr-defined]
    assert len(sent) < 1000
    assert pickle.loads(sent)[1] == ("say 1",)
    write_lines(path, *({"key": f"{n:05d}", "caption": f"told {n}"} for n in range(4)))
    with pytest.raises(UserError, match=r"c\.jsonl: has changed since this run opened it"):
        source.read(0)
    assert opened() == [("told 0",), ("told 1",)]
    assert made() == 1
    stat = (tmp_path / "a.tar").stat()
    make_shards(tmp_path, "a.tar", count=2, first=2)  # other keys, as many bytes
    assert (tmp_path / "a.tar").stat().st_size == stat.st_size
    assert opened() == [("told 2",), ("told 3",)]
    assert made() == 1


def test_places_are_those_that_a_dictionary_finds(tmp_path: Path) -> None:
    """Of 3,000 keys of many kinds in another order, among 500 strangers."""
    generator = np.random.default_rng(0)
    keys = [f"{'/' * (n % 3)}é{n}" * (1 + n % 4) for n in range(3500)]
    rows = [{"key": keys[n], "captions": [f"{n}", "x" * int(generator.integers(1, 50))]} for n in generator.permutation(3500)]
    path = write_lines(tmp_path / "c.jsonl", *rows)
    wanted = [keys[n] for n in generator.permutation(3500)[:3000]]
    found = CaptionFile(path, "data.captions", lambda: wanted, "these", "records")
    expected = {row["key"]: tuple(row["captions"]) for row in rows}
    assert [found[record] for record in range(3000)] == [expected[key] for key in wanted]


def test_flickr8k_has_five_captions_an_image_in_both_splits(shared: Path) -> None:
    root = shared / "data" / "captions"
    lines = {json.loads(line)["key"]: json.loads(line)["captions"] for line in (root / "flickr8k_test_captions.jsonl").open()}
    files = {
        "train": "flickr8k_train-*.tar", "val": "flickr8k_test-*.tar",
        "captions": "flickr8k_train_captions.jsonl", "val_captions": "flickr8k_test_captions.jsonl",
    }
    train, val = (open_shards(DataSettings(source="shards", root=root, **files), split) for split in ("train", "val"))
    assert train is not None
    assert train.captions is not None
    assert val is not None
    assert val.captions is not None
    assert (len(train), len(val)) == (6000, 1000)
    found = {key: list(val.captions[index]) for index, key in enumerate(val.keys())}
    assert found == lines
    assert Counter(map(len, found.values())) == {5: 1000}
    assert Counter(len(train.captions[index]) for index in range(6000)) == {5: 6000}
    assert list(val.read(999).captions) == lines[val.key(999).partition("/")[2]]


# ---- what a batch gets


class Told:
    """`counts[i]` captions for picture i: "i-0", "i-1", ..."""

    classes = None
    fingerprint = "told"

    def __init__(self, counts: list[int], empty: tuple[int, ...] = ()):
        self.counts, self.empty = counts, empty

    def __len__(self) -> int:
        return len(self.counts)

    def key(self, index: int) -> str:
        return str(index)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Nothing to do."""

    def unlabelled(self) -> Sequence[int]:
        return ()

    def read(self, index: int) -> Sample:
        texts = tuple(f"{index}-{number}" for number in range(self.counts[index]))
        return Sample(str(index), picture(index), None, ("", *texts[1:]) if index in self.empty else texts)


def spelled(rows: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row.tolist())).rstrip("\0") for row in rows]


def training(source: Source, seed: int, batch: int = 4) -> TrainLoader:
    made = ImageTextPreparation(TrainView(ViewSettings(), [16]), seed, tokenize)
    return TrainLoader(source, made, GlobalOrder(len(source), seed=3, global_batch=batch, micro_batch=batch), 0)


def held_out(source: Source) -> EvalLoader:
    return EvalLoader(source, ImageTextPreparation(EvalView([16]), 0, tokenize, training=False), 3, 0)


def test_training_draws_one_caption_by_seed_epoch_and_image() -> None:
    """Each of the five comes about as often; a view does not depend on how many there are."""
    drawn: Counter[str] = Counter()
    first = list(training(Told([5] * 4), 7).steps(0, 100))
    for (batch,) in first:
        assert batch.text_owner.tolist() == [0, 1, 2, 3]
        for index, text in zip(batch.index.tolist(), spelled(batch.texts), strict=True):
            assert text.startswith(f"{index}-")
            drawn[text[-1]] += 1
    assert sorted(drawn) == list("01234")
    assert all(50 < count < 115 for count in drawn.values())  # 80 expected, standard deviation 8
    for (batch,), (again,) in zip(first[60:63], training(Told([5] * 4), 7).steps(60, 63), strict=True):
        assert torch.equal(batch.texts, again.texts)  # type: ignore[arg-type]
    (alone,) = next(training(Told([1] * 4), 7).steps(0, 1))
    assert torch.equal(alone.images, first[0][0].images)
    (other,) = next(training(Told([5] * 4), 8).steps(0, 1))
    assert not torch.equal(other.texts, first[0][0].texts)  # type: ignore[arg-type]


def test_held_out_images_keep_all_captions() -> None:
    found = [(batch.index[batch.text_owner], spelled(batch.texts)) for batch in held_out(Told([2, 1, 3, 1, 4]))]  # type: ignore
    assert [index for owners, _ in found for index in owners.tolist()] == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 4]
    assert [text for _, texts in found for text in texts] == [
        "0-0", "0-1", "1-0", "2-0", "2-1", "2-2", "3-0", "4-0", "4-1", "4-2", "4-3"
    ]


def test_empty_and_missing_captions_are_broken_records() -> None:
    """Replaced and named in training, left out held out; nobody minds where no text is wanted."""
    source = Told([1, 2, 0, 1, 1, 1, 1, 1], empty=(1,))
    (batch,) = next(training(source, 7, batch=8).steps(0, 1))
    named = sorted(set(batch.broken))
    assert named[0] == "1: ValueError: an empty caption"
    assert named[1].startswith("2: ValueError: no caption (KEY.txt, KEY.json, data.captions")
    assert not {1, 2} & set(batch.index.tolist())
    assert [index for batch in held_out(source) for index in batch.index.tolist()] == [0, 3, 4, 5, 6, 7]
    with pytest.raises(UserError, match=r"none of 3 held-out images can be used; the first: 0: ValueError: no caption"):
        list(held_out(Told([0, 0, 0])))
    silent = EvalLoader(source, MaskedPreparation(EvalView([16]), 0, training=False), 8, 0)
    assert [len(batch.index) for batch in silent] == [8]


# ---- names and templates


def test_templates_are_open_clips() -> None:
    for name, known in (("openai", open_clip.OPENAI_IMAGENET_TEMPLATES), ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES)):
        assert [template.replace("{}", "hen") for template in prompt_templates(name)] == [make("hen") for make in known]
    assert prompt_templates(["a {}"]) == ("a {}",)
    with pytest.raises(UserError, match=r"data\.templates: 'opnai' is not known"):
        parse(DataSettings, {"source": "scenes", "templates": "opnai"}, "recipe")


def test_words_stand_for_the_classes(tmp_path: Path) -> None:
    make_folder(tmp_path, {"n01": 2, "n02": 2, "n03": 2})
    (tmp_path / "words.txt").write_text("tench\ngoldfish\nshark\n")
    train, val = open_splits(DataSettings(root=tmp_path, val_share=0.5, class_names="words.txt"))
    for split in (train, val):
        assert split.classes == ("tench", "goldfish", "shark")
        for index in range(len(split)):
            assert split.read(index).label == int(split.key(index)[2]) - 1
    (tmp_path / "words.txt").write_text("tench\n")
    with pytest.raises(UserError, match=r"data\.class_names: 1 names for 3 classes"):
        open_splits(DataSettings(root=tmp_path, class_names="words.txt"))
    with pytest.raises(UserError, match=r"data\.class_names: 1000 names for 3 classes"):
        open_splits(DataSettings(root=tmp_path, class_names="imagenet"))


def test_shards_without_a_class_file_take_the_words_as_theirs(tmp_path: Path) -> None:
    source = shards(make_shards(tmp_path).parent, class_names="imagenet")
    assert tuple(spoken(name) for name in source.classes or ()) == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert [source.read(index).label for index in range(6)] == [0, 1, 2, 0, 1, 2]
