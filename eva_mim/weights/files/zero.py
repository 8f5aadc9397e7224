"""Full fp32 weights from a DeepSpeed folder of ZeRO 0 to 3, piece by piece, without DeepSpeed and without running its pickles.

The layout is DeepSpeed 0.19's (its `utils/zero_to_fp32.py` rebuilds the same, but unpickles freely). With ZeRO 1 and 2 a group of
parameters is one flat vector, cut into one part per rank; with ZeRO 3 each parameter is cut by itself.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from eva_mim.core.errors import UserError
from eva_mim.weights.files.allowlist import DTYPES, Stored, Stub, sizes
from eva_mim.weights.files.formats import TorchFile, read_file
from eva_mim.weights.files.tensors import Entry, Piece, cut

FLAT = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
"""ZeRO stage -> key of a rank's part of the fp32 weights in its optimizer file."""
PLAIN = "give the file mp_rank_00_model_states.pt itself for weights in training precision (not with ZeRO 3)"


def is_zero_folder(folder: Path) -> bool:
    """True if the folder holds DeepSpeed's model states."""
    return any(folder.glob("*mp_rank_*_model_states.pt"))


def read_zero(folder: Path) -> tuple[str, dict[str, Entry], dict[str, Any]]:
    """Returns (format, tensors in the module's order, plain values beside them). Raises UserError for shards that do not fit
    together."""
    if any(folder.glob("*mp_rank_01_model_states.pt")):
        raise UserError(f"{folder}: split over model-parallel ranks, which is not supported; merge it with the trainer's tool")
    models = _ranks(folder, "model_states")
    main = _open(models[0])
    optimizers = _ranks(folder, "optim_states", wanted=False)
    try:
        if not optimizers:
            if main.value.get("param_shapes") or len(models) > 1:
                raise UserError(f"{folder}: the optimizer files, which hold the fp32 weights of ZeRO, are missing; {PLAIN}")
            return "DeepSpeed ZeRO 0", _module(main), main.value
        stage, parts, paddings = _parts(folder, optimizers)
        shards = [main, *(_open(path) for path in models[1:])] if stage == 3 else [main]
        if stage == 3 and len(shards) != len(parts):
            raise UserError(f"{folder}: {len(shards)} model files for {len(parts)} ranks")
        shapes = [{name: sizes(shape) for name, shape in group.items()} for group in main.value["param_shapes"]]
        trained = _whole(shapes, parts) if stage == 3 else _grouped(shapes, parts, paddings)
        # ZeRO 1 stores parameters that are not trained in the module alone; the module is full except with ZeRO 3.
        entries = ({} if stage == 3 else _module(main)) | _buffers(main) | _frozen(shards) | trained
        shared = main.value.get("shared_params") or {}
        for name, other in shared.items() if isinstance(shared, dict) else shared:
            entries[_word(name)] = entries[_word(other)]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise error if str(folder) in str(error) else UserError(f"{folder}: {error}") from None
        raise UserError(f"{folder}: not the supported layout of DeepSpeed's ZeRO ({error!r:.80}); {PLAIN}") from None
    names = [name for name, value in main.value["module"].items() if isinstance(value, Stored)]
    if missing := [name for name in names if name not in entries]:
        raise UserError(f"{folder}: no shard holds {missing[0][:100]!r}")
    ordered = {name: entries[name] for name in names}
    return f"DeepSpeed ZeRO {stage}, {len(parts)} ranks", ordered | entries, main.value


def _ranks(folder: Path, what: str, wanted: bool = True) -> list[Path]:
    """Returns the files in the order of their ranks. Raises UserError if a rank's file is missing."""
    numbered = {}
    for path in folder.glob(f"*mp_rank_00_{what}.pt"):
        rank = re.search(r"zero_pp_rank_(\d{1,6})_mp_rank_00", path.name)
        numbered[int(rank[1]) if rank else 0] = path
    if sorted(numbered) != list(range(len(numbered))) or (wanted and not numbered):
        raise UserError(f"{folder}: files of ranks {sorted(numbered)} ({what}): some are missing")
    return [numbered[rank] for rank in sorted(numbered)]


def _open(path: Path) -> TorchFile:
    found = read_file(path)
    if not isinstance(found, TorchFile) or not isinstance(found.value, dict):
        raise UserError(f"{path}: not a file of DeepSpeed's")
    return found


