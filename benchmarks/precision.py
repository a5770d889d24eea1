"""What reduced precision costs in accuracy: full MNIST in float32, bf16 and fp16, the same seeds.

make precision TORCHIMPLICIT_DATA=DIR
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from benchmarks.record import RESULTS, circumstances, data_used, write
from torchimplicit.experiments.config import PRECISIONS, TrainConfig
from torchimplicit.experiments.console import PlainReporter
from torchimplicit.experiments.data import load_digits
from torchimplicit.experiments.train import Job, train

ALLOWED = 0.3
"""Points of test error by which a reduced precision may be worse, in the mean."""


def measure(layer: str, epochs: int, seeds: int, data_dir: Path | None) -> dict[str, Any]:
    """Train every precision with every seed; the test errors in percent, and what went wrong."""
    digits = load_digits(data_dir)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            for seed in range(seeds):
                config = TrainConfig(layer=layer, epochs=epochs, seed=seed, threads=1, precision=precision)
                job = Job(config, digits, Path(folder) / f"{precision}-{seed}", checkpoint_every=10**9)
                _, rows = train(job, PlainReporter(Console(stderr=True)))
                runs.append(
                    {
                        "precision": precision,
                        "seed": seed,
                        "test_error": rows[-1]["test_error"],
                        "iterations": mean(row["iterations"] for row in rows),
                        "worst_batch_converged": min(row["worst_batch_converged"] for row in rows),
                        "skipped": sum(sum(row["skipped"].values()) for row in rows),
                        "seconds_per_epoch": mean(row["seconds"] for row in rows),
                    }
                )
    means = {p: mean(run["test_error"] for run in runs if run["precision"] == p) for p in PRECISIONS}
    worse = {p: error - means["float32"] for p, error in means.items()}
    met = all(points <= ALLOWED for points in worse.values())
    return {"layer": layer, "epochs": epochs, "data": data_used(digits), "test_error": means, "met": met, "runs": runs}


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write down; 0 if no precision is worse by more than it may be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", default="picard")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options.layer, options.epochs, options.seeds, options.data_dir)
    for precision, error in found["test_error"].items():
        print(f"{precision:8} test error {error:.2f} %")
    write(options.out, circumstances("benchmarks.precision", arguments) | found)
    return 0 if found["met"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
