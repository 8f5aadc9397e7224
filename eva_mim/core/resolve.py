"""Overrides of a recipe. If an override changes a kind, the recipe's settings for the former kind are removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from eva_mim.core.log import say
from eva_mim.core.settings import Dependent, S, Settings, dependents, override, parse, take


class Change(NamedTuple):
    """A setting that was removed because an override changed the kind that it belongs to."""

    setting: Dependent
    before: str
    """The kind in the recipe, for which the setting was written."""


def resolve(model: type[S], tree: dict[str, Any], overrides: Iterable[str], source: str) -> S:
    """Returns the settings of a recipe with overrides applied. Settings for a kind that an override changes are removed, and
    listed in one printed line. Raises UserError with all mistakes."""
    tree, changes = apply(model, tree, list(overrides))
    say_changes(source, changes)
    return parse(model, tree, source)


def apply(model: type[Settings], tree: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[Change]]:
    """Returns a copy of `tree` with the overrides applied, and the settings removed from it: those that `tree` has for a kind
    (`For`) that an override changes. A setting that an override writes itself stays, and `parse` checks it. Raises UserError."""
    before = {setting.path: setting for setting in dependents(model, tree)}
    tree = override(tree, overrides)
    changes = []
    for setting in list(dependents(model, tree)):
        old = before.get(setting.path)
        if old is None or old.foreign or old.chosen == setting.chosen or touched(setting.path, overrides):
            continue
        if setting.foreign or setting.mark.reread:
            take(tree, setting.path)
            changes.append(Change(setting, old.chosen))
    return tree, changes


def touched(path: str, overrides: Iterable[str]) -> bool:
    """Returns whether an override writes this setting, a setting inside it, or a section around it."""
    names = [text.partition("=")[0] for text in overrides]
    return any(f"{name}.".startswith(f"{path}.") or f"{path}.".startswith(f"{name}.") for name in names)


def say_changes(source: str, changes: Sequence[Change]) -> None:
    """Prints one line with the names of all settings that were removed; nothing if there are none."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for setting, before in changes:
        now, then = ("null" if value is None else str(value) for value in (setting.chosen, before))
        groups.setdefault((setting.kind, now, then), []).append(setting.path)
    texts = [f"{kind}={now} leaves out {', '.join(names)}, set for {kind}={before}"
             for (kind, now, before), names in groups.items()]
    if texts:
        say(f"{source}: {'; '.join(texts)}")
