"""What the index of a large folder costs: seconds to open it, and host memory of all loader workers together.

    python -m tools.index_memory [--millions 14] [--classes 21841] [--workers 8] [--ranks 1] [--folder DIR] [--bound 1.0]

Real class folders without images, and a made-up index of so many file names in them (20 characters, as in ImageNet). Each
rank opens it as training does (labels, a held-out share, the order of an epoch) and forks its workers, which read every page of
it. Memory is the sum of PSS over all processes, less that of the same processes without an index: what they share counts once.
Exit code 0: below `bound` GB and 2 s; 1: not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from eva_mim.data import DataSettings
from eva_mim.data.sampler import GlobalOrder
from eva_mim.data.sources import folder
from eva_mim.data.sources.index import Content, narrow
from eva_mim.data.splits import Splits, open_splits


def made_up(root: Path, images: int) -> Content:
    """The index that a walk over `root` would give, if its folders held the images."""
    classes = sorted(path.name for path in root.iterdir())
    names = "".join(f"{number:015d}.JPEG" for number in range(min(images, 10**6))).encode()
    folders = ["", *classes]
    return Content(
        {
            "name": np.resize(np.frombuffer(names, np.uint8), images * 20),
            "name.ends": narrow(np.arange(1, images + 1) * 20),
            "folder": np.sort(np.arange(images) % len(classes) + 1).astype(np.uint32),
            "folders": np.frombuffer("".join(folders).encode(), np.uint8),
            "folders.ends": narrow(np.cumsum([len(name) for name in folders])),
            "changed": np.array([(root / name).stat().st_mtime_ns for name in folders], np.int64),
            "captioned": np.zeros(len(folders), np.uint8),
        },
        {"fingerprint": "made up", "made": str(time.time_ns() + 10**10), "passed_over": ""},
    )


def memory() -> int:
    """Bytes of this process; shared pages count by their share."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def rank(root: Path, workers: int, barrier: Barrier, results: Any) -> None:
    """Open, and fork the workers before and after."""
    context = get_context("fork")
    for opened in (False, True):
        splits: Splits | None = None
        if opened:
            began = time.perf_counter()
            splits = open_splits(DataSettings(root=root, val_share=0.02))
            results.put(("seconds", time.perf_counter() - began))
            order = GlobalOrder(len(splits.train), seed=0, global_batch=4096, micro_batch=4096)  # kept, as by a loader
            order.global_step(0)
        processes = [context.Process(target=worker, args=(splits, barrier, results)) for _ in range(workers)]
        for process in processes:
            process.start()
        worker(splits, barrier, results)
        for process in processes:
            process.join()


def worker(splits: Splits | None, barrier: Barrier, results: Any) -> None:
    """Read every page of the index, and some keys as a loader does; then all processes look at their memory at once."""
    if splits is not None:
        source = splits.train.source  # type: ignore[attr-defined]
        for name in ("name", "name.ends", "folder"):
            source.index[name][::1024].sum()
        for index in np.random.default_rng(os.getpid()).integers(0, len(splits.train), 20_000):
            splits.train.key(int(index))
    barrier.wait()
    results.put(("with" if splits is not None else "without", memory()))
    barrier.wait()


def main() -> int:
    """Make the folders and the index, measure, say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=float, default=14.0, help="images (ImageNet-21k: 14)")
    parser.add_argument("--classes", type=int, default=21841)
    parser.add_argument("--workers", type=int, default=8, help="of each rank")
    parser.add_argument("--ranks", type=int, default=1, help="processes on the host that train")
    parser.add_argument("--folder", type=Path, help="for the folders and the cache; default a temporary one")
    parser.add_argument("--bound", type=float, default=1.0, help="GB")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(dir=options.folder))
    os.environ["EVA_MIM_CACHE"] = str(base / "cache")
    try:
        root, images = base / "images", round(options.millions * 1e6)
        for number in range(options.classes):
            (root / f"n{number:08d}").mkdir(parents=True)
        folder._scan = lambda _root, _suffixes: made_up(root, images)
        size = folder.folder_index(root).path.stat().st_size
        context = get_context("spawn")
        barrier, results = context.Barrier(options.ranks * (options.workers + 1), timeout=900), context.SimpleQueue()
        ranks = [context.Process(target=rank, args=(root, options.workers, barrier, results)) for _ in range(options.ranks)]
        for process in ranks:
            process.start()
        count = options.ranks * (2 * options.workers + 3)
        found = [results.get() for _ in range(count)]
        used = {kind: [value for name, value in found if name == kind] for kind in ("seconds", "without", "with")}
        more, seconds = (sum(used["with"]) - sum(used["without"])) / 1e9, max(used["seconds"])
        sys.stdout.write(f"{images} images, file of {size / 1e6:.0f} MB: opened in {seconds:.2f} s; "
                         f"{more:.3f} GB for {options.ranks} ranks x (1 + {options.workers} workers), with an epoch's order\n")
        return int(more > options.bound or seconds > 2)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    sys.exit(main())
