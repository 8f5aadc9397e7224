"""A suite of test sets for CLIP models, each with its own metric: settings of its file (`configs/suites/`). No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from eva_mim.core.settings import For, Settings

Metric = Literal["top1", "mean_per_class", "macro_f1", "worst_group_top1", "worst_group_top5", "mean_r1", "jaccard"]
"""In percent. "mean_per_class": mean of the classes' recalls; "macro_f1": mean of their F1 scores; "worst_group_...": accuracy in
the group of images where it is lowest; "mean_r1": mean of recall at 1 from images to texts and from texts to images; "jaccard":
mean Jaccard index of chosen and correct images (WinoGAViL)."""
Group = Literal["ImageNet", "ImageNet shifts", "VTAB", "retrieval"]


class SuiteSet(Settings):
    """A test set."""

    name: str
    task: str
    """DataComp's name of the set; its folder is `wds_TASK_test` with "-" for "/", as DataComp has it, or `wds_TASK`, as
    clip_benchmark has it."""
    folders: tuple[str, ...] = ()
    """Further names of its folder."""
    images: int = Field(ge=1)
    """Number of its images, or of its problems where it has some (WinoGAViL)."""
    metric: Metric = "top1"
    column: Annotated[int | None, Field(ge=0), For("metric", "worst_group_top1", "worst_group_top5")] = None
    """Number in each record's KEY.npy that is the record's group."""
    group: Group | None = None
    """Group of sets whose mean is a figure of its own."""

    @model_validator(mode="after")
    def _groups_have_a_column(self) -> SuiteSet:
        if self.metric.startswith("worst_group") and self.column is None:
            raise ValueError(f"{self.name}: metric={self.metric} needs `column`, the group's place in KEY.npy")
        return self

    @property
    def homes(self) -> tuple[str, ...]:
        """Names under which its folder is looked for."""
        short = [self.task.removeprefix(kind) for kind in ("fairness/", "retrieval/", "misc/")]
        tasks = [task.replace("/", "-") for task in dict.fromkeys([self.task, *short])]
        return (*(f"wds_{task}_test" for task in tasks), *(f"wds_{task}" for task in tasks), *self.folders)


class Suite(Settings):
    """The sets of a suite, in the order of its table."""

    sets: tuple[SuiteSet, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [one.name for one in self.sets]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sets: {', '.join(twice)} stands there twice")
        return self
