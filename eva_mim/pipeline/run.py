"""Runs a pipeline: what is done is skipped, what changed is run again, what was killed goes on."""

from __future__ import annotations

from pathlib import Path

from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.pipeline.plan import plan


def run_pipeline(path: str, overrides: list[str], out: Path) -> None:
    """Run what is not done, in order, and write `summary.md`. Raises UserError, Interrupted."""
    file, planned = plan(path, overrides, out)
    from eva_mim.core.distributed import barrier, is_main, pick_device, setup
    from eva_mim.core.log import say
    from eva_mim.pipeline.summary import write_summary
    from eva_mim.run.stage import identity_of, run_stage
    from eva_mim.weights.handover import read_record

    first = planned[0].recipe.run
    setup(pick_device(first.device), first.timeout_minutes)  # ranks look at folders together, so they need their barrier now
    for number, stage in enumerate(planned, 1):
        say(f"[{number}/{len(planned)}] {stage.entry.name}")
        record = read_record(stage.out)
        changes = identity_of(stage.entry.program, stage.recipe).changes(record) if record else []
        barrier()
        if changes:
            say("  changed since it was run, so it runs again: " + "; ".join(changes[:8]))
            if is_main():
                put_aside(stage.out)
            barrier()
        program = lookup(PROGRAMS, stage.entry.program, "program")
        run_stage(stage.entry.program, stage.recipe, stage.out, program.build)
    if is_main():
        write_summary(out, planned, file.compare)


def put_aside(folder: Path) -> None:
    """Rename a run that is to be replaced: hours of work are never deleted because a setting changed."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)


def describe(path: str, overrides: list[str], out: Path) -> str:
    """The plan in words, for --dry-run."""
    from eva_mim.run.stage import has_checkpoint, identity_of, is_finished
    from eva_mim.weights.handover import read_record

    _, planned = plan(path, overrides, out)
    lines, stale = [], set()
    for stage in planned:
        entry = stage.entry
        parents = list(entry.parents.values())
        record = read_record(stage.out)
        waits = [name for name in parents if name in stale]
        if waits:
            state = f"runs, after {', '.join(waits)}"
        elif not record:
            state = "runs"
        else:
            made = identity_of(entry.program, stage.recipe)
            changes = made.changes(record)
            state = "finished, is skipped" if is_finished(stage.out, made) else (
                "runs again: " + "; ".join(changes[:4]) if changes else
                "goes on from its checkpoint" if has_checkpoint(stage.out) else "runs")
        if not state.startswith("finished"):
            stale.add(entry.name)
        run = stage.recipe.run
        lines.append(f"{entry.name:<16} {entry.program:<9} {run.length:>20} in {run.global_batch:<6} "
                     f"{'<- ' + ', '.join(parents) if parents else '':<24} {state}")
    return "\n".join(lines)


def as_shell(path: str, overrides: list[str], out: Path) -> str:
    """The stages as plain commands, for a cluster script."""
    _, planned = plan(path, overrides, out)
    return "\n".join(["#!/bin/sh", "set -e", *(stage.shell() for stage in planned)])
