"""Files that were cut or have a bit changed: exit code 2 or a correct result (`hostile.ends`).

Many places where a checkpoint is read, a few through the whole command; many through the whole command in the long tier.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eva_mim.core.errors import UserError
from eva_mim.weights.files.lazy import materialise
from eva_mim.weights.hints import read_hints
from eva_mim.weights.names.eva import from_eva
from eva_mim.weights.names.translate import read_source
from tests.convert.golden_files import same
from tests.convert.hostile import clean, ends, example, refused

KINDS = ["safetensors", "zip", "timm", "open_clip", "transformers"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_are_whole(home: Path, kind: str) -> None:
    source, options, to = example(kind, home / "source")
    code, text = ends(home, source, *options, to=to)
    assert code == 0, text


def parts(source: Path) -> list[Path]:
    return [path for path in sorted(source.iterdir()) if path.is_file()] if source.is_dir() else [source]


def cuts(size: int) -> list[int]:
    """Lengths to which a file is cut: the ends, and 8 places anywhere."""
    return [0, size - 1, 9, *random.Random(3).sample(range(size), 8), 1, 8]


def flipped(source: Path, seed: int) -> tuple[Path, bytes]:
    """(one of the checkpoint's files, its content with another bit). Half of them lie in the first and last 1500 bytes, where
    headers, directories and JSON are."""
    rng = random.Random(seed)
    path = rng.choice(parts(source))
    wrong = bytearray(path.read_bytes())
    wrong[rng.randrange(rng.choice([len(wrong), min(len(wrong), 1500)])) * rng.choice([1, -1])] ^= 1 << rng.randrange(8)
    return path, bytes(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_is_a_user_error_to_the_reader(home: Path, kind: str) -> None:
    """All that a conversion reads: description, names, every value. A zip has checksums: no other value ever comes out."""
    source, _, _ = example(kind, home / "source")
    right, read = {name: materialise(value) for name, value in read_source(source).weights.items()}, 0
    damaged = [(path, path.read_bytes()[:length]) for path in parts(source) for length in cuts(path.stat().st_size)]
    for path, wrong in [*damaged, *(flipped(source, seed) for seed in range(150))]:
        whole = path.read_bytes()
        path.write_bytes(wrong)
        try:
            found = read_source(source)
            read_hints(found.description)
            values = {name: materialise(value) for name, value in found.weights.items()}
        except UserError:
            continue
        finally:
            path.write_bytes(whole)
        read += 1
        assert len(wrong) == len(whole) or path.suffix == ".json"  # which may end with a line break that nothing needs
        assert kind != "zip" or same(values, right)
    assert 0 < read < (len(damaged) + 150) * 0.9


def cut(home: Path, kind: str, count: int) -> None:
    source, options, to = example(kind, home / "source")
    for path in parts(source):
        whole = path.read_bytes()
        for length in cuts(len(whole))[:count]:
            path.write_bytes(whole[:length])
            code, text = ends(home, source, *options, to=to)
            assert code == 2 or path.suffix == ".json", text
            clean(home)
        path.write_bytes(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated(home: Path, kind: str) -> None:
    cut(home, kind, 4)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_anywhere(home: Path, kind: str) -> None:
    cut(home, kind, 13)


def flip(home: Path, kind: str, seeds: range) -> int:
    """How many end in a refusal."""
    source, options, to = example(kind, home / "source")
    right = from_eva(torch.load(source, weights_only=True)["module"]).weights if kind == "zip" else {}
    refusals = 0
    for seed in seeds:
        path, wrong = flipped(source, seed)
        whole = path.read_bytes()
        path.write_bytes(wrong)
        code, _ = ends(home, source, *options, to=to)
        refusals += code == 2
        if kind == "zip" and code == 0:
            assert same(load_file(home / "out" / "result.safetensors"), right), seed
        path.write_bytes(whole)
        clean(home)
    return refusals


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_flipped(home: Path, kind: str) -> None:
    assert flip(home, kind, range(12)) > 1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("first", range(12, 240, 12))
@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_flipped_at_more_places(home: Path, kind: str, first: int) -> None:
    flip(home, kind, range(first, first + 12))


def test_one_bit_of_a_tensor_in_a_zip(home: Path) -> None:
    source, options, to = example("zip", home / "source")
    whole = source.read_bytes()
    for value in torch.load(source, weights_only=True)["module"].values():
        if value.numel() > 4:
            wrong = bytearray(whole)
            wrong[whole.index(value.numpy().tobytes()) + 5] ^= 16
            source.write_bytes(wrong)
            refused(home, source, "checksum", *options, to=to)
