"""Folder, shards, scenes and splits: what is read, what is refused, and what hostile archives cannot do."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.data import DataSettings
from eva_mim.data.prompts import filled
from eva_mim.data.source_settings import SceneSettings
from eva_mim.data.sources.folder import open_folder
from eva_mim.data.sources.scenes import COLOURS, open_scenes
from eva_mim.data.sources.shards import open_shards
from eva_mim.data.sources.tar_index import found, tar_index
from eva_mim.data.sources.unpack import unpack
from eva_mim.data.splits import open_splits
from eva_mim.data.subset import regroup
from tests.conftest import make_folder, make_shards, picture, png, write_tar


def folder(root: Path, split: str = "train", **more: object) -> Source:
    source = open_folder(DataSettings(source="folder", root=root, **more), split)  # type: ignore[arg-type]
    assert source is not None
    return source


def shards(root: Path, split: str = "train", **more: object) -> Source:
    source = open_shards(DataSettings(source="shards", root=root, **more), split)  # type: ignore[arg-type]
    assert source is not None
    return source


def content(source: Source) -> list[tuple[bytes, int | None, tuple[str, ...]]]:
    """Pixels, label and captions of every record."""
    return [(s.image.tobytes(), s.label, s.captions) for s in (source.read(index) for index in range(len(source)))]


# ---- folders


def test_class_folders_give_sorted_labels_and_exact_pixels(tmp_path: Path) -> None:
    make_folder(tmp_path, {"zebra": 2, "ant": 3})
    (tmp_path / "ant" / "00001.txt").write_text(" an ant \n")
    source = folder(tmp_path)
    assert source.classes == ("ant", "zebra")
    assert [source.key(i) for i in range(5)] == [f"ant/{i:05d}.png" for i in range(3)] + [f"zebra/{i:05d}.png" for i in range(2)]
    expected = [(seed, 0, ("an ant",) if seed == 3 else ()) for seed in (2, 3, 4)] + [(seed, 1, ()) for seed in (0, 1)]
    assert content(source) == [(picture(seed).tobytes(), label, caption) for seed, label, caption in expected]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    source = folder(make_folder(tmp_path, {"": 3}))
    assert source.classes is None
    assert content(source) == [(picture(seed).tobytes(), None, ()) for seed in range(3)]


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    picture(0).convert("L").save(tmp_path / "a.png")
    picture(1).convert("RGBA").save(tmp_path / "b.png")
    picture(2).save(tmp_path / "C.JPG")
    source = folder(tmp_path)
    assert [source.key(i) for i in range(3)] == ["C.JPG", "a.png", "b.png"]
    assert source.read(1).image.tobytes() == picture(0).convert("L").convert("RGB").tobytes()
    assert source.read(2).image.tobytes() == picture(1).tobytes()


def test_labels_of_the_held_out_folder_are_the_training_folders(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    make_folder(tmp_path / "val", {"c": 2})
    source = folder(tmp_path, "val", train="train", val="val")
    assert source.classes == ("a", "b", "c")
    assert [source.read(i).label for i in range(2)] == [2, 2]


def test_an_unknown_held_out_class_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 1, "b": 1})
    make_folder(tmp_path / "val", {"a": 1, "stranger": 1})
    with pytest.raises(UserError, match="stranger"):
        folder(tmp_path, "val", train="train", val="val")


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        folder(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        folder(tmp_path, train="missing")
    assert open_folder(DataSettings(source="folder", root=tmp_path), "val") is None


def test_the_fingerprint_follows_the_records(tmp_path: Path) -> None:
    before = folder(make_folder(tmp_path, {"a": 2})).fingerprint
    assert folder(tmp_path).fingerprint == before
    (tmp_path / "a" / "00000.png").rename(tmp_path / "a" / "9.png")
    assert folder(tmp_path).fingerprint != before


# ---- shards


def test_tar_and_gzip_give_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("0\tn01\tcat\n1\tn02\tdog\n2\tn03\thorse\n")
    make_shards(tmp_path / "plain", "x-000001.tar", first=4, count=2)
    make_shards(tmp_path / "plain", "x-000000.tar", count=4)
    make_shards(tmp_path / "packed", "x-000000.tar.gz", count=4)
    make_shards(tmp_path / "packed", "x-000001.tar.gz", first=4, count=2)
    expected = [(picture(seed).tobytes(), seed % 3, (f"picture {seed}",)) for seed in range(6)]
    for _ in range(2):  # the second time from the cache
        for name in ("plain", "packed"):
            source = shards(tmp_path, train=f"{name}/x-*", classes="classes.txt")
            assert content(source) == expected
            assert source.classes == ("cat", "dog", "horse")
            assert source.key(4).endswith("/00004")
            assert source.key(4).startswith("x-000001.tar")


def test_labels_need_a_class_list(tmp_path: Path) -> None:
    source = shards(make_shards(tmp_path).parent)
    assert source.classes is None
    assert {source.read(i).label for i in range(6)} == {None}


@pytest.mark.parametrize("label", [b"3", b"-1", b"cat", b"", b"1e0"])
def test_a_label_outside_the_class_list_is_found_at_the_start(tmp_path: Path, label: bytes) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\nhorse\n")
    write_tar(tmp_path / "x.tar", [("a.png", png(picture(0))), ("a.cls", b"2"), ("b.png", png(picture(1))), ("b.cls", label)])
    with pytest.raises(UserError, match=r"classes\.txt has 3 names.*x\.tar/b"):
        shards(tmp_path, classes="classes.txt")


def test_a_record_without_picture_is_broken_and_the_others_are_not(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.txt", b"no picture"), ("b.png", png(picture(1))), ("c.png", b"not a picture")])
    source = shards(tmp_path)
    with pytest.raises(ValueError, match="no image"):
        source.read(0)
    assert source.read(1).image.tobytes() == picture(1).tobytes()
    with pytest.raises(OSError, match="identify"):
        source.read(2)


def test_records_of_equal_names_in_two_folders_of_a_shard_are_two_records(tmp_path: Path) -> None:
    """WebDataset's key is the whole path before the first dot of the file name."""
    write_tar(tmp_path / "x.tar", [("a/1.png", png(picture(0))), ("b/1.png", png(picture(1)))])
    assert [pixels for pixels, _, _ in content(shards(tmp_path))] == [picture(0).tobytes(), picture(1).tobytes()]


