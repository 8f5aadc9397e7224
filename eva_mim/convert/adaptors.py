"""A stage with its heads as one ONNX graph, proved by onnxruntime: a masked stage's for teachers, a segmentation stage's; or with
one for a teacher as a vision tower of transformers, proved by that library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from eva_mim.convert.convert import check_destination, staged
from eva_mim.convert.onnx import session_of, write_graph
from eva_mim.convert.parity import BOUNDS, compare, sample_images
from eva_mim.core.errors import UserError
from eva_mim.core.files import sha256, write_json
from eva_mim.core.run_folder import HEADS_CONFIG, PROGRAM, SEGMENTATION, TIMM_CONFIG
from eva_mim.trunks.pixels import normalise
from eva_mim.weights.adaptors import BACKBONE, FeatureModel, HeadsFacts, Output, load
from eva_mim.weights.files.formats import read_json
from eva_mim.weights.names.huggingface import preprocessor


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
    images = sample_images((model.image_size, model.image_size), channels=len(model.mean)).float() / 255
    return _proved_graph(graph, images, graph.named(images), src, dst, {"adaptors": chosen})


@torch.no_grad()
def convert_segmenter(src: Path, dst: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes a finished segmentation stage as a graph: `image` [B, channels, S, S] from 0 to 1, of the stage's own size S, B
    free; `scores` [B, K, S, S]. Returns the record that lies beside it. Raises UserError, and leaves no file behind, if its
    outputs differ."""
    check_destination(dst, "onnx", overwrite)
    about, channels = read_json(src / SEGMENTATION), read_json(src / TIMM_CONFIG)["pretrained_cfg"]["input_size"][0]
    program = torch.export.load(src / PROGRAM).module()
    images = sample_images((about["image_size"],) * 2, channels=channels).float() / 255
    return _proved_graph(program, images, {"scores": program(images)}, src, dst, {"classes": about["classes"]})


def _proved_graph(
    graph: nn.Module, images: Tensor, expected: dict[str, Tensor], src: Path, dst: Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Writes a network as a graph from `image` to the outputs `expected` of `images`; returns its record, with `facts`. Raises
    UserError, and leaves no file behind, if onnxruntime computes others."""
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
            "source": str(src), **facts, "image_size": list(images.shape[2:]), "input": "image, from 0 to 1",
            "parity": parity.as_dict(), "open_with": f"onnxruntime.InferenceSession({str(dst)!r})",
            "files": {file.name: sha256(file) for file in sorted(stage.iterdir())},
        }
        write_json(stage / f"{dst.name}.convert.json", record)
    return record


@torch.no_grad()
def convert_tower(src: Path, dst: Path, names: Sequence[str], *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the trunk ("backbone") or one adaptor of a finished stage as a folder that transformers opens as a vision tower.
    Returns the record that lies in it. Raises UserError, and leaves nothing behind, for a folder that is no finished stage, more
    or other names, and a tower whose outputs differ."""
    check_destination(dst, "hf", overwrite)
    try:
        from eva_mim.convert.tower import Tower, TowerConfig
    except ModuleNotFoundError:
        raise UserError("transformers is not installed; pip install 'eva-mim[transformers]'") from None
    model = load(src)
    known = [BACKBONE, *model.adaptors]
    if len(names) != 1 or names[0] not in known:
        raise UserError(f"--adaptors {','.join(names)}: a vision tower is one of {', '.join(known)}")
    if model.patch is None or not isinstance(model.network, (VisionTransformer, Eva)):
        raise UserError(f"{src}: a vision tower here is a plain ViT or EVA's; this is {type(model.network).__name__}")
    (name,) = names
    described = HeadsFacts.model_validate(read_json(src / HEADS_CONFIG)) if (src / HEADS_CONFIG).is_file() else None
    if described is not None:
        nothing = {"spatial": 0, "summary": 0}  # no heads, but their class tokens are in the trunk's summary
        own = {each: one if each == name else one.model_copy(update=nothing) for each, one in described.teachers.items()}
        described = described.model_copy(update={"teachers": own, "single": False})
    images = normalise(sample_images((model.image_size,) * 2, channels=len(model.mean)), model.mean, model.std)
    expected = model.encode(images, [name] if name != BACKBONE else [])[name]
    cells = model.grid_of(images, None if name == BACKBONE else name)[0]
    tower = Tower(TowerConfig(
        adaptor=name, timm=read_json(src / TIMM_CONFIG), heads=described.model_dump(mode="json") if described else None,
        hidden_size=expected.spatial.shape[-1], image_size=model.image_size, patch_size=model.image_size // cells,
        num_channels=len(model.mean)))
    state = tower.features.state_dict()
    tower.features.load_state_dict({key: value for key, value in model.state_dict().items() if key in state})
    with staged(dst) as stage:
        path = stage / dst.name
        tower.save_pretrained(path)
        write_json(path / "preprocessor_config.json", preprocessor(model.mean, model.std, model.image_size))
        opened: Any = Tower.from_pretrained(path)
        opened = opened.eval()(images)
        both = {"patches": (expected.spatial, opened.last_hidden_state), "summary": (expected.summary, opened.pooler_output)}
        one, other = ({name: pair[side] for name, pair in both.items() if pair[0].shape[-1]} for side in (0, 1))
        parity = compare(one, other, bound=BOUNDS["float32"])
        if not parity.passed:
            raise UserError(f"{src}: the outputs of the tower differ from the stage's; nothing was written\n{parity}")
        record = {
            "source": str(src), "adaptors": [name], "image_size": [model.image_size] * 2,
            "input": "pixel_values, as preprocessor_config.json says", "parity": parity.as_dict(),
            "open_with": f"import eva_mim.convert.tower; transformers.AutoModel.from_pretrained({str(dst)!r})",
            "files": {file.name: sha256(file) for file in sorted(path.iterdir())},
        }
        write_json(path / "convert.json", record)
    return record


def report(record: dict[str, Any], dst: Path) -> str:
    """Returns a record as a table."""
    lines = [f"written    {dst}  ({', '.join(record['files'])})", f"input      {record['input']}, {record['image_size'][0]} px"]
    for name, one in record["parity"]["outputs"].items():
        apart = f"largest difference {one['largest']:.3g} of {one['source']:.3g}"
        lines.append(f"output     {name:<20} {list(one['shape'])}  {apart}")
    return "\n".join([*lines, f"open with  {record['open_with']}"]) + "\n"
