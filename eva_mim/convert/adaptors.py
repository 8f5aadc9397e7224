"""A masked stage with the heads of its teachers as one ONNX graph, proved by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva_mim.convert.convert import check_destination, staged
from eva_mim.convert.onnx import session_of, write_graph
from eva_mim.convert.parity import BOUNDS, compare, sample_images
from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256, write_json
from eva_mim.weights.adaptors import BACKBONE, FeatureModel, Output, load


class _Graph(nn.Module):
    """A model that returns summary and patches of the trunk and of each adaptor, as far as they are predicted."""

    def __init__(self, module: FeatureModel, adaptors: Sequence[str]):
        super().__init__()
        self.module, self.adaptors = module, list(adaptors)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(image).values())

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """Returns the outputs by name: "summary" and "spatial", and of each adaptor NAME_summary and NAME_spatial."""
        found: dict[str, Output] = self.module(image, adaptors=self.adaptors)  # type: ignore[assignment]
        named = dict[str, Tensor]()
        for name, output in found.items():
            prefix = "" if name == BACKBONE else f"{name}_"
            named |= {f"{prefix}{what}": value for what, value in output._asdict().items() if value.shape[-1]}
        return named


@torch.no_grad()
def convert_adaptors(src: Path, dst: Path, names: Sequence[str], *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the trunk and the heads of a masked stage as a graph: `image` [B, channels, H, W] from 0 to 1, of the stage's own
    size, B free. Returns the record that lies beside it. Raises UserError, and leaves no file behind, for a folder that is no
    masked stage, an adaptor that it does not have, and a graph whose outputs differ."""
    check_destination(dst, "onnx", overwrite)
    model = load(src)
    if not model.adaptors:
        raise UserError(f"{src}: --adaptors is for a finished masked stage (heads.json)")
    chosen = list(model.adaptors) if list(names) == ["all"] else list(names)
    graph = _Graph(model, chosen).eval()
    size = (model.image_size, model.image_size)
    images = sample_images(size, channels=len(model.mean)).float() / 255
    expected = graph.named(images)
    with staged(dst) as stage:
        path = stage / dst.name
        write_graph(graph, {"image": images[:2]}, list(expected), {"image": {0: torch.export.Dim("images")}}, path)
        session = session_of(path)
        found = session.run(list(expected), {"image": images.numpy()})
        parity = compare(expected, {name: torch.from_numpy(value) for name, value in zip(expected, found, strict=True)},
                         bound=BOUNDS["float32"])
        if not parity.passed:
            raise UserError(f"{src}: the outputs of the graph differ from the stage's; nothing was written\n{parity}")
        record = {
            "source": str(src), "adaptors": chosen, "image_size": list(size), "input": "image, from 0 to 1",
            "parity": parity.as_dict(), "open_with": f"onnxruntime.InferenceSession({str(dst)!r})",
            "files": {file.name: sha256(file) for file in sorted(stage.iterdir())},
        }
        write_json(stage / f"{dst.name}.convert.json", record)
    return record


def report(record: dict[str, Any], dst: Path) -> str:
    """Returns a record as a table."""
    lines = [f"written    {dst}  ({', '.join(record['files'])})", f"input      {record['input']}, {record['image_size'][0]} px"]
    for name, one in record["parity"]["outputs"].items():
        apart = f"largest difference {one['largest']:.3g} of {one['source']:.3g}"
        lines.append(f"output     {name:<20} {list(one['shape'])}  {apart}")
    return "\n".join([*lines, f"open with  {record['open_with']}"]) + "\n"
