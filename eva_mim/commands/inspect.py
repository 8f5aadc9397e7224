"""`eva-mim inspect`: family, sizes and origin of a checkpoint, read from headers alone; none of its code is run."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.core.errors import UserError
from eva_mim.core.run_folder import WEIGHTS
from eva_mim.core.settings import few
from eva_mim.run.program import guard
from eva_mim.weights.files.sidecar import describe, number, text

if TYPE_CHECKING:
    from eva_mim.weights.files.read import Checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Inspects a checkpoint; returns the exit code, 2 for one that is damaged, hostile or unknown."""
    parser = argparse.ArgumentParser(
        prog="eva-mim inspect",
        description="Print the family, sizes and origin of a checkpoint. Only headers are read, and no code in it is run."
    )
    parser.add_argument("path", type=Path, metavar="FILE|DIR", help="safetensors, torch.save's, or a folder of a stage, run, "
                        "timm, open_clip, transformers or DeepSpeed")
    parser.add_argument("--container", metavar="NAME", help="part of a torch file (model_ema, ...) or file of a folder (head)")
    parser.add_argument("--values", action="store_true", help="also read all values: NaN, infinity, recorded checksums")
    parser.add_argument("--json", action="store_true", help="for scripts")
    options = parser.parse_args(argv)

    def work() -> None:
        found = inspect(options.path, options.container, values=options.values)
        sys.stdout.write(json.dumps(found, indent=2) + "\n" if options.json else table(found))

    return guard(work)


def inspect(path: Path, container: str | None = None, *, values: bool = False) -> dict[str, Any]:
    """Returns the facts that `--json` prints, as plain values; None for an unknown one. Raises UserError as `open_checkpoint`
    does."""
    from eva_mim.weights.files.read import open_checkpoint

    opened = open_checkpoint(path, container)
    beside = describe(opened.path)
    record, config = beside.record, beside.config
    family, reason, prefix = _family(opened)
    return {
        "path": str(path),
        "weights": str(opened.path),
        "kind": opened.kind,
        "container": opened.container,
        "containers": list(opened.containers),
        "whole": True,  # opening fails for an incomplete checkpoint
        "family": family,
        "family_unknown": reason,
        "prefix": prefix,
        "stage": _stage(record),
        "parents": {
            str(name): {"path": text(parent, "path"), "sha256": text(parent, "sha256")}
            for name, parent in (record["parents"] if isinstance(record.get("parents"), dict) else {}).items()
        },
        "architecture": _first(
            text(record, "settings", "student", "name"), text(config, "architecture"), text(config, "architectures", 0),
            text(config, "model_type"), text(beside.open_clip, "model_cfg", "vision_cfg", "timm_model_name"),
            opened.facts.get("args.model"), opened.facts.get("arch"),
        ),
        "image_size": _first(
            number(config, "pretrained_cfg", "input_size", 2), number(config, "image_size"),
            number(config, "vision_config", "image_size"), opened.facts.get("args.input_size"),
        ),
        "tensors": len(opened),
        "parameters": sum(entry.elements for entry in opened.entries.values()),
        "bytes": sum(entry.size for entry in opened.entries.values()),
        "dtypes": dict(Counter(opened.dtypes().values()).most_common()),
        "facts": opened.facts,
        "ignored": list(opened.ignored),
        "values": _values(opened, text(record, "weights_sha256")) if values else None,
    }


def table(found: dict[str, Any]) -> str:
    """Returns the same facts as a table."""
    family, stage, others = found["family"], found["stage"], [n for n in found["containers"] if n != found["container"]]
    rows = {
        "weights": found["weights"],
        "kind": found["kind"],
        "container": f"{found['container']}{f'  (also there: {few(others, 3)})' if others else ''}",
        "family": _words(family) if family else f"unknown: {found['family_unknown']}",
        "prefix": f"{found['prefix']}, which is taken off" if found["prefix"] else None,
        "architecture": found["architecture"],
        "image size": f"{found['image_size']} px" if found["image_size"] else None,
        "stage": stage and f"{stage['program']}, {'finished' if stage['finished'] else 'NOT finished'}"
        + (f", {stage['headline']} {stage['figure']:.4g}" if stage["figure"] is not None else ""),
        "parents": few((f"{n} = {one['path']} ({(one['sha256'] or '-')[:12]})" for n, one in found["parents"].items()), 3),
        "parameters": f"{found['parameters'] / 1e6:.2f} M in {found['tensors']} tensors",
        "precision": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in found["dtypes"].items()),
        "size": f"{found['bytes'] / 1e6:.1f} MB",
        "whole": "yes, every declared size fits",
        "beside it": few([f"{name}={value}" for name, value in found["facts"].items()], 6),
        "ignored": few(found["ignored"], 3),
    }
    if values := found["values"]:
        broken = f"{values['nan']} NaN and {values['inf']} infinite in {few(values['tensors'], 3)}"
        rows["values"] = broken if values["tensors"] else "all finite"
        rows["sha256"] = {True: "as recorded", False: "NOT as recorded in lineage.json", None: None}[values["as_recorded"]]
    lines = [f"{name:<14} {value}" for name, value in rows.items() if value]
    return "".join("".join(sign if sign.isprintable() else "?" for sign in line) + "\n" for line in lines)


def _family(opened: Checkpoint) -> tuple[dict[str, Any] | None, str | None, str]:
    """Returns the family, why there is none, and the prefix before the model's names."""
    from eva_mim.weights.names.families import detect
    from eva_mim.weights.names.wrappers import unwrapped

    prefix = ""
    try:
        entries, prefix, _ = unwrapped(opened.entries)
        return asdict(detect(entries)), None, prefix
    except UserError as error:
        return None, str(error).split("\n")[0][:200], prefix


def _words(family: dict[str, Any]) -> str:
    patch = f", patch {family['patch'][0]}x{family['patch'][1]}" if family["patch"] else ""
    return (
        f"{family['name']} {family['form']}, {family['depth']} blocks of width {family['width']}{patch}, "
        f"names of {' or '.join(family['schemes'])}"
    )


def _stage(record: dict[str, Any]) -> dict[str, Any] | None:
    if (program := text(record, "program")) is None:
        return None
    headline = text(record, "headline")
    return {
        "program": program,
        "finished": record.get("finished") is True,
        "steps": number(record, "steps"),
        "headline": headline,
        "figure": number(record, "metrics", headline) if headline else None,
    }


def _values(opened: Checkpoint, recorded: str | None) -> dict[str, Any]:
    """Returns the numbers of NaN and infinite values, and whether the file has the recorded checksum (None: no checksum is
    recorded)."""
    from eva_mim.core.files import sha256

    broken, nan, inf = [], 0, 0
    for name, entry in opened.entries.items():
        tensor = entry.load()
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            wide = tensor if tensor.element_size() > 1 else tensor.float()
            counts = int(wide.isnan().sum()), int(wide.isinf().sum())
            nan, inf = nan + counts[0], inf + counts[1]
            broken += [name] if any(counts) else []
    own = recorded is not None and opened.path.name == WEIGHTS and opened.path.parent.name != "ema"
    return {"nan": nan, "inf": inf, "tensors": broken, "as_recorded": sha256(opened.path) == recorded if own else None}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