def test_hostile_member_names_write_nothing_anywhere(tmp_path: Path, cache: Path) -> None:
    hostile = tmp_path / "deep" / "deeper"
    names = ["../../escape.png", f"{tmp_path}/absolute.png", "a/../../../b.png", "c\\d.png"]
    write_tar(hostile / "x.tar.gz", [(name, png(picture(seed))) for seed, name in enumerate(names)])
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents}
    source = shards(hostile)
    assert [pixels for pixels, _, _ in content(source)] == [picture(seed).tobytes() for seed in range(4)]
    assert {path for path in tmp_path.rglob("*") if cache not in (path, *path.parents)} == before
    assert {path.suffix for path in cache.rglob("*")} == {".tar", ".index"}
    assert all(path.parent == cache for path in cache.rglob("*"))


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(picture(9)))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(secret)
            archive.addfile(link)
        real = tarfile.TarInfo("real.png")
        real.size = len(png(picture(1)))
        archive.addfile(real, io.BytesIO(png(picture(1))))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.tar").write_bytes(buffer.getvalue())
    assert [pixels for pixels, _, _ in content(shards(tmp_path / "x"))] == [picture(1).tobytes()]


def damaged(packed: bytes, kind: str) -> bytes:
    """A gzip file as a broken download or disk leaves it."""
    if kind == "cut":
        return packed[: len(packed) * 2 // 3]
    if kind == "garbled":
        return packed[:12] + b"\xff" * 40 + packed[52:]
    if kind == "checksum":
        return packed[:-8] + b"\0" * 8
    return b"not gzip at all"


@pytest.mark.parametrize("kind", ["cut", "garbled", "checksum", "other"])
def test_a_damaged_gzip_is_refused_and_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path, kind: str) -> None:
    path = make_shards(tmp_path, "x.tar.gz")
    path.write_bytes(damaged(path.read_bytes(), kind))
    with pytest.raises(UserError, match=r"x\.tar\.gz: not a readable"):
        unpack(found(path))
    assert [(file.suffix, file.stat().st_size) for file in cache.rglob("*")] == []


def test_a_gzip_bomb_is_refused(tmp_path: Path, cache: Path) -> None:
    """32 MiB of zeros in 32 kB: no shard of pictures is packed a thousandfold."""
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(bytes(32 * 2**20)))
    with pytest.raises(UserError, match="refused"):
        unpack(found(path))
    assert [(file.suffix, file.stat().st_size) for file in cache.rglob("*")] == []


@pytest.mark.parametrize("where", ["data", "header"])
def test_a_cut_tar_is_refused(tmp_path: Path, where: str) -> None:
    """A plain tar cut within a member, or within the header of the next one."""
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", bytes(700)) for i in range(4)])  # 512 + 1024 bytes a record
    path.write_bytes(path.read_bytes()[: 2 * 1536 + (900 if where == "data" else 100)])
    with pytest.raises(UserError, match=r"x\.tar"):
        tar_index(found(path), found(path))


