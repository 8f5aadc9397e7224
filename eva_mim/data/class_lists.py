"""Class lists: recognition of ImageNet's layouts, and positions of one list's classes in another. Light to import.

The layouts are timm's lists (`timm/data/_info`), which are read without importing timm. Classes are compared by synset id
where the name has one, else by the whole name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from eva_mim.core.errors import UserError
from eva_mim.core.registry import nearest
from eva_mim.core.run_folder import LINEAGE, TIMM_CONFIG
from eva_mim.core.settings import digest, few

LAYOUTS = {
    "imagenet-1k": "imagenet_synsets.txt",
    "imagenet-12k": "imagenet12k_synsets.txt",
    "imagenet-21k-fall11": "imagenet22k_synsets.txt",
    "imagenet-21k-google": "imagenet21k_goog_synsets.txt",
    "imagenet-21k-p-fall11": "imagenet21k_miil_synsets.txt",
    "imagenet-21k-p-winter21": "imagenet21k_miil_w21_synsets.txt",
    "imagenet-22k-ms": "imagenet22k_ms_synsets.txt",
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
    "mini-imagenet": "mini_imagenet_synsets.txt",
}
"""Layout -> timm's file of its classes, by label. 12k: timm's layout; google: BiT's, with two more classes; p: cleaned by Ridnik
et al.; ms: FocalNet's, which starts with the classes of 1k; a and r: the 200 classes of ImageNet-A and -R."""
WINTER21, WINTER21_CLASSES, WINTER21_CORE = "imagenet-21k-winter21", 19_167, "imagenet-21k-p-winter21"
"""Layout for which timm has no list. It is recognised by its number of classes (Alibaba-MIIL/ImageNet21K, issue 16), by its
sorted order and by its cleaned subset, which has a list."""
SYNSET = re.compile(r"\bn\d{8}\b")


class Match(NamedTuple):
    """Comparison of a class list with a layout."""

    layout: str
    missing: tuple[str, ...]
    """Classes of the layout that the list lacks."""
    extra: tuple[str, ...]
    """Classes of the list that the layout lacks."""
    ordered: bool
    """True if both have the same classes in the same order."""

    def __str__(self) -> str:
        if self.ordered:
            return self.layout
        if not self.missing and not self.extra:
            return f"{self.layout} in another order"
        return f"{self.layout} ({len(self.missing)} classes missing, {len(self.extra)} extra)"


def table(file: str) -> Path:
    """Returns the path of a file in `timm/data/_info`."""
    found = find_spec("timm")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0], "data", "_info", file)


@cache
def layout_classes(layout: str) -> tuple[str, ...]:
    """Returns the class names of a layout, by label. Raises UserError for an unknown layout."""
    if layout not in LAYOUTS:
        why = "timm has no list of it; name a file with its classes" if layout == WINTER21 else f"not known{_near(layout)}"
        raise UserError(f"layout {layout!r}: {why}")
    return tuple(table(LAYOUTS[layout]).read_text().split())


def class_id(name: str) -> str:
    """Returns the identifier of a class: its synset id ("n01440764" of "n01440764 tench"), else its name."""
    found = SYNSET.search(name)
    return found[0] if found else name.strip()


def class_line(line: str) -> str:
    """Returns the class in a line of a list ("name", or columns such as "index<TAB>synset id<TAB>name"): its synset id, where
    there is one, and its name."""
    found, last = SYNSET.search(line), line.split("\t")[-1].strip()
    return f"{found[0]} {SYNSET.sub('', last).strip()}".strip() if found else last


def spoken(name: str) -> str:
    """Returns the name of a class for captions: without its synset id ("tench" of "n01440764 tench"), or the id if there is no
    name."""
    return SYNSET.sub("", name).strip() or name


def known_as(classes: Sequence[str]) -> dict[str, int]:
    """Returns {alias: label}. The aliases of a class are its line, its synset id, and its name unless several classes share
    it."""
    words = Counter(spoken(name) for name in classes)
    found = {spoken(name): label for label, name in enumerate(classes) if words[spoken(name)] == 1}
    for call in (class_id, str):
        found |= {call(name): label for label, name in enumerate(classes)}
    return found


