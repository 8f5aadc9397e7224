"""`eva-mim replay DUMP`: runs the last step of a diverged run again, in one process, and shows the first layers with values that
are not finite."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOT_REPRODUCED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 if the step is not finite here either, 1 if it is finite, 2 for a user's
    mistake."""
    parser = argparse.ArgumentParser(prog="eva-mim replay", description="Run the last step of a diverged run again.")
    parser.add_argument("dump", type=Path, help="folder OUT/dumps/step-... that the run named when it stopped")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings to change, such as run.precision=fp32")
    parser.add_argument("--top", type=int, default=12, help="layers to list")
    arguments = parser.parse_intermixed_args(argv)
    from eva_mim.run.program import guard

    finite = [False]

    def work() -> None:
        finite[0] = replay(arguments.dump, arguments.overrides, arguments.top)

    code = guard(work)
    return NOT_REPRODUCED if not code and finite[0] else code


def replay(folder: Path, overrides: Sequence[str] = (), top: int = 12) -> bool:
    """Runs the step, prints its losses and layers, and returns True if everything is finite. Raises UserError for a folder that
    is no dump."""
    import json
    from functools import partial

    from safetensors.torch import load_file

    from eva_mim.core.errors import UserError
    from eva_mim.core.recipe_files import read_yaml
    from eva_mim.core.registry import PROGRAMS, lookup
    from eva_mim.core.resolve import resolve
    from eva_mim.core.rng import derive, seed_all
    from eva_mim.core.run_folder import RunFolder
    from eva_mim.engine.step import autocast
    from eva_mim.run.diagnose import diagnose, first_bad, largest_of
    from eva_mim.run.dump import DUMPED, RECORD, STATISTICS
    from eva_mim.run.stage import prepare

    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} has no {RECORD}; it must be the dump folder that the run named when it stopped")
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    processes, micro_batches = record["processes"], record["micro_batches"]
    samples = record["samples"][str(record["data_step"])]
    stage = lookup(PROGRAMS, record["program"], "dump.program")
    tree = read_yaml(RunFolder(folder).settings)
    if tree.get("init_from") and not Path(tree["init_from"]).exists():
        tree.pop("hand_over", None)
        tree["init_from"] = None  # the dump has the weights; an existing parent is kept, since some recipes require one
    tree["run"] |= {"engine": "local", "zero_stage": 0}
    if not tree.get("groups"):
        tree["run"]["micro_batch"] = len(samples) // (processes * micro_batches)
    recipe = resolve(stage.recipe, tree, overrides, str(RunFolder(folder).settings))
    device, built = prepare(recipe, stage.build)
    module = built.parts.task.student.to(device).train()
    module.load_state_dict(load_file(folder / DUMPED))
    _put_statistics(built.parts.task, load_file(folder / STATISTICS) if (folder / STATISTICS).is_file() else {})
    steps = built.parts.train.steps(record["data_step"], record["data_step"] + 1)
    context = partial(autocast, device, recipe.run.precision)
    seed_all(derive(record["seed"], "step", record["step"], 0))
    with context():  # a loss over the global batch covers it here too; its random numbers are the first process's
        batches = built.parts.task.prepare(module, [batch.to(device) for batch in next(iter(steps))])
    write = sys.stdout.write
    write(f"step {record['step']} of {processes} processes x {micro_batches} micro-batches, {recipe.run.precision}, "
          f"loss scale {record['loss_scale']:g}\n")
    findings = []
    ranks = [(rank, batches[rank::processes]) for rank in range(processes)]
    if tree.get("groups"):  # one process runs all groups in turn, whatever each had in the run
        ranks = [(0, batches)]
    for rank, own in ranks:
        seed_all(derive(record["seed"], "step", record["step"], rank))
        for micro, batch in enumerate(own):
            found = diagnose(built.parts.task, module, batch, context, record["loss_scale"])
            findings.append(found.layers)
            keys = [built.parts.train.key(int(index)) for index in batch.index]
            write(f"  rank {rank}, micro-batch {micro}: loss {found.loss:.6g}, samples {keys[0]} ... {keys[-1]}\n")
    layers = largest_of(findings)
    for what in ("weight", "output", "gradient"):
        bad = first_bad(layers, what)
        write(f"first layer whose {what} is not finite: {bad or 'none'}\n")
    write(f"\n{'layer':<40} {'weight':>12} {'output':>12} {'gradient':>12}\n")
    ranked = sorted(layers.items(), key=lambda item: -_rank(item[1].get("output", 0.0)))[:top]
    for name, row in ranked:
        write(f"{name:<40} " + " ".join(f"{row[what]:>12.4g}" if what in row else f"{'':>12}"
                                        for what in ("weight", "output", "gradient")).rstrip() + "\n")
    finite = all(first_bad(layers, what) is None for what in ("weight", "output", "gradient"))
    write("\nnot reproduced: everything is finite here\n" if finite else "\nreproduced: the step is not finite\n")
    return finite


def _put_statistics(task: Any, statistics: dict[str, Any]) -> None:
    """Sets a task's running statistics to those of a dump."""
    for file, group in task.state().items():
        for name in group.kinds:
            group.put(name, statistics[f"{file}.{name}"])


def _rank(value: float) -> float:
    return value if value == value else float("inf")
