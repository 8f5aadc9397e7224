"""Summary of a pipeline's results: `summary.md`, and the same on the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from eva_mim.core.files import write_text
from eva_mim.core.log import duration
from eva_mim.core.run_folder import CLIP_CONFIG, TIMM_CONFIG, RunFolder
from eva_mim.trunks import small, vitamin

if TYPE_CHECKING:
    from eva_mim.pipeline.plan import PlannedStage


WIDTH = 80
"""Columns of the table where there is no terminal."""
PERCENT = re.compile(r"top\d|_r\d")
"""Names of figures in percent, whose differences are points; cosines are not."""


def write_summary(out: Path, planned: list[PlannedStage], compare: list[list[str]]) -> None:
    """Writes OUT/summary.md and prints the same: figures and folder of each stage, and the lines of Python that open each
    result."""
    records = {stage.entry.name: RunFolder(stage.out).record() for stage in planned}
    rows = [_row(stage, records[stage.entry.name]) for stage in planned]
    header = ("stage", "program", "starts from", "samples", "time", "reached", "folder")
    table = Table(title=f"Pipeline {out}, a folder for each stage", title_justify="left")
    shown = [place for place, name in enumerate(header) if name not in ("program", "folder")]  # what fits into 80 columns
    names = min(20, max(len(row[0]) for row in rows))  # a longer name of a stage is folded, so that the others keep their room
    for place in shown:
        width = names if header[place] == "stage" else None
        table.add_column(header[place], overflow="fold", width=width, no_wrap=header[place] == "reached")
    for row in rows:
        table.add_row(*(row[place].replace(", ", "\n") for place in shown))
    verdicts = [line for group in compare for line in _compare(group, records)]
    code = list(dict.fromkeys(line for stage in planned for line in _python(stage)))
    console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(table)
    for line in verdicts:
        console.print(line, highlight=False)
    console.print("\nOpen the results in Python:", *code, sep="\n", highlight=False, markup=False, soft_wrap=True)
    text = ["# Summary", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    text += ["| " + " | ".join(row) + " |" for row in rows]
    text += ["", *(f"- {line}" for line in verdicts), "", "```python", *code, "```", ""]
    write_text(out / "summary.md", "\n".join(text))
    console.print(f"\nThis table: {out / 'summary.md'}; curves: tensorboard --logdir {out}", highlight=False, soft_wrap=True)


def _row(stage: PlannedStage, record: dict[str, Any]) -> tuple[str, ...]:
    entry = stage.entry
    teachers = [f"teacher {name}" for name in (entry.teacher, *entry.teachers.values()) if name]
    origin = ", ".join([*filter(None, [entry.init_from]), *teachers]) or "scratch"
    return (
        entry.name,
        entry.program,
        origin,
        f"{record['samples_seen']:,}",
        duration(record["seconds"]),
        ", ".join(f"{name} {value:.4g}" for name, value in _chosen(record).items()),
        str(stage.out),
    )


def _chosen(record: dict[str, Any]) -> dict[str, float]:
    """Returns the headline figure first, then the other figures for the table, if they exist."""
    metrics: dict[str, float] = record["metrics"]
    wanted = [record["headline"], "cosine_of_mean", "knn_top1", "image_to_text_r1", f"ema_{record['headline']}"]
    return {name: metrics[name] for name in dict.fromkeys(wanted) if name in metrics}


def _compare(group: list[str], records: dict[str, dict[str, Any]]) -> list[str]:
    first, *others = group
    name = records[first]["headline"]
    value = records[first]["metrics"][name]
    lines = []
    for other in others:
        theirs = records[other]["metrics"][name]
        if PERCENT.search(name):
            lines.append(f"{name}: {first} {value:.2f}, {other} {theirs:.2f}: {value - theirs:+.2f} points")
        else:
            lines.append(f"{name}: {first} {value:.4f}, {other} {theirs:.4f}: {value - theirs:+.4f}")
    return lines


def _python(stage: PlannedStage) -> list[str]:
    """Returns the lines of Python that open a result. Architectures of our own that the library does not have need an import."""
    clip, name = stage.entry.program == "clip", stage.entry.name
    config = json.loads((stage.out / (CLIP_CONFIG if clip else TIMM_CONFIG)).read_text())
    architecture = config["model_cfg"]["vision_cfg"]["timm_model_name"] if clip else config["architecture"]
    own = []
    if architecture in small.default_cfgs:
        own = ["import eva_mim.trunks.small  # makes the small architectures known to timm"]
    if vitamin.NAME.fullmatch(architecture):
        own = [f"from eva_mim.trunks.vitamin import register; register({architecture!r})"]
    opens = f'import timm; {name} = timm.create_model("local-dir:{stage.out}", pretrained=True)'
    if clip:
        opens = f'import open_clip; {name}, preprocess = open_clip.create_model_from_pretrained("local-dir:{stage.out}")'
    return [*own, opens]
