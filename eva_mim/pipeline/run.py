"""Running of a pipeline: finished stages are skipped, changed ones are run again, interrupted ones are resumed."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from eva_mim.core.errors import UserError
from eva_mim.core.registry import PROGRAMS, lookup
from eva_mim.pipeline.plan import PlannedStage, plan
from eva_mim.run.state import StageState, state_of


def run_pipeline(path: str, overrides: list[str], out: Path) -> None:
    """Runs the unfinished stages in order and writes `summary.md`. Raises UserError, Interrupted."""
    file, planned = plan(path, overrides, out)
    from eva_mim.core.distributed import is_main, run_on_main, setup
    from eva_mim.core.lock import locked
    from eva_mim.pipeline.summary import write_summary

    first = planned[0].recipe.run
    setup(first.device, first.timeout_minutes)  # the ranks inspect the stages' folders together
    with ExitStack() as held:
        run_on_main(lambda: held.enter_context(locked(out)))
        _run(planned, run_on_main(partial(checked, planned)))
        if is_main():
            write_summary(out, planned, file.compare)


def finished_stages(planned: list[PlannedStage]) -> dict[str, StageState]:
    """Returns the state of each stage that is finished and whose parents are, by name. Raises UserError if a parent does not
    exist."""
    found: dict[str, StageState] = {}
    for stage in planned:
        if found.keys() >= set(stage.entry.parents.values()):
            try:
                state = state_of(stage.entry.program, stage.recipe, stage.out)
            except UserError as error:
                raise UserError(f"stage {stage.entry.name}: {error}") from None
            found |= {stage.entry.name: state} if state.finished else {}
    return found


def checked(planned: list[PlannedStage]) -> dict[str, StageState]:
    """Returns the state of each finished stage by name, after the networks of all others were checked. Raises UserError."""
    from eva_mim.pipeline.networks import check_networks

    finished = finished_stages(planned)
    if len(finished) < len(planned):
        check_networks(planned, set(finished))
    return finished


def _run(planned: list[PlannedStage], finished: dict[str, StageState]) -> None:
    from eva_mim.core.distributed import run_on_main
    from eva_mim.core.log import say
    from eva_mim.run.stage import run_stage, settled

    for number, stage in enumerate(planned, 1):
        say(f"[{number}/{len(planned)}] {stage.entry.name}")
        state = finished.get(stage.entry.name) or run_on_main(partial(state_of, stage.entry.program, stage.recipe, stage.out))
        state = settled(state, stage.recipe)
        if state.changes:
            say("  changed since it was run, so it runs again: " + "; ".join(state.changes[:8]))
            run_on_main(partial(put_aside, stage.out))
            state = StageState(state.identity, {}, resumes=False, has_weights=False)
        run_stage(lookup(PROGRAMS, stage.entry.program, "program"), stage.recipe, stage.out, state)


def put_aside(folder: Path) -> None:
    """Renames a run that is to be replaced to NAME.old-N, so that a changed setting never deletes hours of work; its event files
    are renamed too, so that TensorBoard shows the new run alone. Raises UserError if another process is writing it."""
    from eva_mim.core.lock import is_lock, locked

    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    with locked(folder):
        folder.rename(target)
    for path in target.iterdir():
        if is_lock(path.name):
            path.unlink()
    for path in (target / "tensorboard").glob("*tfevents*"):
        path.rename(path.with_name(path.name.replace("tfevents", "aside")))