def _parts(folder: Path, paths: list[Path]) -> tuple[int, list[list[Piece]], Any]:
    """Returns (ZeRO stage, each rank's flat fp32 vectors, each group's numbers of padding elements after its parameters)."""
    parts, stage, paddings = [], 0, None
    for path in paths:
        file = _open(path)
        state = file.value["optimizer_state_dict"]
        named = state["zero_stage"]
        stage = _number(named.arguments[0] if isinstance(named, Stub) else named)
        ranks, paddings = state["partition_count"], state.get("param_alignment_paddings")
        count = max(map(_number, ranks)) if isinstance(ranks, list) else _number(ranks)
        if stage not in FLAT or count != len(paths):
            raise UserError(f"{path}: ZeRO {stage} on {count} ranks, but {len(paths)} optimizer files; some are missing")
        flat = file.place(dict(enumerate(state[FLAT[stage]]))).values()
        if any(entry.dtype != "float32" or len(entry.shape) != 1 or entry.stride for entry in flat):
            raise UserError(f"{path}: its weights are not flat fp32 vectors")
        parts.append([entry.pieces[0] for entry in flat])
    if len({len(part) for part in parts}) != 1:
        raise UserError(f"{folder}: the ranks disagree on the number of parameter groups")
    return stage, parts, paddings


def _grouped(groups: list[dict[str, tuple[int, ...]]], parts: list[list[Piece]], paddings: Any) -> dict[str, Entry]:
    """Returns the parameters of ZeRO 1 and 2: a group's parameters follow each other in the vector that the ranks' parts form."""
    entries = {}
    if len(groups) != len(parts[0]):
        raise UserError(f"shapes of {len(groups)} groups of parameters, but {len(parts[0])} vectors")
    for number, shapes in enumerate(groups):
        vector, at = [part[number] for part in parts], 0
        for (name, shape), free in zip(shapes.items(), paddings[number] if paddings else [0] * len(shapes), strict=True):
            size = math.prod(shape) * DTYPES["float32"]
            entries[name], at = Entry("float32", shape, cut(vector, at, size)), at + size + _number(free) * DTYPES["float32"]
        padding = (sum(piece.size for piece in vector) - at) // DTYPES["float32"]
        if padding >= 2 * len(parts):  # DeepSpeed pads a group to a multiple of that
            raise UserError(f"group {number} has {padding} elements more than its shapes need")
    return entries


def _whole(groups: list[dict[str, tuple[int, ...]]], parts: list[list[Piece]]) -> dict[str, Entry]:
    """Returns the parameters of ZeRO 3: every rank holds its share of each parameter, in the same order."""
    entries, at, ranks = {}, 0, len(parts)
    for name, shape in (item for shapes in groups for item in shapes.items()):
        count = math.prod(shape)
        share, pieces, left = -(-count // ranks), list[Piece](), count
        for part in parts:
            size = min(share, left) * DTYPES["float32"]
            pieces += cut(part, at, size)
            left -= size // DTYPES["float32"]
        entries[name], at = Entry("float32", shape, tuple(pieces)), at + share * DTYPES["float32"]
    if at != sum(piece.size for piece in parts[0]):
        raise UserError(f"the ranks hold {sum(piece.size for piece in parts[0])} bytes each, the shapes need {at}")
    return entries


def _number(value: Any) -> int:
    """Returns a value of a pickle that must be an integer. Raises TypeError for any other type."""
    if type(value) is not int:
        raise TypeError("a number was expected")
    return value


def _word(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("a name was expected")
    return value


def _module(main: TorchFile) -> dict[str, Entry]:
    """Returns the module's own tensors, in training precision."""
    return main.place({name: value for name, value in main.value["module"].items() if isinstance(value, Stored)})


def _buffers(main: TorchFile) -> dict[str, Entry]:
    return main.place({name: main.value["module"][name] for name in map(_word, main.value["buffer_names"])})


def _frozen(shards: list[TorchFile]) -> dict[str, Entry]:
    """Returns the parameters that are not trained, which lie beside the module: full, or with ZeRO 3 a share in each rank's
    file."""
    entries = {}
    for name, shape in (shards[0].value.get("frozen_param_shapes") or {}).items():
        found = [shard.place({0: shard.value["frozen_param_fragments"][name]})[0] for shard in shards]
        size = math.prod(sizes(shape)) * DTYPES[found[0].dtype]
        entries[name] = Entry(found[0].dtype, shape, cut([piece for entry in found for piece in entry.pieces], 0, size))
    return entries
