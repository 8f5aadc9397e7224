"""What a pipeline would do: a table of its stages, and its commands as a shell script."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from eva_mim.core.errors import UserError
from eva_mim.pipeline.plan import PlannedStage, plan
from eva_mim.pipeline.run import checked
from eva_mim.run.recipe import Recipe
from eva_mim.run.state import state_of

SCRIPT = """\
#!/bin/sh
# {nodes} x {gpus} GPUs. In an allocation of Slurm: once. Elsewhere: on every node, with HEAD=NAME of the first one.
set -e
if [ -n "$SLURM_JOB_ID" ]; then
    run() {{ srun --nodes={nodes} --ntasks-per-node={gpus} --gpus-per-node={gpus} --kill-on-bad-exit=1 eva-mim "$@"; }}
else
    run() {{ torchrun --nnodes={nodes} --nproc-per-node={gpus} {rendezvous} -m eva_mim.cli "$@"; }}
fi"""
"""Start of a shell script for several processes: what runs the words of a stage's command."""
HEAD = '--rdzv-backend=c10d --rdzv-id=eva-mim --rdzv-endpoint="${HEAD:?is the name of the first node}:29500"'


class Cluster(NamedTuple):
    """The GPUs that a pipeline is to run on, one process for each."""

    nodes: int
    gpus: int
    """GPUs of a node."""


def as_table(path: str, overrides: list[str], out: Path, cluster: Cluster | None = None) -> str:
    """Returns the stages as a table of at most 80 columns (longer names need more), and what would be done of each. Raises
    UserError for stages whose networks cannot be built, and as `as_shell`."""
    planned = _planned(path, overrides, out, cluster)
    checked(planned)
    rows = [("stage", "program", "from", "steps", "batch", "GPUs"), *(_row(stage, cluster) for stage in planned)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["GPUs: number x images of a micro-batch x micro-batches of a step (if several)", ""]
    stale = set[str]()
    for stage in planned:
        waits = [name for name in stage.entry.parents.values() if name in stale]
        state = f"runs, after {', '.join(waits)}" if waits else state_of(stage.entry.program, stage.recipe, stage.out).plan()
        if not state.startswith("finished"):
            stale.add(stage.entry.name)
        lines.append(f"{stage.entry.name}: {state}")
    return "\n".join(lines)


def as_shell(path: str, overrides: list[str], out: Path, cluster: Cluster | None = None) -> str:
    """Returns the stages as a shell script; with a cluster each is started on all its GPUs. Raises one UserError for all stages
    that cannot run on so many."""
    planned = _planned(path, overrides, out, cluster)
    if cluster is None:
        return "\n".join(["#!/bin/sh", "set -e", *(stage.shell() for stage in planned)])
    start = SCRIPT.format(nodes=cluster.nodes, gpus=cluster.gpus, rendezvous="--standalone" if cluster.nodes == 1 else HEAD)
    return "\n".join([start, *(stage.shell("run") for stage in planned)])


def _planned(path: str, overrides: list[str], out: Path, cluster: Cluster | None) -> list[PlannedStage]:
    _, planned = plan(path, overrides, out)
    mistakes = []
    for stage in planned if cluster else ():
        try:
            _cut(stage.recipe, cluster)
        except UserError as error:
            mistakes.append(f"stage {stage.entry.name}: {error}")
    if mistakes:
        raise UserError("\n".join(mistakes))
    return planned


def _cut(recipe: Recipe, cluster: Cluster | None) -> tuple[int, int, int]:
    """Returns the number of processes, of images of the first one's micro-batch, and of its micro-batches of a step. Raises
    UserError."""
    run = recipe.run
    processes = cluster.nodes * cluster.gpus if cluster else 1
    if run.engine == "local" and processes > 1:
        raise UserError(f"run.engine=local runs one process, not {processes}; set run.engine=deepspeed")
    pieces = recipe.pieces(0, processes)
    return processes, pieces[0].last - pieces[0].first, len(pieces)


def _row(stage: PlannedStage, cluster: Cluster | None) -> tuple[str, ...]:
    run, images = stage.recipe.run, stage.recipe.data.expected
    known = run.samples is not None or images is not None
    steps = f"{run.steps((images or 0) // run.global_batch):,}" if known else run.length
    return (stage.entry.name, stage.entry.program, ", ".join(stage.entry.parents.values()) or "-", steps, f"{run.global_batch:,}",
            _gpus(stage.recipe, cluster))


def _gpus(recipe: Recipe, cluster: Cluster | None = None) -> str:
    """Returns GPUs x images x micro-batches; without a cluster the GPUs that make a step of one micro-batch each."""
    run = recipe.run
    if cluster is None and run.engine != "local":
        return f"{run.global_batch // run.micro_batch} x {run.micro_batch}" if run.micro_batch else "any"
    processes, micro, count = _cut(recipe, cluster)
    return f"{processes} x {micro}" + (f" x {count}" if count > 1 else "")