def test_patterns_and_archives_without_pictures_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.txt", b"a")])
    with pytest.raises(UserError, match="no images"):
        shards(tmp_path)
    with pytest.raises(UserError, match="no shard matches"):
        shards(tmp_path, train="y-*.tar")
    with pytest.raises(UserError, match="not a folder"):
        shards(tmp_path / "missing")
    with pytest.raises(UserError, match="does not exist"):
        shards(tmp_path, classes="names.txt")


def test_an_absolute_pattern_is_the_users_mistake(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with pytest.raises(UserError, match=r"data\.train"):
        shards(tmp_path, train=f"{tmp_path}/train-*.tar")


# ---- scenes


def scenes(split: str = "train", **more: object) -> Source:
    return open_scenes(DataSettings(source="scenes", scenes=SceneSettings(size=32, **more)), split)  # type: ignore[arg-type]


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    one, other = scenes(), scenes()
    for index in (5, 0, 3):
        assert one.read(index).image.tobytes() == other.read(index).image.tobytes()
        assert one.read(index)[2:] == other.read(index)[2:]
    sources = [scenes(split, seed=seed) for split in ("train", "val") for seed in (0, 1)]
    assert len({source.read(index).image.tobytes() for source in sources for index in range(20)}) == 80


SCENES = {
    ("train", 0): ("39f6552458542345", "a orange plain ring above a diamond"),
    ("train", 1): ("a9fee9750c53b9a2", "a white checked circle left of a square"),
    ("val", 0): ("1b03a9e735c0663b", "a plain cross above a ring"),
}
"""SHA-256 of the pixels (first 16 digits) and caption, frozen: a change gives other pictures to every run so far."""


def test_scenes_are_the_frozen_ones() -> None:
    found = {}
    for split, index in SCENES:
        sample = scenes(split).read(index)
        (caption,) = sample.captions
        found[split, index] = hashlib.sha256(sample.image.tobytes()).hexdigest()[:16], caption
    assert found == SCENES


def test_labels_and_captions_say_the_same() -> None:
    fine, coarse = scenes(), scenes(labels="coarse")
    assert fine.classes is not None
    assert coarse.classes is not None
    seen = set()
    for index in range(300):
        one, other = fine.read(index), coarse.read(index)
        assert one.label is not None
        assert other.label is not None
        assert one.captions == other.captions
        assert fine.classes[one.label].split()[1] == coarse.classes[other.label]
        before_relation = one.captions[0].split(" of ")[0].split(" above ")[0].split(" below ")[0]
        assert fine.classes[one.label] in before_relation
        seen.add(one.label)
    assert seen == set(range(24))


def test_the_named_relation_is_true_of_the_picture() -> None:
    """The centre of the named colour's pixels lies on the named side."""
    checked = 0
    for index in range(600):
        sample = scenes().read(index)
        words = sample.captions[0].split()
        if words[1] not in COLOURS or words[2] != "plain":
            continue
        rows, columns = np.nonzero((np.asarray(sample.image) == COLOURS[words[1]]).all(axis=-1))
        x, y = columns.mean() / 32 - 0.5, rows.mean() / 32 - 0.5
        side = {"left": -x, "right": x, "above": -y, "below": y}[words[4]]
        assert side > 0.05, words
        checked += 1
    assert checked > 40


# ---- splits


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def test_a_held_out_share_is_disjoint_complete_and_fixed(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 12, "b": 8})
    settings = DataSettings(source="folder", root=tmp_path, val_share=0.25)
    train, val = open_splits(settings)
    assert (len(train), len(val)) == (15, 5)
    assert sorted(keys(train) + keys(val)) == keys(folder(tmp_path))
    again = open_splits(settings)
    assert (keys(again.train), keys(again.val)) == (keys(train), keys(val))
    for split in (train, val):  # the records behind the keys, not only the keys
        for index, key in enumerate(keys(split)):
            expected = int(key[-9:-4]) + (12 if key.startswith("b") else 0)
            assert split.read(index).image.tobytes() == picture(expected).tobytes()


def test_limits_take_the_first_records_and_change_the_fingerprint(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 4, "b": 4})
    make_folder(tmp_path / "val", {"a": 3, "b": 3})
    settings = DataSettings(source="folder", root=tmp_path, train="train", val="val")
    whole = open_splits(settings)
    cut = open_splits(settings.model_copy(update={"limit": 3, "val_limit": 2}))
    assert keys(cut.train) == keys(whole.train)[:3]
    assert keys(cut.val) == keys(whole.val)[:2]
    assert cut.train.fingerprint != whole.train.fingerprint


