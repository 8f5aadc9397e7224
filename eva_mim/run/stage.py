"""Training and evaluation of one stage from its recipe to its files, common to all programs."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import eva_mim
from eva_mim.core.contracts import Teacher
from eva_mim.core.devices import set_arithmetic
from eva_mim.core.distributed import barrier, is_main, run_on_main, setup, world_size
from eva_mim.core.errors import Diverged, UserError
from eva_mim.core.files import sha256, write_json, write_text
from eva_mim.core.lock import locked
from eva_mim.core.log import duration, say
from eva_mim.core.recipe_files import read_yaml
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.core.report import KeyReport
from eva_mim.core.resolve import resolve
from eva_mim.core.rng import derive, seed_all
from eva_mim.core.run_folder import RunFolder
from eva_mim.core.settings import as_tree, differences, few
from eva_mim.data.class_lists import class_hash, describe
from eva_mim.data.splits import open_splits
from eva_mim.engine import build_engine
from eva_mim.engine.step import autocast, placed, slowdown
from eva_mim.run.checkpoints import kept_here, load, newest
from eva_mim.run.console import folded, wrapped
from eva_mim.run.loop import Loop, Parts, Trained
from eva_mim.run.measure import EMA, EXACT, average_of, measure
from eva_mim.run.program import Stage
from eva_mim.run.recipe import Recipe
from eva_mim.run.state import StageIdentity, StageState, state_of
from eva_mim.trunks.kernels import tune

Weights = dict[str, Tensor]
LIBRARIES = ("torchvision", "timm", "open_clip_torch", "deepspeed", "numpy", "pillow")
"""Libraries whose versions results depend on."""


@dataclass
class Networks:
    """Networks of a recipe, which are made before any data is opened."""

    student: Any
    teachers: dict[str, Teacher] = field(default_factory=dict)
    """By name; not one of their weights may change."""


@dataclass
class Built:
    """Networks, data and evaluator that a program builds from its recipe."""

    parts: Parts
    export: Callable[[Path, Weights], None]
    """Writes model.safetensors and the other files that the next stage or a user opens."""
    data: dict[str, Any]
    """`Splits.facts` of the records: a resumed run must have those with which it began."""
    classes: tuple[str, ...] | None = None
    grid: list[int] | None = None
    seeded: KeyReport | None = None
    teachers: dict[str, Teacher] = field(default_factory=dict)
    """By name; not one of their weights may change."""
    begin: Callable[[], None] | None = None
    """What a run without checkpoint does before its first step; every rank calls it."""


def run_stage(stage: Stage, recipe: Recipe, out: Path, state: StageState | None = None) -> dict[str, Any]:
    """Trains, resumes or, if finished, reports a stage; returns its lineage record. Unless `state` is given, one rank reads the
    folder and the parents. Raises UserError (another process holds the folder, ...), Interrupted, Diverged, LostProcess."""
    setup(recipe.run.device, recipe.run.timeout_minutes)
    state = state or run_on_main(partial(state_of, stage.name, recipe, out))
    with ExitStack() as held:
        if not state.finished:
            state = settled(run_on_main(partial(_taken, state, out, held)), recipe)
        if state.finished:
            say(state.nothing_to_do(out))
            return state.record
        return _train(stage, recipe, out, state)


def settled(state: StageState, recipe: Recipe) -> StageState:
    """Returns the state with the data at its place now compared with that of the run, if it lies elsewhere: node-local disks and
    moved folders. Every rank must call. Raises UserError for data that cannot be used."""
    if not state.compares_data:
        return state
    found, before = open_splits(recipe.data).facts(), state.record.get("data", {})
    same = all(found[name] == before.get(name) for name in ("sha256", "pixels"))
    say(f"  {'; '.join(state.moved)}: {'the same' if same else 'other'} records")
    return state.compared(same)


def _taken(state: StageState, out: Path, held: ExitStack) -> StageState:
    """Locks the stage's folder; returns its state, which another process may have changed until then."""
    held.enter_context(locked(out))
    return state.reread(out)


