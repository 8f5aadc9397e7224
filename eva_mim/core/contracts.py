"""Data types and protocols that cross function boundaries. Read this file first.

Shape legend, used in every docstring: B images, H x W pixels, N patches (N = grid rows x grid columns), M predicted
patches of the whole batch, D student width, C target width, K classes, L text tokens; `channels` is 3 for RGB.
Pixels travel as uint8 (as float32 from 0 to 255 where `data.window` makes them) and each network normalises them with its
own mean and std, so that one crop serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image
    from torch import Tensor, nn

    from eva_mim.core.bands import Bands
    from eva_mim.core.batches import Batch
    from eva_mim.core.losses import StepOutput

Grid = tuple[int, int]
"""(rows, columns) of patches."""
Autocast = Callable[[], Any]
"""Returns a context with the precision of a forward pass."""


class Video(Protocol):
    """Frames of a video, in order."""

    def __len__(self) -> int: ...
    def frames(self, indices: Sequence[int]) -> list[Image]:
        """Returns the frames at rising positions, 8-bit RGB of one size. Raises any exception if one cannot be decoded."""


class Sample(NamedTuple):
    """One record of a source, before a view is made of it."""

    key: str
    image: Image | Bands | Video
    """An `Image` is 8-bit RGB; a `Video` where `data.video` is set, and only there."""
    label: int | None = None
    captions: tuple[str, ...] = ()
    """All captions of the image; "" for a caption without text."""
    segmentation: npt.NDArray[np.int16] | None = None
    """[H, W] class number of each pixel, -1 for a pixel of no class; None unless `data.segmentation` is set."""


class Blocks(NamedTuple):
    """Shuffle plan for sequential storage: blocks are permuted globally, records only within a pool of blocks."""

    ends: npt.NDArray[np.int64]
    """[blocks] rising: for each block the position after its last record. Records of a block are adjacent on the disk."""
    pooled: int
    """Number of blocks whose records are shuffled together."""


class Source(Protocol):
    """A data set whose images are read by position. `read` may raise any exception for a broken record, which the loader counts
    and replaces."""

    classes: tuple[str, ...] | None
    """Class names by label, or None when the images carry no labels."""

    @property
    def blocks(self) -> Blocks | None:
        """Shuffle plan; None if records are read equally fast in any order, so that all are shuffled together."""

    @property
    def fingerprint(self) -> str:
        """Digest that changes when the records or their order change."""

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def prefetch(self, indices: Sequence[int]) -> None:
        """Announces that the records at `indices` are read next in this process, so that the source may fetch them together. Best
        effort."""

    def unlabelled(self) -> Sequence[int]:
        """Returns the positions of records without a label, in rising order; none for a source without classes."""

    def read(self, index: int) -> Sample: ...


class Features(NamedTuple):
    """Features that a teacher computes for a batch."""

    summary: Tensor
    """[B, C'], one vector an image; C' is 0 for a network without summaries."""
    spatial: Tensor
    """[B, N, C], one vector a patch, after the teacher's final norm (and projection where it has one)."""
    grid: Grid


class Teacher(Protocol):
    """A frozen network with the size, mean and std of its input images. It is never a submodule of a module in an engine."""

    image_size: int
    resizing: dict[str, Any]
    """How its images are brought to size outside training: arguments of `EvalView` besides the size."""
    grid: Grid
    width: int
    """C of spatial features."""
    summary_width: int
    """C' of summaries; 0 for a network that has none."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Features: ...
    def seen(self, grid: Grid) -> tuple[int, Grid]:
        """Returns the side of the images that it sees beside a student with this grid of patches, and the grid of its features:
        its own, unless it follows the student."""

    def to(self, device: Any) -> Teacher: ...
    def fingerprint(self) -> str: ...
    def facts(self) -> dict[str, Any]:
        """Returns name, sizes, layer, norm and projection, for the lineage record."""


class Student(Protocol):
    """A network under training (always also an nn.Module)."""

    trunk: nn.Module
    """The timm model inside: the part that the next stage takes over."""
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Task(Protocol):
    """One kind of training step: targets, student and objective. The loop and the engines use no other interface."""

    student: nn.Module

    def state(self) -> dict[str, StateGroup]:
        """Returns the state groups of a checkpoint that are the task's own: running statistics. Every rank must call."""
        return {}

    # `Any` stands for the batch class of the task.
    def prepare(self, student: Callable[..., Any], batches: list[Any]) -> list[Any]:
        """Returns the same micro-batches, with the values that the loss of each needs from all of them
        (`ImageTextBatch.grad_cache`). The engine calls it once a step, before the first `loss`, on every rank."""
        return batches

    def loss(self, student: Callable[..., Any], batch: Any) -> StepOutput:
        """Returns the loss of one forward pass by term. `student` is the engine's callable around `self.student`."""

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Returns the number of patches, images or pairs of this batch that each loss term is a mean over: a scalar by the term's
        name. It is known before the forward pass, since the engine weighs each micro-batch by its share of the whole step's
        count. Every rank has the same names, with 0 where it has none. A term that is left out has one count in all batches."""
        return {}


class Evaluator(Protocol):
    """Measures a student on held-out data; every rank calls it and gets the same figures."""

    headline: str
    """The metric that stands for the stage in a summary."""

    def __call__(self, student: nn.Module, autocast: Autocast) -> dict[str, float]: ...


class Rates(NamedTuple):
    """Rates that an engine sets in its parameter groups before a step."""

    lr: float
    """Learning rate of groups with `lr_scale` 1."""
    weight_decay: float
    """Weight decay of groups with `decays` 1."""
    heads_alone: bool = False
    """True if the heads of a masked student are trained alone."""


class StateGroup(NamedTuple):
    """Tensors of one checkpoint file, unsharded and in fp32 whatever their form in memory. Every rank calls `read` and `put`, for
    the same names in the same order."""

    kinds: dict[str, tuple[str, tuple[int, ...]]]
    """Name -> torch's dtype, shape; the same on every rank."""
    read: Callable[[str], Tensor]
    """Returns the unsharded tensor of a name."""
    put: Callable[[str, Tensor], None]
    """Stores this rank's share of an unsharded tensor, which is on the CPU."""


class Engine(Protocol):
    """Runs forward pass, backward pass and optimizer of a task, on one process or many."""

    module: nn.Module
    forward: Callable[..., Any]
    """The student's forward pass as a task calls it: the module or a wrapper of it. The one callable that may be compiled."""

    def step(self, task: Task, batches: list[Batch], rates: Rates, measure_update: bool = False) -> StepOutput:
        """Makes one optimizer update from this process's micro-batches; returns its loss and metrics.

        If the loss or gradient of any rank is not finite, the weights stay unchanged on all ranks. Metrics: `grad_norm`,
        `skipped` (1 for such a step), `loss_scale` (fp16), and with `measure_update` `update_ratio`, the norm of the update
        divided by the norm of the weights.
        """

    def weights(self) -> Mapping[str, Tensor]:
        """Returns the unsharded fp32 weights on the CPU (empty on ranks other than 0). Every rank must call."""

    def full_module(self) -> AbstractContextManager[nn.Module]:
        """Returns a context that gives the module with unsharded weights on every rank, for evaluation. Every rank must enter."""

    def autocast(self) -> Any:
        """Returns a context with the precision of the forward pass."""

    def loss_scale(self) -> float:
        """Returns the factor on the loss before the backward pass (1 except in fp16)."""

    def state(self) -> dict[str, StateGroup]:
        """Returns the state groups of a checkpoint: `module` (the full state dict), each moment of the optimizer under the
        parameters' names, and `counts`. Every rank must call."""


class TrainData(Protocol):
    """An endless order of samples, cut into global batches of the task's batch class; position = number of steps done."""

    steps_per_epoch: int
    micro_batches: int
    """Micro-batches of a process in a step."""

    def steps(self, first: int, last: int) -> Iterator[list[Any]]: ...
    def samples(self, step: int) -> list[dict[str, Any]]:
        """Returns epoch, index and key of each sample of a step, over all ranks."""
    def key(self, index: int) -> str: ...