def test_a_label_map_regroups_every_label(tmp_path: Path) -> None:
    make_folder(tmp_path, {"cat": 2, "dog": 2, "oak": 2})
    groups = {"plant": ["oak"], "animal": ["dog", "cat"]}
    train, val = open_splits(DataSettings(source="folder", root=tmp_path, val_share=0.5, label_map=groups))
    for split in (train, val):
        assert split.classes == ("plant", "animal")
        for index, key in enumerate(keys(split)):
            assert split.read(index).label == (0 if key.startswith("oak") else 1)


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ({"animal": ["cat", "dog", "yeti"], "plant": ["oak"]}, "yeti"),
        ({"animal": ["cat", "dog"]}, "oak"),
        ({"animal": ["cat", "dog"], "plant": ["oak", "cat"]}, "twice: .*cat"),
    ],
)
def test_a_label_map_that_does_not_cover_the_classes_once_is_refused(
    tmp_path: Path, groups: dict[str, list[str]], named: str
) -> None:
    make_folder(tmp_path, {"cat": 2, "dog": 2, "oak": 2})
    with pytest.raises(UserError, match=named):
        open_splits(DataSettings(source="folder", root=tmp_path, label_map=groups))


def test_a_label_map_needs_class_names(tmp_path: Path) -> None:
    make_folder(tmp_path, {"": 4})
    with pytest.raises(UserError, match="class names"):
        open_splits(DataSettings(source="folder", root=tmp_path, label_map={"a": ["b"]}))


def test_an_unknown_source_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean shards"):
        open_splits(DataSettings(source="shard", root=tmp_path))


# ---- held-out images from elsewhere, names of classes


def test_held_out_images_may_be_another_dataset(tmp_path: Path) -> None:
    make_folder(tmp_path / "web", {"": 4})
    make_folder(tmp_path / "test", {"val/n01": 2, "val/n02": 1})
    make_folder(tmp_path / "more", {"n01": 2, "n02": 1})
    (tmp_path / "test" / "words.txt").write_text("n01 a cat\nn02 a dog\n")
    other = {"root": tmp_path / "test" / "val"}
    train, val = open_splits(DataSettings(root=tmp_path / "web", held_out=other))
    assert (len(train), train.classes) == (4, None)  # none of them is held out
    assert (len(val), val.classes) == (3, ("n01", "n02"))
    named = {"root": tmp_path / "test", "train": "val", "class_names": "words.txt", "val_limit": 2}
    _, val = open_splits(DataSettings(root=tmp_path / "web", held_out=named))
    assert (len(val), val.classes) == (2, ("n01 a cat", "n02 a dog"))
    parts = [{"root": tmp_path / "web"}, {"root": tmp_path / "more", "val_share": 0.5}]
    train, val = open_splits(DataSettings(mixture=parts, held_out=other))
    assert (len(train), len(val)) == (7, 3)
    with pytest.raises(ValueError, match=r"data\.val=val: .*data\.held_out"):
        DataSettings(root=tmp_path, val="val", held_out=other)
    with pytest.raises(ValueError, match=r"data\.mixture\.1\.val=val: .*data\.held_out"):
        DataSettings(mixture=[*parts[:1], {"root": tmp_path, "val": "val"}], held_out=other)


def test_a_class_keeps_its_synset_id_and_captions_do_not_say_it(tmp_path: Path) -> None:
    lines = ["0\tn02012849\tcrane", "1\tn03126707\tcrane", "2\tn01440764\ttench"]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    make_shards(tmp_path)
    source = shards(tmp_path, classes="classes.txt")
    assert source.classes == ("n02012849 crane", "n03126707 crane", "n01440764 tench")
    assert [filled("a {}.", name) for name in source.classes] == ["a crane.", "a crane.", "a tench."]
    assert filled("a {}.", "n01440764") == "a n01440764."
    groups = {"fish": ["tench"], "bird": ["n02012849"], "machine": ["n03126707 crane"]}
    grouped, _ = open_splits(DataSettings(source="shards", root=tmp_path, classes="classes.txt", label_map=groups, val_share=0.4))
    assert grouped.classes == ("fish", "bird", "machine")
    assert regroup(source.classes, groups) == [1, 2, 0]
    with pytest.raises(UserError, match=r"not classes of the data: \['crane'\]"):
        regroup(source.classes, {"bird": ["crane"], "fish": ["tench"]})
