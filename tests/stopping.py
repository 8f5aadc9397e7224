"""`eva-mim` told to stop in the middle, for a pool: python -m tests.stopping STEP SIGTERM mim recipe.yaml ...

The signal comes to the main rank in step STEP; exit code 0 says that the run has ended as after a signal. The processes stay.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from eva_mim.cli import main as eva_mim
from eva_mim.core.distributed import is_main
from eva_mim.core.errors import INTERRUPTED, REQUEUE
from eva_mim.run.loop import Loop
from eva_mim.run.program import leave


def main(argv: Sequence[str]) -> int:
    """0, or the exit code of a run that was not stopped so."""
    last, number = int(argv[0]), signal.Signals[argv[1]]
    one_step = Loop._one_step

    def step(self: Loop, batches: Any) -> Any:
        if self.step + 1 == last and is_main():
            signal.raise_signal(number)
        return one_step(self, batches)

    with patch.object(Loop, "_one_step", step):
        code = eva_mim(list(argv[2:]))
    return code - (INTERRUPTED if number == signal.SIGINT else REQUEUE) if code else 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
