"""Readers of foreign files and of settings, fed with anything: a UserError or a counted skip; no other end, no hang, no flood of
memory."""

from __future__ import annotations

import copy
import gzip
import io
import json
import resource
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eva_mim.core.contracts import Source
from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.settings import override, parse
from eva_mim.data import DataSettings
from eva_mim.data.loader import Reader
from eva_mim.data.preparation import Item, MaskedPreparation
from eva_mim.data.sampler import Place
from eva_mim.data.source_settings import ColumnSettings
from eva_mim.data.sources.captions import record_captions
from eva_mim.data.sources.folder import open_folder
from eva_mim.data.sources.index import Content, Texts, read_index, write_index
from eva_mim.data.sources.lists import open_list
from eva_mim.data.sources.shards import open_shards
from eva_mim.data.views import EvalView
from tests.conftest import REPOSITORY, picture, png

FUZZ = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
"""Examples: 40, or 1,000 in the long tier (`--hypothesis-profile=long`, in tests/conftest.py)."""
SECONDS = 120 + FUZZ.max_examples
"""For all examples of a test; an endless loop ends here."""
MEGABYTES = 600
"""That the largest size of the process may grow by."""


@pytest.fixture(autouse=True)
def check_limits() -> Iterator[None]:
    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


# ---- what is fed


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few bytes changed, cut out, put in or doubled, or cut short."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.sampled_from([1, 2, 8, 12, 100, 512]))
        match draw(st.sampled_from(["set", "set", "set", "cut", "put", "twice", "end", "zero", "swap"])):
            case "set":
                content[start : start + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del content[start : start + length]
            case "put":
                content[start:start] = draw(st.binary(max_size=20))
            case "twice":
                content[start:start] = content[start : start + length]
            case "end":
                del content[start:]
            case "zero":
                content[start : start + length] = bytes(length)
            case "swap":
                content[start : start + length] = content[: len(content[start : start + length])]
    return bytes(content)


def fed(whole: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(mutated(whole), mutated(whole), mutated(whole), st.binary(max_size=3000))


def tar(kind: int = tarfile.USTAR_FORMAT, links: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, pax_headers={"comment": "x" * 30}) as archive:
        for number in range(3):
            stem = "é" * 80 + "/" + str(number) if kind != tarfile.USTAR_FORMAT else str(number)
            for suffix, content in (("png", png(picture(number, (8, 6)))), ("cls", b"1"), ("json", b'{"captions": ["a"]}')):
                info = tarfile.TarInfo(f"{stem}.{suffix}")
                info.size, info.mtime = len(content), 1.5 if kind == tarfile.PAX_FORMAT else 1
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


TARS = {name: tar(kind) for name, kind in
        (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT))}


# ---- how it may end


def read_all(opener: Callable[[], Source | None]) -> int:
    """Open a source and read each record as the loader does; how many could be read."""
    try:
        source = opener()
    except UserError:
        return 0
    assert source is not None
    assert 0 < len(source) < 1000
    reader = Reader(source, MaskedPreparation(EvalView([16]), 0, training=False))
    found = [reader[Place(0, index)] for index in range(len(source))]
    assert all(isinstance(item, Item) or str(item) for item in found)
    return sum(isinstance(item, Item) for item in found)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder for every example of a test to write into."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def fresh(home: Path, name: str, content: bytes) -> Path:
    """The file in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=home))
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", TARS)
def test_whole_tars_are_read(home: Path, kind: str) -> None:
    """What is fed next is, undamaged, three records."""
    for name, content in (("x.tar", TARS[kind]), ("x.tar.gz", gzip.compress(TARS[kind]))):
        folder = fresh(home, name, content)
        assert read_all(lambda folder=folder: open_shards(DataSettings(source="shards", root=folder), "train")) == 3  # type: ignore[misc]


@pytest.mark.parametrize("kind", TARS)
@FUZZ
@given(data=st.data())
def test_tars(home: Path, kind: str, data: st.DataObject) -> None:
    folder = fresh(home, "x.tar", data.draw(fed(TARS[kind])))
    (folder / "classes.txt").write_text("a\nb\nc\n")
    classes = data.draw(st.sampled_from([None, "classes.txt"]))
    read_all(lambda: open_shards(DataSettings(source="shards", root=folder, train="*.tar", classes=classes), "train"))


SPECIAL = [b"\xff" * 12, b"\x80" + (2**60).to_bytes(11, "big"), b"77777777777\0", *map(bytes, zip(b"LKSxg5")), bytes(12)]
"""Sizes: negative, huge in base 256, the largest octal number, 0; types: GNU's long names, sparse files, pax notes, a folder."""


@pytest.mark.parametrize("kind", ["ustar", "pax"])
@FUZZ
@given(data=st.data())
def test_headers_with_a_valid_checksum(home: Path, kind: str, data: st.DataObject) -> None:
    """Random damage breaks a header's checksum; here it is mended, so that what the header says is read."""
    content = bytearray(TARS[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        starts = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
        at = data.draw(st.sampled_from(starts))
        field, length = data.draw(st.sampled_from([(0, 100), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)]))
        value = data.draw(st.one_of(st.sampled_from(SPECIAL), st.binary(min_size=1, max_size=length)))[:length]
        content[at + field : at + field + len(value)] = value
        block = content[at : at + 512]
        content[at + 148 : at + 156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    folder = fresh(home, "x.tar", bytes(content))
    read_all(lambda: open_shards(DataSettings(source="shards", root=folder), "train"))


PAX_VALUES = ["-1", "-100000", "0", "1" + "0" * 30, "1e9", "nan", "", "é", "9" * 5000, "512", "1024", "GNU"]
PAX_NAMES = ["size", "path", "linkpath", "mtime", "uid", "hdrcharset", "comment", "GNU.sparse.major", "GNU.sparse.minor",
             "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.realsize", "GNU.sparse.name", "GNU.sparse.offset"]


@FUZZ
@given(notes=st.dictionaries(st.sampled_from(PAX_NAMES), st.sampled_from(PAX_VALUES), min_size=1, max_size=4), both=st.booleans())
def test_pax_notes(home: Path, notes: dict[str, str], both: bool) -> None:
    """A size below 0 sent readers back for ever (CVE-2025-8194); sparse maps tell sizes of their own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=notes if both else {}) as archive:
        for number in range(2):
            info, content = tarfile.TarInfo(f"{number}.png"), png(picture(number, (8, 6)))
            info.size, info.pax_headers = len(content), notes
            archive.addfile(info, io.BytesIO(content))
    folder = fresh(home, "x.tar", buffer.getvalue())
    read_all(lambda: open_shards(DataSettings(source="shards", root=folder), "train"))


@FUZZ
@given(content=st.one_of(fed(gzip.compress(TARS["ustar"])), mutated(TARS["ustar"]).map(gzip.compress)))
def test_gzipped_tars(home: Path, content: bytes) -> None:
    folder = fresh(home, "x.tar.gz", content)
    read_all(lambda: open_shards(DataSettings(source="shards", root=folder), "train"))


# ---- indexes


def index_bytes(home: Path) -> bytes:
    texts = Texts()
    for text in ("a", "bé", ""):
        texts.add(text)
    columns = texts.columns("name") | {"size": np.arange(3, dtype=np.int64)}
    return write_index(home / "whole.index", Content(columns, {"fingerprint": "x"})).path.read_bytes()


@FUZZ
@given(data=st.data())
def test_index_files(home: Path, data: st.DataObject) -> None:
    """Not an index, or one whose columns lie in its file; which they are, the maker of the file alone decides."""
    folder = fresh(home, "x.index", data.draw(fed(index_bytes(home))))
    index = read_index(folder / "x.index")
    for name in ("name", "name.ends", "size") if index is not None else ():
        if name in index:
            assert len(index[name].tobytes()) <= (folder / "x.index").stat().st_size


# ---- lists

DEEP = b"[" * 100_000
"""Deeper than Python's readers go."""
JSONL = b'{"image": "a.png", "label": "x", "said": ["one", "two"]}\n{"image": "b.png", "label": "y", "said": "three"}\n'
CSV = b'image,label,said\na.png,x,"one, two"\nb.png,y,three\n'


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    buffer = io.BytesIO()
    rows = [{"image": f"{name}.png", "label": "x", "said": ["one", "two"]} for name in "ab"]
    files.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


LISTS: dict[str, Callable[[], bytes]] = {
    "csv": lambda: CSV, "tsv": lambda: CSV.replace(b",", b"\t"), "jsonl": lambda: JSONL, "parquet": parquet
}


@pytest.mark.parametrize("suffix", LISTS)
@FUZZ
@given(data=st.data())
def test_lists(home: Path, suffix: str, data: st.DataObject) -> None:
    whole = LISTS[suffix]()
    special = st.sampled_from([DEEP, whole.replace(b"image", b"\x80mage"), whole.replace(b"a.png", b"a\0png")])
    folder = fresh(home, f"list.{suffix}", data.draw(st.one_of(fed(whole), special)))
    for number, name in enumerate("ab"):
        (folder / f"{name}.png").write_bytes(png(picture(number, (8, 6))))
    label, captions = (data.draw(st.sampled_from([None, name])) for name in ("label", "said"))
    columns = ColumnSettings(label=label, captions=captions)
    read_all(lambda: open_list(DataSettings(source="list", root=folder, train=f"list.{suffix}", columns=columns), "train"))


# ---- captions


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=5,
)
caption_lines = st.fixed_dictionaries(
    {}, optional={"key": st.one_of(st.sampled_from(["a", "b"]), json_values), "captions": json_values, "caption": json_values}
)


@FUZZ
@given(content=st.one_of(
    fed(b'{"key": "a", "captions": ["one", "two"]}\n{"key": "b", "caption": "three"}\n'),
    st.lists(st.one_of(caption_lines, json_values), max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.just(DEEP),
))
def test_caption_files(home: Path, content: bytes) -> None:
    folder = fresh(home, "captions.jsonl", content)
    for number, name in enumerate("ab"):
        (folder / f"{name}.png").write_bytes(png(picture(number, (8, 6))))
    read_all(lambda: open_folder(DataSettings(root=folder, captions="captions.jsonl"), "train"))


@FUZZ
@given(
    text=st.one_of(st.none(), st.binary(max_size=50)), lines=st.booleans(),
    described=st.one_of(st.none(), st.binary(max_size=50), json_values.map(json.dumps).map(str.encode), st.just(DEEP)),
)
def test_captions_beside_an_image(home: Path, text: bytes | None, described: bytes | None, lines: bool) -> None:
    """Through the source: broken ones break their record alone."""
    folder = fresh(home, "a.png", png(picture(0, (8, 6))))
    for suffix, content in ((".txt", text), (".json", described)):
        if content is not None:
            (folder / f"a{suffix}").write_bytes(content)
    readable = read_all(lambda: open_folder(DataSettings(root=folder, caption_lines=lines), "train"))
    try:
        record_captions(text, described, lines)
    except (ValueError, RecursionError):
        assert readable == 0
    else:
        assert readable == 1


# ---- settings

RECIPES = {"mim": "mim/scenes", "clip": "clip/scenes_vit", "classify": "classify/scenes_broad", "probe": "probe/scenes"}
ODD = ["data.root=x", "run.epochs=3", "run=", "data.mixture=[{}]", "a.b.c=1", "data..x=1", "=", "run.epochs=&a [*a]",
       "run.seed=1:60", "x=!!python/none", "data.captions=2020-13-45", "run.seed=1e999", "? [a]: b", "run={2020-01-01: 3}",
       "run={? [a] : 3}", "run.x=0x", "optim.lr=.inf"]


def recipe(name: str) -> bytes:
    return (REPOSITORY / "configs" / f"{RECIPES[name]}.yaml").read_bytes()


words = st.one_of(st.text(max_size=12), st.sampled_from(ODD))


@FUZZ
@given(data=st.data())
def test_recipes(home: Path, data: st.DataObject) -> None:
    """Bytes -> YAML -> overrides -> settings of a stage."""
    name = data.draw(st.sampled_from(sorted(RECIPES)))
    path = fresh(home, "r.yaml", data.draw(fed(recipe(name)))) / "r.yaml"
    changes = data.draw(st.lists(words, max_size=3))
    with suppress(UserError):
        tree = override(read_yaml(path), changes)
        parse(lookup(PROGRAMS, name, "program").recipe, tree, str(path))


@FUZZ
@given(data=st.data())
def test_values_of_any_kind_in_any_setting(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RECIPES)))
    tree: Any = copy.deepcopy(yaml.safe_load(recipe(name)))
    section = data.draw(st.sampled_from(sorted(tree)))
    value = data.draw(json_values)
    if isinstance(tree[section], dict) and data.draw(st.booleans()):
        tree[section][data.draw(st.sampled_from([*sorted(tree[section]), "other"]))] = value
    else:
        tree[section] = value
    with suppress(UserError):
        parse(lookup(PROGRAMS, name, "program").recipe, override(tree, []), "recipe")