def _train(stage: Stage, recipe: Recipe, out: Path, state: StageState) -> dict[str, Any]:
    plan, record = state.identity, state.record
    if (record.get("finished") or state.resumes) and (changes := state.changes):
        raise UserError(f"{out} holds another run; choose another --out. What differs:\n  " + "\n  ".join(changes[:20]))
    device, built = prepare(recipe, stage.build)
    begun = _record(plan, built, recipe)
    if state.resumes:
        _same_classes(out, record, built)
        _same_data(out, record, built)
        if changed := differences(begun["versions"] | record["versions"], begun["versions"]):
            say(f"  begun with other versions, so that it may not go on bit for bit: {', '.join(changed)}")
    if is_main():  # from here on the folder belongs to this run
        write_text(RunFolder(out).settings, yaml.safe_dump(as_tree(recipe), sort_keys=False))
        write_json(RunFolder(out).lineage, begun)
    barrier()
    student = built.parts.task.student
    trained_count = sum(p.numel() for p in student.parameters() if p.requires_grad)
    say(folded(f"{stage.name} -> {out}: {trained_count / 1e6:.2f} M trained parameters on {device} x {world_size()}, "
               f"{recipe.run.engine}, {recipe.run.precision}{_arithmetic(recipe, device)}").lstrip())
    if is_main() and (factor := slowdown(recipe.run.precision, device)) > 2:
        say(f"  run.precision={recipe.run.precision}: this processor has no units for it and multiplies matrices {factor:.0f} "
            "times as slowly as in fp32; run.precision=fp32 is faster here")
    if built.seeded is not None:
        say(folded(f"seeded{f' from {recipe.init_from}' if recipe.init_from else ''}: {built.seeded}"))
    taught = _teachers(built)
    if built.begin is not None and not state.resumes:
        built.begin()
    engine = build_engine(student, recipe.run, recipe.optim, device, built.parts.train.micro_batches)
    trained = Loop(built.parts, engine, recipe.run, recipe.optim, out, device)()
    if _teachers(built) != taught:
        raise AssertionError("a teacher changed during training")
    weights = dict(trained.engine.weights())
    if faults := run_on_main(partial(_not_finite, trained, weights)):
        raise Diverged(f"after the last step {faults}; nothing is exported. Start again with a lower optim.lr={recipe.optim.lr}, "
                       f"or from an earlier one of {RunFolder(out).checkpoints}: --out ANOTHER init_from=CHECKPOINT")
    record = run_on_main(partial(_finish, begun | {"teachers": taught}, recipe, built, trained, weights, out))
    say(wrapped(f"finished in {duration(trained.seconds)}:", record["metrics"]))
    return record


def _finish(
    begun: dict[str, Any], recipe: Recipe, built: Built, trained: Trained, weights: Weights, out: Path
) -> dict[str, Any]:
    """Exports the result; returns the lineage record of the finished run. Others wait meanwhile, and are told of a full disk."""
    built.export(out, weights)
    if trained.ema is not None:
        built.export(_subfolder(out, EMA), {n: v.cpu() for n, v in trained.ema.module.state_dict().items()})
    steps = recipe.run.steps(built.parts.train.steps_per_epoch)
    record = begun | {
        "finished": True,
        "headline": built.parts.evaluator.headline,
        "metrics": trained.metrics,
        "seconds": round(RunFolder(out).seconds_at_work(), 1),
        "steps": steps,
        "samples_seen": steps * recipe.run.global_batch,
        "weights_sha256": sha256(RunFolder(out).weights),
        "classes": list(built.classes) if built.classes else None,
        "grid": built.grid,
        "seeded": built.seeded.as_dict() if built.seeded else None,
    }
    write_json(RunFolder(out).lineage, record)
    return record


