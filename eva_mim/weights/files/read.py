"""Foreign checkpoints, opened without running their code and read tensor by tensor.

    weights = open_checkpoint("eva_psz14.pt")       # or a folder; see `open_checkpoint`
    weights.shapes()["pos_embed"]                   # a shape; only headers were read
    weights["pos_embed"]                            # a tensor
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256
from eva_mim.core.run_folder import CLIP_WEIGHTS, WEIGHTS, RunFolder, is_complete
from eva_mim.weights.files.allowlist import Stored, Stub
from eva_mim.weights.files.formats import MAX_TENSORS, TorchFile, read_file, read_json
from eva_mim.weights.files.tensors import Entry
from eva_mim.weights.files.zero import is_zero_folder, read_zero

if TYPE_CHECKING:
    from torch import Tensor

V = TypeVar("V")
CONTAINERS = ("model", "module", "state_dict", "model_ema")
"""Keys of a torch file that hold weights, in the order of preference: EVA's, DeepSpeed's, open_clip's. `model_ema` comes last:
weights other than the trained ones are taken only on request, or if the file has no others."""
BARE = "bare"
"""Container name of a torch file that is itself a state dict."""
WRAPPER = "module."
"""Prefix of every name that torch's DistributedDataParallel saves."""
FOLDER_FILES = (
    WEIGHTS, CLIP_WEIGHTS, "open_clip_pytorch_model.bin", "pytorch_model.bin",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)
"""Weight files of a folder, in the order of preference: ours and timm's, open_clip's, transformers'."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MODULE_FILE = "module.safetensors"
"""The weights in a checkpoint of a run."""
MAX_NAME = 500
"""Characters of a tensor's name."""
MAX_SHARING = 16
"""Largest ratio of the tensors' bytes to the files' bytes; tensors may share elements. (A model with a table shared by 24
blocks stays below 2; a small file that declares terabytes does not.)"""


@dataclass(frozen=True)
class Checkpoint(Mapping[str, "Tensor"]):
    """Tensors by name, in the order of the file. Indexing reads a tensor anew each time: contiguous, on the CPU, in memory of
    its own. Raises UserError for damaged values."""

    path: Path
    """The file or folder that holds the tensors."""
    kind: str
    """Format of the file: "safetensors", "torch", "TorchScript", "DeepSpeed ZeRO 2, 4 ranks", ..."""
    entries: dict[str, Entry]
    container: str
    """The opened part of the file or folder."""
    containers: tuple[str, ...]
    """All parts of the file or folder."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values beside the tensors (epoch, args.model, format, ...)."""
    ignored: tuple[str, ...] = ()
    """Names in the container whose values are no tensors."""

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own method would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor, without reading any."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def dtypes(self) -> dict[str, str]:
        """Returns torch's dtype name ("float32", ...) of each tensor, without reading any."""
        return {name: entry.dtype for name, entry in self.entries.items()}


def open_checkpoint(path: str | Path, container: str | None = None) -> Checkpoint:
    """Opens a checkpoint of any supported format.

    A file may be safetensors, an index of shards (`*.index.json`), any file of torch.save, or a module of torch.jit.save, such as
    OpenAI's CLIP releases; the content decides the format, not the name. A folder may be that of one of our stages, of timm,
    open_clip or transformers, a run (its newest checkpoint is opened), one `checkpoints/step-*`, or DeepSpeed's (ZeRO 0 to 3;
    fp32 weights are rebuilt). `container` names the part of a torch file ("model", "module", "state_dict", "model_ema", "bare",
    or any other key), tensors whose names begin with it and a dot, or the weight file of a folder without its ending ("head").

    The prefix `module.` of a data-parallel wrapper is removed from names. Raises UserError for a missing, damaged, hostile or
    unknown checkpoint.
    """
    path = Path(path)
    try:
        with _without_collector():
            if path.is_dir():
                return _open_folder(path, container)
            if not path.is_file():
                raise UserError(f"{path} does not exist")
            index = path.name.endswith(".index.json")
            return _checked(_open_index(path, container) if index else _open_file(path, container))
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Stops Python's collector of cycles, which would scan a growing million of records again and again, half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _open_file(path: Path, container: str | None) -> Checkpoint:
    found = read_file(path)
    if isinstance(found, TorchFile):
        return _choose(path, found, container)
    metadata = found.pop("__metadata__")
    if container not in (None, BARE):
        found = _named_so(found, container)
        if not found:
            raise UserError(f"{path}: a safetensors file has no container {container!r}, and no name begins with {container}.")
    return Checkpoint(path, "safetensors", found, container or BARE, (BARE,), plain_facts(metadata))


