"""DeepSpeed folders, cut here by a plain loop; `test_reading` reads those of real runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eva_mim.core.errors import UserError
from eva_mim.weights.files.read import open_checkpoint
from tests.weights.test_reading import same

GENERATOR = torch.Generator().manual_seed(0)
GROUPS = [
    {"a": torch.randn(3, 5, generator=GENERATOR), "scale": torch.randn((), generator=GENERATOR)},
    {"b": torch.randn(7, generator=GENERATOR), "c": torch.randn(2, 2, 2, generator=GENERATOR)},
]
FROZEN = {"frozen": torch.randn(5, generator=GENERATOR)}
BUFFERS = {"table": torch.arange(4)}
ORDER = ["scale", "b", "table", "a", "frozen", "c", "tied"]
WHOLE = {name: (GROUPS[0] | GROUPS[1] | FROZEN | BUFFERS | {"tied": GROUPS[1]["b"]})[name] for name in ORDER}
RANKS = 3


def shares(value: Tensor) -> list[Tensor]:
    """Equal parts, padded with zeros."""
    share = math.ceil(value.numel() / RANKS)
    padded = torch.cat([value.flatten(), torch.zeros(share * RANKS - value.numel())])
    return [padded[rank * share : (rank + 1) * share].clone() for rank in range(RANKS)]


def write(folder: Path, stage: int, free: int = 0, **changes: Any) -> Path:
    """`free` elements are left behind each parameter."""
    folder.mkdir()
    shapes = [{name: value.shape for name, value in group.items()} for group in GROUPS]
    half = {name: value.half() if value.is_floating_point() else value for name, value in WHOLE.items()}
    for rank in range(RANKS):
        if stage == 3:
            flat = [torch.cat([shares(value)[rank] for value in group.values()]) for group in GROUPS]
            fragments = {name: shares(value)[rank] for name, value in FROZEN.items()}
        else:  # DeepSpeed rounds a group up to twice the number of ranks
            flat, fragments = [], FROZEN
            for group in GROUPS:
                vector = torch.cat([F.pad(value.flatten(), (0, free)) for value in group.values()])
                flat.append(shares(torch.cat([vector, torch.zeros(-len(vector) % (2 * RANKS))]))[rank])
        optimizer = {"zero_stage": stage, "partition_count": RANKS if stage == 3 else [RANKS, RANKS]}
        optimizer |= {"param_alignment_paddings": [[free] * len(group) for group in GROUPS]} if free else {}
        optimizer["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = flat
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": optimizer}, folder / f"{name}_optim_states.pt")
        if stage == 3 or rank == 0:
            model = {"module": half, "param_shapes": shapes, "buffer_names": ["table"], "shared_params": {"tied": "b"},
                     "frozen_param_shapes": {"frozen": FROZEN["frozen"].shape}, "frozen_param_fragments": fragments}
            torch.save(model | changes, folder / f"{name if stage == 3 else 'mp_rank_00'}_model_states.pt")
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whole_weights(tmp_path: Path, stage: int) -> None:
    """fp32 values, where the module itself has half precision; in the module's order."""
    opened = open_checkpoint(write(tmp_path / "step_5", stage))
    assert opened.kind == f"DeepSpeed ZeRO {stage}, 3 ranks"
    same(opened, WHOLE)


def test_room_behind_each_parameter(tmp_path: Path) -> None:
    same(open_checkpoint(write(tmp_path / "step_5", 2, free=3)), WHOLE)


def test_stage_0_and_the_module_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 1, param_shapes=None)
    same(open_checkpoint(folder / "mp_rank_00_model_states.pt"), {n: v.half() if n != "table" else v for n, v in WHOLE.items()})
    for path in folder.glob("*optim*"):
        path.unlink()
    opened = open_checkpoint(folder)
    assert (opened.kind, opened["a"].dtype) == ("DeepSpeed ZeRO 0", torch.float16)


def test_what_is_not_trained_may_lie_in_the_module_alone(tmp_path: Path) -> None:
    """As DeepSpeed's ZeRO 1 has it; ZeRO 3's module is empty. A group without shapes is not taken from there."""
    nothing = {"frozen_param_shapes": None, "frozen_param_fragments": None}
    same(open_checkpoint(write(tmp_path / "a", 1, **nothing)), WHOLE | {"frozen": FROZEN["frozen"].half()})
    with pytest.raises(UserError, match="no shard holds 'frozen'"):
        open_checkpoint(write(tmp_path / "b", 3, **nothing))
    shapes = [{name: value.shape for name, value in GROUPS[0].items()}]
    with pytest.raises(UserError, match="shapes of 1 groups of parameters, but 2 vectors"):
        open_checkpoint(write(tmp_path / "c", 1, param_shapes=shapes))


def test_the_tag_names_the_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, 2)
    (tmp_path / "latest").write_text("two\n")
    assert open_checkpoint(tmp_path).path == tmp_path / "two"
    for tag in ("three", "../x", "/etc", "..", ""):
        (tmp_path / "latest").write_text(tag)
        with pytest.raises(UserError, match="latest: names the folder"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_lost_rank_is_told(tmp_path: Path, stage: int) -> None:
    first, last = write(tmp_path / "a", stage), write(tmp_path / "b", stage)
    (first / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match=r"files of ranks \[0, 2\]"):
        open_checkpoint(first)
    (last / "zero_pp_rank_2_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="but 2 optimizer files; some are missing"):
        open_checkpoint(last)


def test_all_optimizer_files_lost(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 1)
    for path in folder.glob("*optim*"):
        path.unlink()
    with pytest.raises(UserError, match="optimizer files, which hold the fp32 weights of ZeRO, are missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("shape", [(3, 50), (3,)])
def test_shapes_that_do_not_fit(tmp_path: Path, stage: int, shape: tuple[int, ...]) -> None:
    """Larger than what the ranks hold, and much smaller."""
    size = shape if len(shape) == 2 else (1,)
    shapes = [{"a": torch.Size(size), "scale": torch.Size([])}, {"b": torch.Size(shape), "c": torch.Size(shape)}]
    folder = write(tmp_path / "a", stage, param_shapes=shapes)
    with pytest.raises(UserError, match=r"fewer elements than|more than its shapes need|the shapes need"):
        open_checkpoint(folder)


@pytest.mark.parametrize("changes", [
    {"param_shapes": [{"a": (10**9, "x")}, {}]}, {"buffer_names": [("table", ("x",))]},
    {"shared_params": {"tied": ("b", ("x",))}}, {"frozen_param_shapes": {"frozen": (10**9, "x")}},
    {"frozen_param_fragments": {}}, {"module": 3}, {"param_shapes": 3},
])
def test_anything_anywhere(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write(tmp_path / "a", 2, **changes)
    with pytest.raises(UserError, match=rf"{folder}.*(not the supported layout|list of sizes)"):
        open_checkpoint(folder)


def test_other_layouts(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 2, buffer_names=None)
    with pytest.raises(UserError, match="not the supported layout of DeepSpeed's ZeRO"):
        open_checkpoint(folder)
    folder = write(tmp_path / "b", 2, param_shapes=[{"a": torch.Size([3, 5])}, {}])
    with pytest.raises(UserError, match="more than its shapes need"):
        open_checkpoint(folder)
    (folder / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(UserError, match="model-parallel"):
        open_checkpoint(folder)
