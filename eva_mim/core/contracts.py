"""The words of the project: what crosses a function boundary. The file to read first.

Shape legend, used in every docstring: B images, H x W pixels, N patches (N = grid rows x grid columns), M predicted
patches of the whole batch, D student width, C target width, K classes, L text tokens; `channels` is 3 for RGB.
Pixels travel as uint8 (as float32 from 0 to 255 where `data.window` makes them) and each network normalises them with its
own mean and std, so that one crop serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image
    from torch import Tensor, nn

    from eva_mim.core.bands import Bands
    from eva_mim.core.losses import GradCacheStep, StepOutput

Grid = tuple[int, int]
"""(rows, columns) of patches."""


class Sample(NamedTuple):
    """One record of a source, before any view is taken."""

    key: str
    image: Image | Bands
    """An `Image` is 8-bit RGB."""
    label: int | None = None
    captions: tuple[str, ...] = ()
    """All of them; "" where a caption has no text."""


class Blocks(NamedTuple):
    """Shuffle plan for sequential storage: blocks are permuted globally, records only within a pool of blocks."""

    ends: npt.NDArray[np.int64]
    """Rising, each after the last record of a block: neighbours on the disk."""
    pooled: int
    """Blocks whose records are mixed."""


class Source(Protocol):
    """Images by position. `read` may raise anything for a broken record; the loader counts and replaces it."""

    classes: tuple[str, ...] | None
    """Class names by label, or None when the images carry no labels."""

    @property
    def blocks(self) -> Blocks | None:
        """None: any order is as good, and all records are shuffled together."""

    @property
    def fingerprint(self) -> str:
        """Changes when the records or their order change."""

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def prefetch(self, indices: Sequence[int]) -> None:
        """These are read next, in this process: what is slow to arrive may be fetched together. Loses nothing if it fails."""

    def read(self, index: int) -> Sample: ...


B = TypeVar("B", bound="Batch")


@dataclass(frozen=True)
class Batch:
    """Input of one forward pass of one process; each kind of training has a class of its own below."""

    index: Tensor
    """[B] int64, position of each image in its source."""
    broken: tuple[str, ...] = field(default=(), kw_only=True)
    """Records that could not be read and were replaced: "key: reason"."""

    @property
    def size(self) -> int:
        """B, the images of the batch."""
        return len(self.index)

    def to(self: B, device: Any) -> B:
        """The same batch with every tensor on `device` (asynchronously where the memory is pinned)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: B) -> B:
        """The same batch in pinned memory. torch's loader calls it; the name is its protocol."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self: B, change: Callable[[Tensor], Tensor]) -> B:
        changed: dict[str, Any] = {}
        for name, value in ((known.name, getattr(self, known.name)) for known in fields(self)):
            if isinstance(value, dict):
                changed[name] = {key: change(tensor) for key, tensor in value.items()}
            elif hasattr(value, "dtype"):
                changed[name] = change(value)
        return replace(self, **changed)


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """Images of which the student does not see some patches."""

    views: dict[int, Tensor]
    """Side in pixels -> [B, channels, side, side] uint8, or float32 from 0 to 255: one crop of each image at every size that a
    network asks for."""
    masked: Tensor | None = None
    """[B, N] bool, True where the student does not see the patch; None: it sees all."""
    target_index: Tensor | None = None
    """[M] int64, positions in the flattened [B * N] of the patches that are predicted: the masked ones. An index needs no
    host sync, unlike a boolean. None with `masked`: every patch is predicted."""
    labels: Tensor | None = field(default=None, kw_only=True)
    """[B] int64, where the images have labels: held-out figures read them, the loss does not."""


@dataclass(frozen=True)
class ImageTextBatch(Batch):
    """Images and the texts that belong to them."""

    images: Tensor
    """[B, channels, H, W] uint8, or float32 from 0 to 255."""
    texts: Tensor
    """[T, L] int64 token ids: in training one caption an image in the images' order (T = B), held out all captions."""
    text_owner: Tensor
    """[T] int64, row of the image that each text belongs to."""
    labels: Tensor | None = field(default=None, kw_only=True)
    """[B] int64, where the images have labels: zero-shot figures read them, the loss does not."""
    grad_cache: GradCacheStep | None = field(default=None, kw_only=True)
    """Where the loss is of all micro-batches together: what `Task.prepare` found out."""


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """Images with the classes that they belong to."""

    images: Tensor
    """[B, channels, H, W] uint8, or float32 from 0 to 255."""
    labels: Tensor
    """[B] int64."""


@dataclass(frozen=True)
class FeatureBatch(Batch):
    """Features of a frozen network in place of its images."""

    features: Tensor
    """[B, D] fp32."""
    labels: Tensor
    """[B] int64."""