def _not_finite(trained: Trained, weights: Weights) -> str:
    """Returns which of the last figures and weights are NaN or infinite; an empty text if none is."""
    figures = [name for name, value in trained.metrics.items() if not math.isfinite(value)]
    tensors = [name for name, value in weights.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    found = [f"{what} {few(names, 3)}" for what, names in (("the held-out figures", figures), ("the weights", tensors)) if names]
    return f"{' and '.join(found)} are not finite" if found else ""


def evaluate_stage(out: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, float], dict[str, float]]:
    """Loads the weights of a run's newest checkpoint and measures them; returns (figures now, figures in the lineage record).

    `overrides` change settings of the run, such as data.root. Every rank must call, and has the unsharded weights. Raises
    UserError.
    """
    record = RunFolder(out).record()
    if not record or RunFolder(out).latest() is None:
        raise UserError(f"{out} holds no run with a checkpoint")
    stage: Stage = lookup(PROGRAMS, record["program"], "lineage.program")
    settings = RunFolder(out).settings
    recipe = resolve(stage.recipe, read_yaml(settings), overrides, str(settings))
    device, built = prepare(recipe, stage.build)
    _same_classes(out, record, built)
    found = newest(out)
    assert found is not None
    student = placed(built.parts.task.student, recipe.run.engine, device)
    average = average_of(student, recipe.run)
    parts = {"module": student} | ({} if average is None else {EMA: average.module})
    groups = {name: kept_here(module.state_dict()) for name, module in parts.items()} | built.parts.task.state()
    load(found[1], groups, alone=True)
    now = measure(built.parts.evaluator, student, average, partial(autocast, device, EXACT))
    return now, record.get("metrics", {})


def prepare(recipe: Recipe, build: Callable[[Any, torch.device], Built]) -> tuple[torch.device, Built]:
    """Sets up device, process group and random seeds; returns the device, and networks, data and evaluator of the recipe."""
    device = setup(recipe.run.device, recipe.run.timeout_minutes)
    set_arithmetic(tf32=recipe.run.tf32, deterministic=recipe.run.deterministic)
    if device.type == "cpu":
        _keep_freed_memory()
    seed_all(derive(recipe.run.seed, "initialisation"))
    built = build(recipe, device)
    tune(built.parts.task.student, device)
    return device, built


def _arithmetic(recipe: Recipe, device: torch.device) -> str:
    """Returns what the first line of a run says of its arithmetic besides the precision."""
    given = [name for name in ("tf32", "deterministic") if getattr(recipe.run, name)]
    if device.type == "cpu":
        return f" (without effect on a CPU: {', '.join(f'run.{name}' for name in given)})" if given else ""
    return f", {'TF32' if recipe.run.tf32 else 'no TF32'}{', deterministic' if recipe.run.deterministic else ''}"


def _keep_freed_memory() -> None:
    """Sets glibc to keep freed memory. On CPUs the page faults of newly allocated outputs cost 10 to 25 % of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _same_classes(out: Path, record: dict[str, Any], built: Built) -> None:
    """Raises UserError if the class list of the data differs from that with which the run began, since the head depends on it."""
    begun = record.get("classes_sha256")
    if begun and built.classes and begun != class_hash(built.classes):
        raise UserError(f"{out} was begun with another list of classes; the data now has {describe(built.classes)}")


def _same_data(out: Path, record: dict[str, Any], built: Built) -> None:
    """Raises UserError if records were added or removed since the run began, since the order of samples depends on them."""
    begun, now = record.get("data"), built.data
    if begun and begun["sha256"] != now["sha256"]:
        counts = [f"{facts['train']} training and {facts['val']} held-out images" for facts in (begun, now)]
        raise UserError(f"{out} was begun with {counts[0]}; since then the data has changed (now {counts[1]}), and the run "
                        "would not go on with the same samples. Bring the data back, or start another run from these weights: "
                        f"--out ANOTHER init_from={RunFolder(out).complete()[0][1]}")


def _record(plan: StageIdentity, built: Built, recipe: Recipe) -> dict[str, Any]:
    return {
        "program": plan.program,
        "identity": plan.identity,
        "finished": False,
        "settings": plan.settings,
        "parents": plan.parents,
        "places": plan.places,
        "versions": _versions(),
        "processes": world_size(),
        "computed": {name: getattr(recipe.run, name) for name in ("engine", "zero_stage", "micro_batch")},
        "data": built.data,
        "classes_sha256": class_hash(built.classes) if built.classes else None,
    }


def _teachers(built: Built) -> dict[str, dict[str, Any]]:
    """Returns facts and SHA-256 of each teacher by name; only the main rank reads all weights, on others the dict is empty."""
    return {name: one.facts() | {"sha256": one.fingerprint()} for name, one in built.teachers.items()} if is_main() else {}


def _versions() -> dict[str, str]:
    own = {"eva_mim": eva_mim.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {name: version(name) for name in LIBRARIES}


def _subfolder(out: Path, name: str) -> Path:
    (out / name).mkdir(exist_ok=True)
    return out / name
