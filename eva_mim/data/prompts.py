"""Class names, and templates that make captions of them: from files, or as open_clip has them.

A class of ImageNet keeps its synset id beside its name, because two classes may have the same name ("crane").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eva_mim.core.errors import UserError
from eva_mim.data import SourceSettings
from eva_mim.data.class_lists import class_line, layout_classes, spoken


def class_file(settings: SourceSettings) -> tuple[str, ...] | None:
    """Returns the class names in the file `data.classes`, by label; None if it is not set. Raises UserError for an unreadable
    file."""
    return None if settings.classes is None else _lines(settings, settings.classes, "data.classes")


def class_words(settings: SourceSettings) -> tuple[str, ...] | None:
    """Returns the class names of `data.class_names`, by label; None if it is not set. Raises UserError for an unreadable file."""
    if settings.class_names == "imagenet":
        return imagenet_names()
    return None if settings.class_names is None else _lines(settings, settings.class_names, "data.class_names")


def _lines(settings: SourceSettings, name: str, setting: str) -> tuple[str, ...]:
    return tuple(class_line(line) for line in read_lines(settings.own_root / name, setting))


def imagenet_names() -> tuple[str, ...]:
    """Returns the synset ids of ImageNet-1k with open_clip's names, by label."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(f"{synset} {name}" for synset, name in zip(layout_classes("imagenet-1k"), IMAGENET_CLASSNAMES, strict=True))


def read_lines(path: Path, setting: str) -> list[str]:
    """Returns the non-empty lines of a text file. Raises UserError for a file that is missing or not UTF-8."""
    if not path.is_file():
        raise UserError(f"{setting}: {path} does not exist")
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{setting}: {path} is not UTF-8 text: {error}") from None


def filled(template: str, name: str) -> str:
    """Returns the template with the class name filled in."""
    return template.replace("{}", spoken(name))


def prompt_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the templates of the setting `data.templates`, each with "{}" for the class name."""
    if not isinstance(templates, str):
        return tuple(templates)
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    known = {"openai": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    return tuple(make("{}") for make in known[templates])


def told_templates(told: str) -> tuple[str, ...]:
    """Returns the templates of --templates: "openai", "simple", or a file with one a line. Raises UserError for the file."""
    return prompt_templates(told if told in ("openai", "simple") else read_lines(Path(told), "--templates"))
