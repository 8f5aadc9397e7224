"""Target formats, one record each. Functions are named by text, as in `registry.py`, so that this file imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_mim.core.registry import load

if TYPE_CHECKING:
    from eva_mim.convert.writers import Model

TORCH_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Format:
    """A file or folder for another program, with the functions that write it and run it for the proof, and the line that opens
    it."""

    name: str
    help: str
    """Text of `eva-mim convert --help`: file or folder, and the line that opens it."""
    write: str
    """"module:function" of (Model, file or existing empty folder, dtype of the floating tensors; None: the source's) ->
    KeyReport of the changes made in writing."""
    client: Callable[[Model, Path], str]
    """Function of (Model, result) that returns the line that opens the result."""
    run: str = "eva_mim.convert.verify:reopened"
    """"module:function" of (result, Model, normalised images [B, channels, H, W], token ids [B, L] or None) -> outputs, under
    the names of `parity.outputs`."""
    suffixes: tuple[str, ...] = ()
    """Suffixes of a file; none for a folder."""
    whole: bool = True
    """True if a CLIP model is written whole; False if its trunk alone is."""
    outside: bool = False
    """True if a masked model's tensors outside the trunk are written as well."""

    def writer(self) -> Callable[[Model, Path, str | None], Any]:
        """Imports and returns the function of `write`."""
        found: Callable[[Model, Path, str | None], Any] = load(self.write)
        return found

    def runner(self) -> Callable[..., dict[str, Any]]:
        """Imports and returns the function of `run`."""
        found: Callable[..., dict[str, Any]] = load(self.run)
        return found


def _by_name(model: Model, dst: Path) -> str:
    return model.architecture.client(str(dst))


def _as_folder(model: Model, dst: Path) -> str:
    library = "open_clip" if model.trunk else "timm"
    return f"{library}.create_model({f'local-dir:{dst}'!r}{'' if model.trunk else ', pretrained=True'})"


_WRITE = "eva_mim.convert.writers:write_"
FORMATS = {form.name: form for form in (
    Format("safetensors", "folder as a stage of ours leaves it: init_from=DST", _WRITE + "stage", outside=True,
           client=lambda model, dst: f"init_from={dst}"),
    Format("timm", "file: timm.create_model(NAME, checkpoint_path=DST)", _WRITE + "file", _by_name, whole=False,
           suffixes=(".safetensors", *TORCH_SUFFIXES)),
    Format("open_clip", "file: open_clip.create_model_and_transforms(NAME, pretrained=DST)", _WRITE + "open_clip", _by_name,
           suffixes=(".safetensors", *TORCH_SUFFIXES)),
    Format("eva", "file under the original code's names: torch.load(DST)", _WRITE + "eva", outside=True,
           client=lambda model, dst: f"torch.load({str(dst)!r}, weights_only=True)", suffixes=TORCH_SUFFIXES),
    Format("hf", 'folder: timm.create_model("local-dir:DST", pretrained=True), transformers.AutoModel.from_pretrained(DST);\n'
           'a CLIP model: open_clip.create_model("local-dir:DST")', _WRITE + "folder", _as_folder),
    Format("transformers", "folder of OpenAI's CLIP, or of a plain ViT (as DINOv2): transformers.AutoModel.from_pretrained(DST)",
           _WRITE + "transformers", lambda model, dst: f"transformers.AutoModel.from_pretrained({str(dst)!r})",
           "eva_mim.convert.verify:by_transformers"),
    Format("onnx", "file for onnxruntime: fixed image size, any batch", _WRITE + "onnx",
           lambda model, dst: f"onnxruntime.InferenceSession({str(dst)!r})", "eva_mim.convert.verify:by_onnxruntime", (".onnx",)),
)}
"""Name for `--to` -> format."""
