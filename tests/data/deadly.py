"""A source that ends processes; in a file of its own, since each process that has it imports the file."""

from __future__ import annotations

import os
import signal

from PIL import Image

from eva_mim.core.contracts import Sample


class Deadly:
    """Fifty records, of which two end the process that reads them."""

    classes = None
    fingerprint = "deadly"

    def __len__(self) -> int:
        return 50

    def key(self, index: int) -> str:
        return f"number {index}"

    def read(self, index: int) -> Sample:
        if index in (7, 33):
            os.kill(os.getpid(), signal.SIGSEGV)
        if index == 20:
            raise OSError("broken")
        return Sample(self.key(index), Image.new("RGB", (2, 2)))
