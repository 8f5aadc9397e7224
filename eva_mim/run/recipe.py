"""Settings that the recipes of all stages share. This file imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import model_validator

from eva_mim.core.settings import For, Settings
from eva_mim.data import DataSettings
from eva_mim.data.view_settings import CommonViewSettings
from eva_mim.engine import RunSettings
from eva_mim.optim import OptimSettings, check_sharding
from eva_mim.trunks import TrunkSettings
from eva_mim.weights import HandOverSettings
from eva_mim.weights.files.read import content_hash

if TYPE_CHECKING:
    from eva_mim.data.sampler import Piece


class Recipe(Settings):
    """Settings of one stage. A run starts from its own last checkpoint, else from `init_from`, else from scratch."""

    reads: ClassVar[str | None] = None
    """Section of `data` that only this kind of stage reads: "segmentation", "video"."""
    init_from: str | None = None
    """Source of the trunk's weights: folder of an earlier stage, or any checkpoint that `eva-mim inspect` recognises."""
    hand_over: Annotated[HandOverSettings, For("init_from")] = HandOverSettings()
    data: DataSettings
    student: TrunkSettings
    view: CommonViewSettings
    run: RunSettings
    optim: OptimSettings

    @model_validator(mode="after")
    def _student_takes_the_images(self) -> Recipe:
        channels = self.data.channels_of_all
        if self.student.channels != channels:
            raise ValueError(f"data.channels={channels} needs {channels} values of student.mean and student.std, which are for "
                             f"{self.student.channels} channels; `eva-mim data stats RECIPE` prints them")
        return self

    @model_validator(mode="after")
    def _augmentations_are_for_colours(self) -> Recipe:
        for name in ("randaugment", "jitter", "grayscale", "photometric"):
            if (value := getattr(self.view, name, None)) and not self.data.plain:
                raise ValueError(f"view.{name}={value} is for 8-bit RGB images; leave it out with data.channels other than 3 or "
                                 "data.window")
        return self

    @model_validator(mode="after")
    def _sections_are_read(self) -> Recipe:
        for section, program in (("segmentation", "segment"), ("video", "video")):
            for path, one in self.data.sources.items():
                if (there := getattr(one, section) is not None) and self.reads != section:
                    raise ValueError(f"{path}.{section} is for the stage `{program}`, and has no effect here; leave it out")
                if not there and self.reads == section:
                    raise ValueError(f"{path}.{section} must be given: what this stage learns from (docs/{section}.md)")
        return self

    @model_validator(mode="after")
    def _optimizer_sees_whole_tensors(self) -> Recipe:
        check_sharding(self.optim, self.run.zero_stage)
        return self

    def pieces(self, rank: int, world: int) -> list[Piece]:
        """Returns the micro-batches of a rank in each step. Raises UserError for a batch that so many processes cannot divide."""
        from eva_mim.data.sampler import cut_alike

        return cut_alike(self.run.global_batch, self.run.micro_batch, rank, world)

    def parents(self) -> dict[str, Path]:
        """Returns the files or folders that this stage's result depends on, by setting."""
        return {} if self.init_from is None else {"init_from": Path(self.init_from)}

    def parent_hash(self, name: str, path: Path) -> str:
        """Returns the SHA-256 of what a parent holds; `name` is its setting. Raises UserError."""
        return content_hash(path, self.hand_over.container if name == "init_from" else None)

    def identity_tree(self) -> dict[str, Any]:
        """Returns the settings that a result depends on, without the paths of parents, whose content is hashed elsewhere."""
        tree = self.results()
        for setting in self.parents():
            *sections, leaf = setting.split(".")
            inner = tree
            for section in sections:
                inner = inner[section]
            inner[leaf] = "(parent)"
        return tree
