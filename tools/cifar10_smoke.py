"""Runs configs/pipelines/cifar10_smoke.yaml on real photographs and fails when learning is broken.

    python -m tools.cifar10_smoke [--data ../shared/data/cifar10] [--out runs/cifar10_smoke] [--seeds 0 1 2]

Exit code 0: every figure is within its bound; 1: one is not; 0 with a notice when the data is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from eva_mim.cli import main as eva_mim

Metrics = dict[str, dict[str, float]]

CHECKS: list[tuple[str, Callable[[Metrics], float], float]] = [
    ("teacher zero-shot top-1", lambda m: m["clip_teacher"]["zeroshot_top1"], 40.0),
    ("held-out cosine above that of the mean target", lambda m: m["mim"]["cosine"] - m["mim"]["cosine_of_mean"], 0.1),
    ("k-NN top-1 after masked pretraining", lambda m: m["mim"]["knn_top1"], 30.0),
    ("spread of features (0 = collapsed)", lambda m: m["mim"]["feature_std"], 0.3),
    ("zero-shot points, seeded over scratch", lambda m: m["clip"]["zeroshot_top1"] - m["clip_scratch"]["zeroshot_top1"], 5.0),
    ("target points, seeded over scratch", lambda m: m["target"]["top1"] - m["target_scratch"]["top1"], 5.0),
]
"""(what, figure, lower bound). Measured with seed 0 in bf16: 52.1, 0.166, 41.7, 0.67, +16.7 and +14.5; in fp32 the first four are
51.7, 0.163, 42.15 and 0.63."""


def measure(data: Path, out: Path, seed: int) -> Metrics:
    """Run the pipeline with a seed and read its figures."""
    settings = [f"data.root={data}", f"run.seed={seed}"]
    code = eva_mim(["pipeline", "configs/pipelines/cifar10_smoke.yaml", *settings, "--out", str(out)])
    if code:
        sys.exit(code)
    return {path.parent.name: json.loads(path.read_text())["metrics"] for path in out.glob("*/lineage.json")}


def main() -> int:
    """Check every seed; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_smoke"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        sys.stdout.write(f"skipped: {arguments.data} is not there (CIFAR-10 as tar shards)\n")
        return 0
    failed = 0
    for seed in arguments.seeds:
        started = time.monotonic()
        metrics = measure(arguments.data, arguments.out / f"seed{seed}", seed)
        sys.stdout.write(f"seed {seed}: {time.monotonic() - started:.0f} s\n")
        for what, figure, bound in CHECKS:
            value = figure(metrics)
            failed += value < bound
            sys.stdout.write(f"  {'ok  ' if value >= bound else 'FAIL'} {what}: {value:.3f} (at least {bound})\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
