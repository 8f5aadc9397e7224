"""Random seeds: every random choice is a function of (run seed, purpose, numbers); the numbers are epoch and sample, or step and
rank.

So results do not depend on workers, and a resumed run draws the same numbers as an uninterrupted one. Deriving seeds needs no
torch, so that processes of `data` commands, which only open a source, start without it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """Returns a 63-bit seed; different arguments give unrelated seeds."""
    text = "/".join((str(seed), purpose, *map(str, numbers)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and torch (libraries such as timm's augmentations draw from all three)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Runs a block with its own global random state and restores the outer one."""
    import torch

    outer = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(seed)
    try:
        yield
    finally:
        random.setstate(outer[0])
        np.random.set_state(outer[1])
        torch.set_rng_state(outer[2])
