"""Commands of `eva-mim` that are not stages."""

import argparse


def positive(text: str) -> int:
    """Returns an option's integer. Raises ArgumentTypeError for less than 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