def class_hash(classes: Sequence[str]) -> str:
    """Returns a hash of the classes and their order; it is the same for "n01440764" and "n01440764 tench"."""
    return digest([class_id(name) for name in classes])


def positions(wanted: Sequence[str], among: Sequence[str]) -> list[int | None]:
    """Returns the position of each wanted class in the list `among`, None for a missing class. Raises UserError if `among` has a
    wanted class twice."""
    ids = [class_id(name) for name in among]
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if shared := set(twice) & {class_id(name) for name in wanted}:
        raise UserError(f"{few(sorted(shared))}: the name of several classes; give synset ids (n01440764) in their place")
    places = {name: place for place, name in enumerate(ids)}
    return [places.get(class_id(name)) for name in wanted]


def matches(classes: Sequence[str]) -> list[Match]:
    """Returns the comparison of a class list with every layout, nearest layout first."""
    own = [class_id(name) for name in classes]
    found = []
    for layout in LAYOUTS:
        theirs = layout_classes(layout)
        missing, extra = set(theirs) - set(own), set(own) - set(theirs)
        found.append(Match(layout, tuple(sorted(missing)), tuple(sorted(extra)), own == list(theirs)))
    return sorted(found, key=lambda match: (len(match.missing) + len(match.extra), not match.ordered))


def layout_of(classes: Sequence[str]) -> str | None:
    """Returns the layout with exactly these classes in this order; None if there is none."""
    own = [class_id(name) for name in classes]
    if len(own) == WINTER21_CLASSES and own == sorted(set(own)) and set(own) >= set(layout_classes(WINTER21_CORE)):
        return WINTER21
    return next((layout for layout in LAYOUTS if own == list(layout_classes(layout))), None)


def describe(classes: Sequence[str]) -> str:
    """Returns a text that names the layout of a class list, or the nearest layouts."""
    if layout := layout_of(classes):
        return layout
    near = [match for match in matches(classes) if len(match.extra) < len(classes)][:3]
    return "no known layout; nearest: " + ", ".join(map(str, near)) if near else "no layout of ImageNet"


def layouts_with(count: int) -> list[str]:
    """Returns the layouts with `count` classes, as suggestions for a head without class names."""
    return [name for name in LAYOUTS if len(layout_classes(name)) == count] + [WINTER21] * (count == WINTER21_CLASSES)


def read_classes(what: str | Path) -> tuple[str, ...]:
    """Returns class names by label. `what` is the name of a layout, a text file (a class a line), a JSON list, class folders, a
    folder of synset tars or of shards with classes.txt, or a stage's result. Raises UserError for anything else."""
    if str(what) in (*LAYOUTS, WINTER21):
        return layout_classes(str(what))
    path = Path(what)
    if path.is_file():
        found = _from_json(path) if path.suffix == ".json" else _from_text(path)
    elif path.is_dir():
        found = _from_folder(path)
    else:
        raise UserError(f"{what}: no file, no folder and no layout{_near(str(what))}")
    if not found:
        raise UserError(f"{what}: no class names here")
    return found


def _from_folder(folder: Path) -> tuple[str, ...]:
    for record in (TIMM_CONFIG, LINEAGE, "classes.txt"):
        if (folder / record).is_file():
            return read_classes(folder / record)
    if (folder / "train").is_dir():
        return read_classes(folder / "train")
    tars = sorted({path.name.partition(".")[0] for path in folder.glob("*.tar*")})
    if tars and all(SYNSET.fullmatch(name) for name in tars):
        return tuple(tars)
    if tars:
        raise UserError(f"{folder}: shards hold labels and no class names; put classes.txt beside them, one class a line")
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _from_text(path: Path) -> tuple[str, ...]:
    return tuple(class_line(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _from_json(path: Path) -> tuple[str, ...]:
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if isinstance(tree, dict):
        tree = tree.get("label_names") or tree.get("classes") or []
    if isinstance(tree, dict):  # timm also accepts {index: name}
        tree = [tree.get(str(index)) for index in range(len(tree))]
    if not isinstance(tree, list) or not all(isinstance(name, str) for name in tree):
        raise UserError(f"{path}: expected class names by label")
    return tuple(tree)


def _near(name: str) -> str:
    return f"{nearest(name, LAYOUTS) or ';'} known layouts: {', '.join((*LAYOUTS, WINTER21))}"
