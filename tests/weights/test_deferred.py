"""Tensors that are not read: what is computed from them is what is computed from values, and nothing is read before its time."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.weights.files.lazy import Deferred, deferred, materialise
from eva_mim.weights.files.read import open_checkpoint
from eva_mim.weights.files.tensors import Entry
from eva_mim.weights.names.eva import from_eva, from_stage, to_eva, unshare_relative, visual_trunk, with_norm
from eva_mim.weights.names.families import detect
from eva_mim.weights.names.openai import from_openai, openai_to_timm, to_openai
from eva_mim.weights.resize import resize_trunk
from tests.students.golden import below
from tests.weights.golden_names import checkpoint
from tests.weights.test_names import EVA

TABLE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """Grows by one at every reading."""
    seen: list[Entry] = []
    load = Entry.load
    monkeypatch.setattr(Entry, "load", lambda entry: seen.append(entry) or load(entry))  # type: ignore[func-returns-value]
    return seen


def opened(path: Path, state: dict[str, Tensor], kind: str = "safetensors") -> dict[str, Tensor]:
    (save_file if kind == "safetensors" else torch.save)(state, path)
    return deferred(open_checkpoint(path))


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].shape, found[name].dtype, found[name].device) == (value.shape, value.dtype, value.device), name
        assert torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (materialise(found[name]), value))), name


def eva_conversions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whatever names.py and resize.py make of the original's state."""
    done = from_eva(state)
    family = detect(done.weights)
    side = math.isqrt(family.tokens or (done.grid[0] ** 2 if done.grid else 0))
    grid = done.grid or (side, side)
    back = to_eva(done.weights, done.outside, grid=grid, rope=done.rope, tower=family.form == "clip tower")
    made = {"ours": done.weights, "outside": done.outside, "eva": back.weights}
    if done.outside:
        made["stage"] = from_stage({f"trunk.{name}": value for name, value in done.weights.items()} | done.outside).weights
    trunk = visual_trunk(done.weights).weights if family.text else done.weights
    if family.form == "mim":
        trunk = with_norm(unshare_relative(trunk).weights, "copy").weights
    for positions, kernel in (("original", "bicubic"), ("timm", "pseudo-inverse")):
        new, patch = (grid[0] + 3, grid[1] + 2), tuple(size + 2 for size in family.patch or (14, 14))
        made[positions] = resize_trunk(trunk, grid, new, positions=positions, kernel=kernel, patch=patch)[0]  # type: ignore[arg-type]
    return {f"{kind}/{name}": value for kind, weights in made.items() for name, value in weights.items()}


@pytest.mark.parametrize("name", EVA)
def test_conversions_of_eva_bit_for_bit(shared: Path, tmp_path: Path, name: str, loads: list[Entry]) -> None:
    """Before anything is asked for, only the tables that the original code stores are read."""
    state = checkpoint(shared, name)[0]
    wanted = eva_conversions(state)
    assert not torch.equal(wanted["original/patch_embed.proj.weight"], wanted["timm/patch_embed.proj.weight"])
    for kind in ("safetensors", "torch"):
        loads.clear()
        found = eva_conversions(opened(tmp_path / "a", state, kind))
        tables = [value for key, value in state.items() if "rope.freqs" in key or "position_index" in key or "decoder_pos" in key]
        assert {entry.shape for entry in loads} <= {tuple(value.shape) for value in tables}
        assert len(loads) >= len(tables)
        same(found, wanted)