class Features(NamedTuple):
    """Features that a teacher computes for a batch."""

    summary: Tensor
    """[B, C], one vector an image."""
    spatial: Tensor
    """[B, N, C], one vector a patch, after the teacher's final norm (and projection where it has one)."""
    grid: Grid


class Targets(Protocol):
    """What a student learns to predict: live teachers, or what teachers once said."""

    def __call__(self, batch: MaskedBatch) -> dict[str, Features]:
        """Features of the batch by the teacher's name."""


class Teacher(Protocol):
    """A frozen network that knows its own input. Never a submodule of what an engine wraps."""

    image_size: int
    grid: Grid
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Features: ...
    def to(self, device: Any) -> Teacher: ...
    def fingerprint(self) -> str: ...
    def facts(self) -> dict[str, Any]:
        """Name, sizes, layer, norm and projection, for the lineage record."""


class Student(Protocol):
    """A network under training (always also an nn.Module)."""

    trunk: nn.Module
    """The timm model inside: the part that the next stage takes over."""
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Task(Protocol):
    """One kind of training step: targets + student + objective. The loop and the engines know nothing else."""

    student: nn.Module

    # `Any` stands for the batch class of the task.
    def prepare(self, student: Callable[..., Any], batches: list[Any]) -> list[Any]:
        """Once a step, before the first `loss`: the same micro-batches, with what the loss of each needs of
        all (`ImageTextBatch.grad_cache`).
        Every rank must call."""
        return batches

    def loss(self, student: Callable[..., Any], batch: Any) -> StepOutput:
        """The loss of one forward pass, term by term. `student` is the engine's callable around `self.student`."""

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """How many patches, images or pairs of this batch each loss term is a mean over, a scalar by the term's name; known
        before the forward pass, since the engine weighs each micro-batch by its share of the whole step's. The same names on
        every rank, 0 where a rank has none. A term that is left out has the same count in every batch."""
        return {}


class Evaluator(Protocol):
    """Measures a student on held-out data; every rank calls it and gets the same figures."""

    headline: str
    """The metric that stands for the stage in a summary."""

    def __call__(self, student: nn.Module, autocast: Callable[[], Any]) -> dict[str, float]: ...


class Rates(NamedTuple):
    """Rates that an engine sets in its parameter groups before a step."""

    lr: float
    """For groups with `lr_scale` 1."""
    weight_decay: float
    """For groups with `decays` 1."""


class StateGroup(NamedTuple):
    """Tensors that make one file of a checkpoint, whole and in fp32 however they are kept in memory. Every rank calls `read` and
    `put`, for the same names in the same order."""

    kinds: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> torch's dtype, shape; the same on every rank."""
    read: Callable[[str], Tensor]
    """A whole tensor."""
    put: Callable[[str, Tensor], None]
    """Takes this rank's share of a whole tensor, which is on the CPU."""


class Engine(Protocol):
    """Makes a task run: forward, backward, optimizer, on one process or many."""

    module: nn.Module
    forward: Callable[..., Any]
    """The student's forward pass as a task calls it: the module or a wrapper of it. The one callable that may be compiled."""

    def step(self, task: Task, batches: list[Batch], rates: Rates, measure_update: bool = False) -> StepOutput:
        """One optimizer update from this process's micro-batches.

        A loss or gradient that is not finite on any rank leaves the weights alone on all. Metrics: `grad_norm`, `skipped`
        (1 for such a step), `loss_scale` (fp16), and with `watch` `update_ratio`, the norm of the update over the weights'.
        """

    def weights(self) -> Mapping[str, Tensor]:
        """Whole fp32 weights on the CPU (empty on ranks other than 0). Every rank must call."""

    def full_module(self) -> AbstractContextManager[nn.Module]:
        """Context that gives a module with the whole weights on every rank, for evaluation. Every rank must enter."""

    def autocast(self) -> Any:
        """Context with the precision of the forward pass."""

    def loss_scale(self) -> float:
        """Factor on the loss before the backward pass (1 except in fp16)."""

    def state(self) -> dict[str, StateGroup]:
        """State groups of a checkpoint: `module` (all of the state dict), each moment of the optimizer under the parameters'
        names, and `counts`. Every rank must call."""


class TrainData(Protocol):
    """An endless order of samples cut into global batches of the task's batch class; position = steps done."""

    steps_per_epoch: int

    def steps(self, first: int, last: int) -> Iterator[list[Any]]: ...
    def samples(self, step: int) -> list[dict[str, Any]]:
        """Epoch, index and key of each sample of a step, over all ranks."""
    def key(self, index: int) -> str: ...