def _named_so(entries: dict[str, V], container: str) -> dict[str, V]:
    """Returns the values whose names begin with a container's name and a dot, without that."""
    prefix = f"{container}."
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _choose(path: Path, file: TorchFile, container: str | None) -> Checkpoint:
    """Returns the state dict inside a torch file as a Checkpoint."""
    tree = file.value
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds a {type(tree).__name__}, not a state dict")
    parts = {name: value for name, value in tree.items() if isinstance(name, str) and _tensors(value)}
    if _tensors(tree):
        parts[BARE] = tree
    known = [name for name in CONTAINERS if name in parts] or [name for name in parts if name == BARE or len(parts) == 1]
    chosen = container or next(iter(known), None)
    if chosen is not None and chosen not in parts and BARE in parts:  # {"teacher.blocks.0...": ...}
        below = {name: value for name, value in tree.items() if isinstance(name, str) and name.startswith(f"{chosen}.")}
        parts |= {chosen: _named_so(below, chosen)} if _tensors(below) else {}
    if chosen not in parts:
        said = f"{path}: no container {container!r}." if container else f"{path}: which part shall be read?"
        raise UserError(f"{said} It holds tensors in: {', '.join(repr(name)[:60] for name in list(parts)[:12]) or 'nothing'}")
    named = {name: value for name, value in parts[chosen].items() if isinstance(name, str) and isinstance(value, Stored)}
    entries = file.place(named)
    if all(name.startswith(WRAPPER) for name in entries):
        entries = {name.removeprefix(WRAPPER): entry for name, entry in entries.items()}
    ignored = tuple(str(name)[:100] for name in parts[chosen] if name not in named)
    return Checkpoint(path, file.kind, entries, chosen, tuple(parts), plain_facts(tree), ignored)


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(name, str) and isinstance(item, Stored) for name, item in value.items())


