"""Export of models to ONNX graphs of one image size and any batch size, and running them with onnxruntime on the CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.convert.parity import outputs
from eva_mim.core.errors import UserError
from eva_mim.core.files import fsync

OPSET = 20
"""The first operator set with Gelu as one operator; for older ones the exporter writes the formula."""
EMBEDDED = 1 << 30
"""Bytes of weights up to which they lie inside the file (protobuf ends at 2 GiB); larger weights lie in NAME.onnx.data beside
it."""
NAMES = {"tokens": "tokens", "answer": "output", "image": "image_features", "text": "text_features", "scale": "logit_scale",
         "bias": "logit_bias"}
"""Outputs of a model (`parity.outputs`) -> outputs of its graph, whose inputs already have the names image and text."""


class _Graph(nn.Module):
    """A model that returns the outputs of `parity.outputs`, in the order of their names."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, image: Tensor, text: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(outputs(self.module, image, text).values())


@torch.no_grad()  # with gradients the exporter's second pass takes another kernel of attention, and fails on Beit
def export(module: Any, path: Path, image_size: tuple[int, int], *, channels: int = 3, opset: int = OPSET) -> list[Path]:
    """Writes a float32 model of timm or open_clip as a graph, and returns the files: one, or two if the weights exceed 1 GiB.

    Inputs are `image` [B, channels, H, W] normalised float32 and, for a CLIP model, `text` [T, L] int64; B and T are free.
    Outputs are those of `parity.outputs` under the names of `NAMES`. The exporter holds the weights in memory. Raises UserError
    if a library is missing, and for a model that cannot be exported.
    """
    _require("onnx", "onnxscript")
    examples: dict[str, Tensor] = {"image": torch.zeros(2, channels, *image_size)}
    free = {"image": {0: torch.export.Dim("images")}}
    if hasattr(module, "encode_text"):
        examples["text"] = torch.zeros(3, module.context_length, dtype=torch.long)
        free["text"] = {0: torch.export.Dim("texts")}
    names = [NAMES[name] for name in outputs(module, *examples.values())]
    return write_graph(_Graph(module).eval(), examples, names, free, path, opset)


@torch.no_grad()
def write_graph(
    graph: nn.Module, examples: dict[str, Tensor], names: list[str], free: dict[str, Any], path: Path, opset: int = OPSET
) -> list[Path]:
    """Writes a module that returns a tuple of tensors as a graph with these names of outputs; returns the files. `examples`:
    inputs by name; `free`: their free dimensions. Raises UserError as `export`."""
    _require("onnx", "onnxscript")
    import onnx

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        made = Path(folder) / path.name  # under the final name, because the graph names the file of its weights
        try:
            with _quiet():
                program = torch.onnx.export(
                    graph, tuple(examples.values()), input_names=list(examples), output_names=names, dynamic_shapes=free,
                    opset_version=opset, dynamo=True, verbose=False,
                )
                assert program is not None
                program.save(made, external_data=sum(value.nbytes for value in graph.parameters()) > EMBEDDED)
                onnx.checker.check_model(made, full_check=True)
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise UserError(f"{type(getattr(graph, 'module', graph)).__name__} cannot be exported to ONNX: {reason}") from error
        files = sorted(made.parent.iterdir(), key=lambda file: file.name == path.name)  # the graph last
        for file in files:
            fsync(file)
            file.replace(path.parent / file.name)
    return [path.parent / file.name for file in files]


def runner(path: Path, threads: int = 1) -> Callable[[Tensor, Tensor | None], dict[str, Tensor]]:
    """Returns a function of (normalised images [B, channels, H, W], token ids [T, L] or None) that returns the outputs of
    `parity.outputs`, computed by onnxruntime."""
    session = session_of(path, threads)
    names = {output: name for name, output in NAMES.items()}

    def run(images: Tensor, tokens: Tensor | None = None) -> dict[str, Tensor]:
        given = {"image": images.contiguous().numpy()} | ({} if tokens is None else {"text": tokens.numpy()})
        wanted = [output.name for output in session.get_outputs()]
        found = session.run(wanted, given)
        return {names[name]: torch.from_numpy(value) for name, value in zip(wanted, found, strict=True)}

    return run


def session_of(path: Path, threads: int = 1) -> Any:
    """Returns a session of onnxruntime on the CPU. Raises UserError if it is missing."""
    _require("onnxruntime")
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _require(*libraries: str) -> None:
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise UserError(f"--to onnx needs {' and '.join(missing)}: pip install 'eva-mim[onnx]'")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the exporter's messages."""
    before, silent = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