def test_conversions_of_openai_bit_for_bit(shared: Path, tmp_path: Path, loads: list[Entry]) -> None:
    state = below(load_file(shared / "golden" / "openai_visual.safetensors"), "state_dict/")

    def conversions(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = from_openai(weights)
        made = {"clip": flat.weights, "openai": to_openai(flat.weights).weights, "timm": openai_to_timm(weights).weights}
        return {f"{kind}/{name}": value for kind, part in made.items() for name, value in part.items()}

    for kind in ("safetensors", "torch"):
        found = conversions(opened(tmp_path / "a", state, kind))
        assert not loads
        same(found, conversions(state))
        loads.clear()


def test_an_eva02_s_tables_alone_are_read(shared: Path, tmp_path: Path, loads: list[Entry]) -> None:
    weights = opened(tmp_path / "a", checkpoint(shared, "eva02_b_mim")[0])
    entries = open_checkpoint(tmp_path / "a").entries
    from_eva(weights)
    assert set(loads) == {entry for name, entry in entries.items() if "rope.freqs" in name}
    assert len(loads) < 3 * len(set(loads))


LAZY: dict[str, Callable[[Tensor], Any]] = {
    "turned": lambda x: x.T, "indexed": lambda x: x[None, ..., 1:], "rows": lambda x: x[torch.tensor([4, 0])],
    "half": lambda x: x.half(), "moved": lambda x: x.to("cpu"), "moved, cast": lambda x: x.to(torch.device("cpu"), torch.float64),
    "by name": lambda x: x.to(device="cpu", dtype=torch.bfloat16), "cpu": lambda x: x.cpu().contiguous().clone().float(),
    "chunks": lambda x: x.chunk(3), "parts": lambda x: x.split([2, 4]), "unbound": lambda x: x.unbind(1), "list": list,
    "largest": lambda x: x.max(dim=0), "joined": lambda x: torch.cat([x, TABLE, x[:1]]), "product": lambda x: TABLE @ x.T,
    "einsum": lambda x: torch.einsum("ij,kj->ik", TABLE.double(), x.double()), "inverse": torch.linalg.pinv,
    "solved": lambda x: torch.linalg.solve(TABLE[:4], x[:4]), "sum": lambda x: 2 * x.sum(0) - 1,
    "image": lambda x: F.interpolate(x[None, None], size=(5, 9), mode="bicubic", antialias=True)[0, 0],
    "like": lambda x: torch.zeros(len(x), dtype=x.dtype, device=x.device) + torch.ones_like(x)[:, 0],
    "bits": lambda x: x.view(torch.int32),
}


@pytest.mark.parametrize("name", LAZY)
def test_operations_wait(tmp_path: Path, name: str, loads: list[Entry]) -> None:
    table = opened(tmp_path / "a", {"x": TABLE})["x"]
    found, wanted = LAZY[name](table), LAZY[name](TABLE)
    assert type(found) is (type(wanted) if not isinstance(wanted, Tensor) else Deferred)
    parts = [*zip(found, wanted, strict=True)] if isinstance(wanted, (tuple, list)) else [(found, wanted)]
    assert not loads
    for one, other in parts:
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert torch.equal(materialise(one), other)
        assert type(materialise(one)) is Tensor
    assert loads


@pytest.mark.parametrize("function", [
    lambda x: torch.equal(x, TABLE), lambda x: bool((x > 5).any()), lambda x: x.max().item(), lambda x: x.tolist(),
    lambda x: float(x[2, 1]), lambda x: x.numpy().sum(), lambda x: x[x[:, 0] > 0].tolist(), lambda x: f"{x[0, 0]:.3f}",
    lambda x: 100.0 in x, lambda x: torch.allclose(x, TABLE + 1), lambda x: x.nonzero().tolist(),
])
def test_values_are_read_where_they_are_needed(tmp_path: Path, function: Callable[[Tensor], Any], loads: list[Entry]) -> None:
    table = opened(tmp_path / "a", {"x": TABLE})["x"]
    assert function(table) == function(TABLE)
    assert loads


def test_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was read, nor what was computed on the way, nor the whole of which a part was asked for."""
    alive: list[Any] = []
    load = Entry.load

    def watched(entry: Entry) -> Tensor:
        assert not [one for one in alive if one() is not None]
        alive.append(weakref.ref(value := load(entry)))
        return value

    monkeypatch.setattr(Entry, "load", watched)
    table = opened(tmp_path / "a", {"x": TABLE})["x"]
    chain = ((table.double() + 1).T * 2).chunk(2)[1]
    for _ in range(2):
        value = materialise(chain)
        assert torch.equal(value, ((TABLE.double() + 1).T * 2).chunk(2)[1])
        assert value.untyped_storage().nbytes() == value.nbytes == 2 * 6 * 8
    assert len(alive) == 2
    assert alive[1]() is None
    materialise(table).zero_()
    assert torch.equal(materialise(table), TABLE)


def test_shapes_cost_nothing(tmp_path: Path, loads: list[Entry]) -> None:
    table = opened(tmp_path / "a", {"x": TABLE})["x"]
    assert (tuple(table.shape), table.dtype, len(table), table.numel(), table.ndim) == ((6, 4), torch.float32, 6, 24, 2)
    assert table.is_floating_point()
    assert not table.is_meta
    assert repr(table) == "Deferred([6, 4], torch.float32)"
    assert table.to(torch.float32) is table.float().cpu().contiguous().to("cpu") is table
    assert copy.deepcopy([table])[0] is table
    parts = [table[:2], table[2:]]
    joined = torch.cat(parts)
    parts.clear()
    assert not loads
    assert torch.equal(materialise(joined), TABLE)


def test_what_cannot_be_done_is_refused(tmp_path: Path, loads: list[Entry]) -> None:
    table = opened(tmp_path / "a", {"x": TABLE})["x"]
    for function in (
        lambda: table.add_(1), lambda: table.__setitem__(0, 1), lambda: table.data_ptr(), lambda: table.__iadd__(1),
        lambda: torch.add(table, 1, out=torch.empty(6, 4)), lambda: setattr(table, "data", TABLE),
        lambda: torch.empty(6, 4).copy_(table),
    ):
        with pytest.raises(RuntimeError, match="not read yet cannot be changed and has no address; call read"):
            function()
    assert not loads
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        table @ table


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_file_that_changed_meanwhile(tmp_path: Path, kind: str) -> None:
    table = opened(tmp_path / "a", {"x": TABLE}, kind)["x"].T
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[:100])
    with pytest.raises(UserError, match="truncated"):
        materialise(table)
    (tmp_path / "a").unlink()
    with pytest.raises(UserError, match="No such file"):
        materialise(table)
