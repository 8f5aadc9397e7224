"""The dump of a run that diverged: a folder with everything needed to run its last step again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from eva_mim.core.batches import Batch
from eva_mim.core.contracts import Engine
from eva_mim.core.distributed import barrier, grouped, is_main, world_size
from eva_mim.core.files import write_json, write_weights
from eva_mim.core.run_folder import RunFolder
from eva_mim.engine import RunSettings
from eva_mim.run.diagnose import Layers, diagnose, largest_of

RECORD, DUMPED = "dump.json", "weights.safetensors"
"""Files of a dump, beside its `resolved.yaml`: facts of the step, and the student's weights."""
STATISTICS = "statistics.safetensors"
"""Running statistics of the task, if it has any, under the names of the checkpoint's file and of the tensor."""


def write_dump(
    out: Path, engine: Engine, parts: Any, run: RunSettings, bad: list[tuple[int, int]], batches: list[Batch]
) -> Path:
    """Writes `OUT/dumps/step-.../` and returns its path. `bad`: (step, data step) of each of the consecutive skipped steps.

    Every rank must call, with its own micro-batches of the last step.
    """
    step, data_step = bad[-1]
    folder = RunFolder(out).dump(step)
    with engine.full_module() as module:
        layers = _over_ranks([diagnose(parts.task, module, batch, engine.autocast).layers for batch in batches])
    weights = dict(engine.weights())
    statistics = {f"{file}.{name}": group.read(name).cpu() for file, group in parts.task.state().items() for name in group.kinds}
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RunFolder(out).settings, RunFolder(folder).settings)
        write_weights(folder / DUMPED, weights)
        if statistics:
            write_weights(folder / STATISTICS, statistics)
        record = {
            "program": RunFolder(out).record()["program"],
            "step": step,
            "seed": run.seed,
            "processes": world_size(),
            "micro_batches": len(batches),
            "loss_scale": engine.loss_scale(),
            "data_step": data_step,
            "samples": {str(at): parts.train.samples(at) for _, at in bad},
            "layers": layers,
        }
        write_json(folder / RECORD, record)
    barrier()
    return folder


def _over_ranks(found: list[Layers]) -> Layers:
    """Returns the largest values over micro-batches and ranks."""
    if grouped():
        everywhere: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(everywhere, found)
        found = [layers for rank in everywhere for layers in rank]
    return largest_of(found)
