"""Strict settings: YAML + dotted overrides -> frozen pydantic models, all mistakes reported at once.

This file imports only light modules, so that a mistyped setting is reported before torch is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from eva_mim.core.errors import UserError
from eva_mim.core.recipe_files import read_text
from eva_mim.core.registry import nearest


def few(names: Iterable[Any], count: int = 5) -> str:
    """Returns the first `count` names and the number of the others, as text for a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")


class For:
    """Annotation of a setting that has an effect only if another setting of its section has certain values:
    `min_block: Annotated[int, For("kind", "block")]`; or, without values, if the other setting is not null:
    `jitter_prob: Annotated[float, For("jitter")]`. Otherwise it is a mistake (`parse`)."""

    def __init__(self, setting: str, *values: str, reread: bool = False):
        """`reread`: the setting has another meaning under each of `values`, so that it is removed when these change."""
        self.setting, self.values, self.reread = setting, values, reread


class Runtime:
    """Annotation of a setting that does not affect results, or only the place where they are computed: a run may be resumed with
    another value. Rounding may differ, and random numbers that are drawn by rank or micro-batch (drop path, mixup)."""


RUNTIME = Runtime()


class Place(Runtime):
    """Annotation of a setting that says where data lies. Another value continues a run if it leads to the same records."""


PLACE = Place()


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _a_section_keeps_its_own_defaults(cls, tree: Any) -> Any:
        """A section that sets some of its settings leaves the others at the defaults of this place: `view: {seed: 1}` does not
        change the crops of a stage whose `view` has crops of its own."""
        if not isinstance(tree, dict):
            return tree
        filled = {}
        for name, section in tree.items():
            default = cls.model_fields[name].default if name in cls.model_fields else None
            if isinstance(default, Settings) and isinstance(section, dict):
                own = {key: getattr(default, key) for key in default.model_fields_set}
                filled[name] = own | section
        return {**tree, **filled}

    @classmethod
    def chosen_in(cls, tree: Mapping[str, Any], setting: str) -> Any:
        """Returns the value, written or default, of a setting in the section `tree` on which others depend (`For`); None if none
        depends on it."""
        return tree.get(setting, cls.model_fields[setting].default)

    def results(self) -> dict[str, Any]:
        """Returns the settings that a result depends on, in JSON's types: all except those marked `RUNTIME` or `PLACE`, with
        sections."""
        return self.model_dump(mode="json", exclude=_marked(self, Runtime))

    def places(self) -> dict[str, str]:
        """Returns the values of the settings marked `PLACE`, by dotted name; without those that are null."""
        marked = _marked(self, Place)
        return dict(_leaves(self.model_dump(mode="json", include=marked))) if marked else {}


def _marked(value: Any, mark: type[Runtime]) -> dict[Any, Any]:
    """Returns the settings with a mark, as pydantic's `exclude` and `include` take them: {name or number: True, or the same of a
    section}."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Settings):
        pairs = value
    elif isinstance(value, (list, dict)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
    fields = type(value).model_fields if isinstance(value, Settings) else {}
    found = {name: True if name in fields and any(isinstance(one, mark) for one in fields[name].metadata) else _marked(one, mark)
             for name, one in pairs}
    return {name: below for name, below in found.items() if below}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of the values in nested mappings and lists that are not null."""
    for name, value in enumerate(tree) if isinstance(tree, list) else tree.items():
        if isinstance(value, (dict, list)):
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


S = TypeVar("S", bound=Settings)


class Dependent(NamedTuple):
    """A written setting that has an effect only under certain values of another one."""

    path: str
    """Dotted name."""
    kind: str
    """Dotted name of the setting that it depends on."""
    chosen: str
    """The value of that setting."""
    mark: For

    @property
    def foreign(self) -> bool:
        """True where the setting has no effect."""
        return self.chosen not in self.mark.values if self.mark.values else self.chosen is None

    def __str__(self) -> str:
        if not self.mark.values:
            return f"{self.path}: has no effect without {self.kind}; leave it out, or set {self.kind}"
        wanted = " or ".join(self.mark.values)
        return (f"{self.path}: is for {self.kind}={wanted}, and {self.kind} is {self.chosen}; leave it out, or set "
                f"{self.kind}={self.mark.values[0]}")


def dependents(model: type[Settings], tree: Mapping[str, Any], prefix: str = "") -> Iterator[Dependent]:
    """Yields every setting in `tree`, at any depth, that is marked with `For`; except those that are null (the setting is taken
    back) or whose kind is unknown (a mistake that is reported elsewhere)."""
    for name, value in tree.items():
        field = model.model_fields.get(name)
        if field is None or value is None:
            continue
        foreign = False
        for mark in field.metadata:
            if not isinstance(mark, For):
                continue
            chosen = model.chosen_in(tree, mark.setting)
            if not mark.values or chosen in _known(model, mark.setting):
                found = Dependent(prefix + name, prefix + mark.setting, chosen, mark)
                foreign |= found.foreign
                yield found
        for below, section, path in () if foreign else _sections(field.annotation, value, prefix + name):
            yield from dependents(below, section, f"{path}.")


def _known(model: type[Settings], setting: str) -> list[Any]:
    """Returns the known values of a setting that others depend on: those of its Literal type, or those in the others' marks."""
    annotation = model.model_fields[setting].annotation
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    marks = [mark for field in model.model_fields.values() for mark in field.metadata if isinstance(mark, For)]
    return [value for mark in marks if mark.setting == setting for value in mark.values]