def plain_facts(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the short texts and numbers of a mapping, and of pickled settings inside, by dotted name; all other values are
    left out."""
    facts: dict[str, Any] = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, (str, int, float)) and isinstance(name, str) and name.isidentifier() and len(facts) < 1000:
            infinite = isinstance(value, float) and not math.isfinite(value)
            facts[prefix + name] = str(value)[:200] if infinite or isinstance(value, str) else value
        elif isinstance(value, Stub) and isinstance(value.state, dict) and not prefix:
            facts |= plain_facts(value.state, f"{str(name)[:60]}.")
    return facts


def _open_index(path: Path, container: str | None) -> Checkpoint:
    """Opens the shards that an index names. Raises UserError unless they lie beside the index."""
    tree = read_json(path)
    names = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(names, dict) or not names or container not in (None, BARE):
        raise UserError(f"{path}: not an index of shards (no weight_map), or it has no container {container!r}")
    shards: dict[str, Checkpoint] = {}
    for shard in names.values():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or shard == "..":
            raise UserError(f"{path}: names the shard {shard!r:.100}, which is outside its folder")
        if shard not in shards:
            if not (path.parent / shard).is_file():
                raise UserError(f"{path}: the shard {shard!r} is missing")
            shards[shard] = _open_file(path.parent / shard, None)
    if lost := [name for name, shard in names.items() if name not in shards[shard].entries]:
        raise UserError(f"{path}: {names[lost[0]]} does not hold {lost[0][:100]!r}")
    kind = next(iter(shards.values())).kind
    entries = {name: shards[shard].entries[name] for name, shard in names.items()}
    return Checkpoint(path, f"{kind}, {len(shards)} shards", entries, BARE, (BARE,), plain_facts(tree.get("metadata")))


def _open_folder(folder: Path, container: str | None) -> Checkpoint:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in WEIGHT_SUFFIXES)
    if (folder / "latest").is_file():
        return _open_zero(folder / _tag(folder), container)
    if is_zero_folder(folder):
        return _open_zero(folder, container)
    if (folder / MODULE_FILE).is_file():
        _complete(folder)
    named = [folder / name for name in (*FOLDER_FILES, MODULE_FILE) if (folder / name).is_file()]
    if container is not None:
        named = [path for path in files if path.stem == container] or named
    if chosen := named or (files if len(files) == 1 else []):
        stems = tuple(path.stem for path in files)
        inner = None if chosen[0].stem == container else container
        opened = open_checkpoint(chosen[0], inner)
        return opened if inner else _replace(opened, chosen[0].stem, stems)
    if files:
        raise UserError(f"{folder}: several weight files; name one: {', '.join(path.name[:60] for path in files[:12])}")
    if (found := RunFolder(folder.parent if folder.name == "checkpoints" else folder).latest()) is not None:
        return _open_folder(found[1], container)
    looked = f"{', '.join(FOLDER_FILES)}, DeepSpeed's files, a run's checkpoints"
    raise UserError(f"{folder}: no checkpoint that is known here (looked for {looked})")


def _replace(opened: Checkpoint, container: str, containers: tuple[str, ...]) -> Checkpoint:
    if opened.container != BARE or len(containers) < 2:
        return opened
    return Checkpoint(opened.path, opened.kind, opened.entries, container, containers, opened.facts, opened.ignored)


def _complete(folder: Path) -> None:
    if not is_complete(folder):
        raise UserError(f"{folder}: not whole: a file of its manifest is missing or of another size")


def _tag(folder: Path) -> str:
    with (folder / "latest").open("rb") as file:
        tag = file.read(MAX_NAME).decode(errors="replace").strip()
    if Path(tag).name != tag or tag in ("", "..") or "\0" in tag or not (folder / tag).is_dir():
        raise UserError(f"{folder / 'latest'}: names the folder {tag[:100]!r}, which is not in {folder}")
    return tag


def _open_zero(folder: Path, container: str | None) -> Checkpoint:
    if container not in (None, "module"):
        raise UserError(f"{folder}: a DeepSpeed folder has no container {container!r}")
    kind, entries, tree = read_zero(folder)
    return _checked(Checkpoint(folder, kind, entries, "module", ("module",), plain_facts(tree)))


def _checked(opened: Checkpoint) -> Checkpoint:
    """Returns the checkpoint. Raises UserError if it breaks a limit that holds for every format."""
    if not opened.entries:
        raise UserError(f"{opened.path}: no tensors")
    if len(opened.entries) > MAX_TENSORS:
        raise UserError(f"{opened.path}: more than {MAX_TENSORS:,} tensors")
    for name in opened.entries:
        leading = name == "" or ("/" in name and not {"", ".", ".."}.isdisjoint(name.split("/")))
        if leading or len(name) > MAX_NAME or not name.isprintable() or "\\" in name:
            raise UserError(f"{opened.path}: a tensor is named {name[:100]!r}: empty, too long, or like a path out of here")
    files = {piece.file for entry in opened.entries.values() for piece in entry.pieces}
    whole = sum(file.stat().st_size for file in files)
    if sum(entry.size for entry in opened.entries.values()) > MAX_SHARING * whole:
        raise UserError(f"{opened.path}: its tensors are more than {MAX_SHARING} times as large as its {whole} bytes")
    return opened


def content_hash(path: str | Path, container: str | None = None) -> str:
    """Returns the SHA-256 of the files that hold a checkpoint's tensors: of the one file, or of the hashes of several, in
    order of their names."""
    opened = open_checkpoint(path, container)
    files = sorted({piece.file for entry in opened.entries.values() for piece in entry.pieces})
    hashes = [sha256(file) for file in files]
    return hashes[0] if len(files) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
