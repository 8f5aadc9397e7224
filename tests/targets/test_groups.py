"""Groups of teachers: partitioned over processes they train as one process that runs them in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from eva_mim.core.errors import UserError
from eva_mim.core.settings import parse
from eva_mim.data.sampler import GroupBatch, Piece, cut_groups
from eva_mim.students.heads import resampled
from pretrain.mim import STAGE
from pretrain.mim_recipe import StageRecipe
from tests.tiny import MIM, finish, losses, python, records, run, run_until, same_weights, teacher_file, write_recipe

ROUNDING = 5e-5
"""Largest difference of an fp32 loss of order 1: sums over images in another order."""
WEIGHTS = 2e-4
"""Largest difference of a weight after 8 steps of AdamW with a rate of 2e-3, which divides rounding errors by small gradients."""


def recipe(folder: Path, **more: Any) -> Path:
    """Three teachers in two groups: one of them teaches both groups' sizes and keeps its own, one follows the student's; each has
    a normaliser or an angle of its own.
    Teachers are dropped from images."""
    network = {"kind": "timm", "name": "vit_nano_patch4_32", "image_size": 16, "weights": str(teacher_file(folder))}
    teachers = {
        "both": network | {"objective": {"kind": "mse", "summary": "angle"}, "interpolate": "student",
                           "normaliser": {"kind": "phi_s", "steps": 3, "every": 1}},
        "low": {"kind": "pixels", "name": "patch8", "image_size": 32, "objective": {"kind": "mse"},
                "normaliser": {"kind": "channel", "steps": 5, "every": 2}},
        "high": network | {"layer": 1, "objective": {"kind": "cosine_smooth_l1", "summary": "cosine"}, "image_size": "match"},
    }
    groups = {"near": {"teachers": ["both", "low"], "batch": 16, "image_size": 32},
              "far": {"teachers": ["high", "both"], "batch": 8, "image_size": [48, 64, 40]}}
    tree = {name: value for name, value in MIM.items() if name != "teacher"} | {
        "teachers": teachers, "groups": groups, "student": MIM["student"] | {"head": "mlp"},
        "optim": MIM["optim"] | {"layer_decay": 1.0}, "teacher_drop": 0.4,
    } | more
    return write_recipe(folder, tree)


def ranks(near: int, far: int) -> tuple[str, str]:
    return f"groups.near.ranks={near}", f"groups.far.ranks={far}"


CUTS = {
    "two": (2, [*ranks(1, 1)]),
    "turns": (2, ["run.zero_stage=1"]),
    "three": (3, [*ranks(2, 1), "run.zero_stage=1"]),
    "four": (4, [*ranks(2, 2), "run.zero_stage=2", "groups.near.micro_batch=4", "groups.far.micro_batch=2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("names", [["two"], pytest.param(["turns", "three", "four"], marks=pytest.mark.long)])
def test_partitions_train_as_one_process(tmp_path: Path, names: list[str]) -> None:
    """Loss and norm of the gradient in each step, and trunk and every head after the last."""
    made = recipe(tmp_path)
    run("mim", made, tmp_path / "one")
    expected, figures = records(tmp_path / "one"), records(tmp_path / "one", "eval")[-1]
    assert expected[-1]["loss"] < 0.8 * expected[0]["loss"]
    for name in names:
        processes, words = CUTS[name]
        out = tmp_path / name
        run("mim", made, out, "run.engine=deepspeed", "run.zero_stage=0", *words, processes=processes)
        found = records(out)
        for ours, theirs in zip(found, expected, strict=True):
            for figure in ("loss", "loss_both", "loss_both_summary", "loss_low", "loss_high", "loss_high_summary", "cosine_both"):
                assert ours[figure] == pytest.approx(theirs[figure], abs=ROUNDING), (name, figure)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), name
        for file in ("model.safetensors", "head.safetensors"):
            ours, theirs = (load_file(folder / file) for folder in (out, tmp_path / "one"))
            apart = {tensor: float((value - theirs[tensor]).abs().max() / max(1.0, theirs[tensor].abs().max()))
                     for tensor, value in ours.items()}
            assert max(apart.values()) < WEIGHTS, (name, max(apart, key=lambda tensor: apart[tensor]))
        end = records(out, "eval")[-1]
        assert all(end[figure] == pytest.approx(figures[figure], abs=1e-3) for figure in figures if "cosine" in figure), name


@pytest.mark.slow
def test_a_partitioned_run_goes_on_from_a_kill_with_other_numbers_of_processes(tmp_path: Path) -> None:
    made, engine = recipe(tmp_path), ("run.engine=deepspeed", "run.zero_stage=1")
    run("mim", made, tmp_path / "whole", *engine, *ranks(1, 1), processes=2)
    for step in (2, 6):  # before and after the statistics are fixed
        out = tmp_path / f"killed{step}"
        run_until(step, "mim", made, out, *engine, *ranks(1, 1), processes=2)
        run("mim", made, out, *engine, *ranks(1, 1), processes=2)
        for name in ("model.safetensors", "head.safetensors"):
            same_weights(out / name, tmp_path / "whole" / name)
    out = tmp_path / "other"
    run_until(3, "mim", made, out, *engine, *ranks(1, 1), processes=2)
    run("mim", made, out, *engine, *ranks(2, 1), processes=3)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=ROUNDING)


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_group_is_skipped_by_all(tmp_path: Path) -> None:
    """A sample is poisoned, which lies on one process in each of two epochs."""
    made = recipe(tmp_path)
    for name, processes, words in (("one", 1, []), ("two", 2, ["run.engine=deepspeed", *ranks(1, 1)])):
        finish(python("tests.poison", "2", "mim", made, *words, "--out", tmp_path / name, processes=processes))
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert one[-1]["skipped"] == two[-1]["skipped"] == 2
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], abs=ROUNDING, nan_ok=True)


def test_pieces_of_a_step_by_hand() -> None:
    groups = [GroupBatch("a", 12, 2, 3), GroupBatch("b", 4, 2, 1)]
    assert [cut_groups(groups, rank, 4) for rank in range(4)] == [
        [Piece(0, 2, 0), Piece(6, 8, 0)], [Piece(2, 4, 0), Piece(8, 10, 0)], [Piece(4, 6, 0), Piece(10, 12, 0)],
        [Piece(12, 14, 1), Piece(14, 16, 1)]]
    assert cut_groups(groups, 0, 1) == [Piece(at, at + 2, at // 12) for at in range(0, 16, 2)]
    turns = [group._replace(ranks=None) for group in groups]
    assert cut_groups(turns, 1, 2) == [Piece(2, 4), Piece(6, 8), Piece(10, 12), Piece(14, 16, 1)]


@pytest.mark.parametrize(
    ("groups", "world", "said"),
    [
        ([GroupBatch("a", 4, None, 1), GroupBatch("b", 4)], 2, r"groups\.a\.ranks=1, groups\.b\.ranks=null: they must add up"),
        ([GroupBatch("a", 4, None, 2), GroupBatch("b", 4, None, 1)], 2, "must add up to the 2 processes"),
        ([GroupBatch("a", 4, None, 3), GroupBatch("b", 4, None, 1)], 4,
         r"groups\.a\.batch=4 is not a multiple of 3 processes; nearest: groups\.a\.batch=3 or groups\.a\.batch=6"),
        ([GroupBatch("a", 8, 2, 1), GroupBatch("b", 4, None, 1)], 2, "forward passes on each process: groups.a 4, groups.b 1"),
    ],
)
def test_groups_that_do_not_fit_the_processes_are_refused(groups: list[GroupBatch], world: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        cut_groups(groups, 0, world)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"groups": {"a": {"teachers": ["both", "sam"], "batch": 24}}}, r"groups\.a\.teachers: sam are no teachers; known: both"),
        ({"groups": {"a": {"teachers": ["both"], "batch": 24}}}, "groups: no group has low, high"),
        ({"groups": {"a": {"batch": 8}, "b": {"batch": 8}}},
         r"groups\.a\.batch=8 \+ groups\.b\.batch=8 = 16 is not run\.global_batch=24"),
        ({"groups": {"a": {"batch": 16, "ranks": 1}, "b": {"batch": 8, "ranks": 1}},
          "run": MIM["run"] | {"engine": "deepspeed", "zero_stage": 3}}, r"run\.zero_stage=3: each layer is gathered by all"),
        ({"groups": {"a": {"batch": 24, "image_size": [32, 64]}}, "mask": {"replay": True}},
         r"mask\.replay=true stores masks of one size"),
        ({"groups": {"a": {"batch": 24, "image_size": []}}}, r"groups\.a\.image_size"),
        ({"teachers": {"a": {"kind": "timm", "name": "x", "interpolate": "larger"}}, "groups": {}},
         r"teachers\.a\.interpolate=larger predicts the whole finer grid, and mask\.ratio=0\.41 some"),
        ({"teachers": {"a": {"kind": "timm", "name": "x", "interpolate": "larger", "head": {"upsample": 2}}}, "groups": {},
          "mask": {"ratio": 0}}, "both make the student's grid finer"),
        ({"optim": MIM["optim"] | {"heads": {"alone": 2}}, "run": MIM["run"] | {"engine": "deepspeed", "zero_stage": 3}},
         r"optim\.heads\.alone=2: with run\.zero_stage=3"),
    ],
)
def test_groups_that_are_no_step_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(StageRecipe, yaml.safe_load(recipe(tmp_path, **change).read_text()), "recipe")


def test_a_size_that_no_grid_fits_is_refused_with_ways_out(tmp_path: Path) -> None:
    """Before anything is built: on the meta device."""
    tree = yaml.safe_load(recipe(tmp_path).read_text())
    tree["groups"]["far"]["image_size"] = 44
    with pytest.raises(UserError, match="groups: 44 px are not a whole number of patches of 8 px"):
        STAGE.on_meta(parse(StageRecipe, tree, "recipe"))
    tree["groups"]["far"]["image_size"] = 48
    tree["teachers"]["high"]["image_size"] = 16
    with pytest.raises(UserError, match=r"student grid 6x6 \(48 px\) does not match teachers\.high grid 4x4 \(16 px\).* or set "
                                        r"teachers\.high\.interpolate=student"):
        STAGE.on_meta(parse(StageRecipe, tree, "recipe"))


def test_interpolation_is_bilinear_between_centres_of_cells() -> None:
    """A linear ramp stays one, away from the border."""
    ramp = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 6, 6, 1).reshape(1, 36, 1)
    fine = resampled(ramp, (6, 6), (12, 12)).view(12, 12)
    assert (fine[:, 1:-1] - (torch.arange(12.0)[1:-1] - 0.5) / 2).abs().max() < 1e-6
    assert resampled(ramp, (6, 6), (6, 6)) is ramp