def _sections(annotation: Any, value: Any, path: str) -> Iterator[tuple[type[Settings], Mapping[str, Any], str]]:
    """Yields the sections in a value (itself, or those in a list or mapping), as (model, section, dotted name)."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is None:
        if isinstance(annotation, type) and issubclass(annotation, Settings) and isinstance(value, Mapping):
            yield annotation, value, path
    elif origin is dict:
        for name, one in value.items() if isinstance(value, Mapping) else ():
            yield from _sections(inner[1], one, f"{path}.{name}")
    elif origin in (list, tuple):
        for number, one in enumerate(value) if isinstance(value, (list, tuple)) else ():
            yield from _sections(inner[0], one, f"{path}.{number}")
    else:
        for kind in inner:
            yield from _sections(kind, value, path)


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Returns a copy of `tree` with each "a.b=value" applied; the value is read as YAML. Raises UserError."""
    tree = json.loads(json.dumps(tree, default=str))
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name or not all(name.split(".")):
            raise UserError(f"{assignment!r} is not an override; write section.setting=value")
        try:
            value = read_text(text) if text else None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{assignment!r}: the value is not readable as YAML: {error}") from None
        put(tree, name, value)
    return tree


def put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Sets the dotted `name` in `tree` and creates missing sections; entries of a list are addressed by number. Raises UserError
    if the path leads through a plain value, and for a list entry that does not exist."""
    parts, place = name.split("."), tree
    for number, part in enumerate(parts):
        key: Any = part
        if isinstance(place, list):
            key = _entry(place, part, name, ".".join(parts[:number]))
        elif not isinstance(place, dict):
            raise UserError(f"{name}: {parts[number - 1]} is a value, not a section")
        if number == len(parts) - 1:
            place[key] = value
        elif isinstance(place, list):
            place = place[key]
        else:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]


def _entry(entries: list[Any], part: str, name: str, path: str) -> int:
    if not part.isdecimal() or int(part) >= len(entries):
        last = f", numbered 0 to {len(entries) - 1}" if entries else ""
        raise UserError(f"{name}: {path} has no entry {part}; it is a list of {len(entries)}{last}")
    return int(part)


def parse(model: type[S], tree: Mapping[str, Any], source: str) -> S:
    """Returns the settings in a mapping. Raises one UserError that lists every mistake with its path; a setting without effect
    under the others (`For`) is a mistake."""
    lines = [str(setting) for setting in dependents(model, tree) if setting.foreign]
    try:
        settings = model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(model, item) for item in error.errors()] + lines
    if lines:
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise UserError(f"{source}: {count} in the settings\n" + "\n".join(f"  {line}" for line in lines))
    return settings


def _explain(model: type[Settings], item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        entry = str(item["loc"][1]) if len(item["loc"]) > 1 else "*"
        names = [name.replace("*", entry) for name in setting_names(model)]
        parent = path.rpartition(".")[0]
        beside = [name for name in names if name.rpartition(".")[0] == parent]
        elsewhere = [name for name in names if name.rpartition(".")[2] == path.rpartition(".")[2]]
        hint = nearest(path, elsewhere, cutoff=0.0) or nearest(path, beside, cutoff=0.5) or nearest(path, names)
        hint = hint or f"; known here: {', '.join(beside)}"
        return f"{path}: no such setting{hint}"
    if item["type"] == "missing":
        return f"{path}: must be given"
    message = item["msg"].removeprefix("Value error, ")
    shown = f" (got {item['input']!r})" if isinstance(item["input"], (str, int, float, type(None))) else ""
    return f"{path}: {message}{shown}" if path else message


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Returns every dotted setting name of a model, sections included; "*" stands for the names in a mapping of sections."""
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                entry = "*." if get_origin(field.annotation) is dict else ""
                names += setting_names(kind, f"{prefix}{name}.{entry}")
    return names


def as_tree(settings: Settings) -> dict[str, Any]:
    """Returns all settings that have an effect, with defaults, as plain values (JSON types) that `parse` reads back."""
    tree = settings.model_dump(mode="json")
    for setting in list(dependents(type(settings), tree)):
        if setting.foreign:
            take(tree, setting.path)
    return tree


def take(tree: dict[str, Any], name: str) -> None:
    """Removes the dotted `name`, which must exist, from `tree`."""
    *parents, leaf = name.split(".")
    place: Any = tree
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    del place[leaf]


def digest(value: Any) -> str:
    """Returns the SHA-256 of JSON-able values, hexadecimal, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def completed(old: Mapping[str, Any], settings: BaseModel, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings that an earlier version wrote, with those that it did not have yet, as far as they have their defaults
    now. `tree`: what `settings` are today, as `old` was written."""
    found = dict(old)
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name not in tree:
            continue
        if name not in old:
            if not info.is_required() and value == info.get_default(call_default_factory=True):
                found[name] = tree[name]
        elif isinstance(value, BaseModel) and isinstance(old[name], Mapping):
            found[name] = completed(old[name], value, tree[name])
        elif isinstance(value, dict) and isinstance(old[name], Mapping):
            found[name] = {key: completed(one, value[key], tree[name][key])
                           if isinstance(one, Mapping) and isinstance(value.get(key), BaseModel) else one
                           for key, one in old[name].items()}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns a line "path: old -> new" for each setting that differs."""
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: {before} -> {after}")
    return lines
