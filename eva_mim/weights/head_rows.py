"""Start of a classification head from the rows of another one, for the classes that both share."""

from __future__ import annotations

import torch
from torch import nn

from eva_mim.core.errors import UserError
from eva_mim.core.report import KeyReport
from eva_mim.core.settings import few
from eva_mim.data.class_lists import class_hash, describe, layouts_with, positions, read_classes
from eva_mim.students import ClassifierSettings
from eva_mim.trunks import facts
from eva_mim.weights.files.lazy import finite
from eva_mim.weights.handover import Parent


@torch.no_grad()
def seed_head(
    trunk: nn.Module, parent: Parent, settings: ClassifierSettings, classes: tuple[str, ...], report: KeyReport
) -> None:
    """Copies the rows of the parent's head for shared classes into a new head, in place, after `seed_trunk`.

    Two classes are the same if their synset ids are, or their names. `report` is that of `seed_trunk` and is updated. A head that
    `seed_trunk` kept stays as it is. Raises UserError if the parent has no head, if its classes are unknown or do not match its
    rows, if none is shared, and if one is missing with `head_rows` "all".
    """
    head: nn.Module = trunk.get_classifier()  # type: ignore[operator]
    prefix = facts.head_name(trunk)
    state = {f"{prefix}.{name}": value for name, value in head.named_parameters()}
    names = [name for name in state if name in parent.weights]
    if f"{prefix}.weight" not in names:
        raise UserError(f"student.head_rows={settings.head_rows}: {parent.path} has no {prefix}.weight; use new")
    if not set(names) & set(report.new):
        return
    theirs = _classes_of(parent, settings, len(parent.weights[f"{prefix}.weight"]))
    places = positions(classes, theirs)
    rows = [row for row, place in enumerate(places) if place is not None]
    missing = [name for name, place in zip(classes, places, strict=True) if place is None]
    if not rows or (missing and settings.head_rows == "all"):
        raise UserError(
            f"student.head_rows={settings.head_rows}: the head of {parent.path} ({describe(theirs)}) has rows for {len(rows)} of "
            f"the {len(classes)} classes ({describe(classes)}), not for {few(missing)}; "
            + ("use shared to start the others anew" if rows else "use new")
        )
    for name in names:
        value, given = state[name], finite(parent.weights[name], name, f"student.head_rows: {parent.path}")
        if given.shape[1:] != value.shape[1:]:
            raise UserError(f"student.head_rows: {name} is {list(given.shape)} in {parent.path} and {list(value.shape)} here")
        value[rows] = given[[place for place in places if place is not None]].to(value)
        report.new.remove(name)
        report.ignored.remove(name)
        report.note(report.resized, name, f"rows of {len(rows)} of {len(classes)} classes, from a head for {len(theirs)}")


def _classes_of(parent: Parent, settings: ClassifierSettings, rows: int) -> tuple[str, ...]:
    """Returns the classes of the parent's head. Raises UserError if they are unknown, or not as many as its rows."""
    named = read_classes(settings.head_classes) if settings.head_classes else None
    if parent.classes and named and class_hash(parent.classes) != class_hash(named):
        raise UserError(
            f"student.head_classes={settings.head_classes}: the head of {parent.path} is for {describe(parent.classes)}"
        )
    classes = parent.classes or named
    if classes is None:
        guesses = layouts_with(rows)
        hint = f"(layouts with {rows} classes: {', '.join(guesses)})" if guesses else f"(a file with its {rows} classes)"
        raise UserError(f"student.head_rows={settings.head_rows}: {parent.path} does not name the classes of its head; set "
                        f"student.head_classes {hint}")
    if len(classes) != rows:
        raise UserError(f"student.head_rows: the head of {parent.path} has {rows} rows, its class list {len(classes)} classes")
    return classes
