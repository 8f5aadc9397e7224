"""Commands of `eva-mim` that are not stages."""

import argparse
from pathlib import Path

from eva_mim.core.errors import UserError
from eva_mim.core.registry import PROGRAMS


def positive(text: str) -> int:
    """Returns an option's integer. Raises ArgumentTypeError for less than 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def program_of(recipe: str, program: str | None) -> str:
    """Returns the name of a recipe's program: `program`, or that of the folder in which it lies. Raises UserError for another."""
    name = program or Path(recipe).absolute().parent.name
    if name not in PROGRAMS:
        raise UserError(f"{recipe} does not lie in a folder of its program's name; add --program {'|'.join(PROGRAMS)}")
    return name
