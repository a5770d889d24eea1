"""Throughput of the full MNIST job on two processes (torchrun, DDP, gloo) and on one, at the same global batch.

Interleaved runs of both, one thread per process; the epochs' own training seconds are compared, without start and
evaluation. Two quiet cores are needed, and the load of the machine is written down. Where the cores are not equally
quiet, the processes divide a batch by their speeds, unless `--shares even` is given.

make distributed TORCHIMPLICIT_DATA=DIR
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import RESULTS, circumstances, data_used, write
from torchimplicit.experiments.data import load_digits

BAR = 1.5
"""Times the images per second of one process."""


def run(
    processes: int, folder: Path, epochs: int, batch: int, layer: str, data_dir: Path | None, shares: str
) -> list[float]:
    """Train; images per second of each epoch but the first, which warms up."""
    job = ["-m", "torchimplicit.experiments.main", "train", "mnist", "--layer", layer, "--threads", "1"]
    job += ["--epochs", str(epochs), "--batch-size", str(batch), "--out", str(folder), "--checkpoint-every", "100000"]
    if data_dir is not None:
        job += ["--data-dir", str(data_dir)]
    job += ["--shares", shares]
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(starter if processes > 1 else []), *job]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    config = json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [config["data"]["train"] / row["seconds"] for row in rows[1:]]


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write down; 0 if two processes reach the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--layer", default="picard")
    parser.add_argument("--shares", default="speed")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "distributed.json")
    options = parser.parse_args(arguments)
    rates: dict[int, list[float]] = {1: [], 2: []}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for processes in rates:
                place = Path(folder) / f"{repeat}-{processes}"
                size = options.batch_size
                found = run(processes, place, options.epochs, size, options.layer, options.data_dir, options.shares)
                rates[processes].append(median(found))
                print(f"{processes} processes: {rates[processes][-1]:,.0f} images per second", file=sys.stderr)
            load.append(os.getloadavg()[0])
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    result: dict[str, Any] = {
        "layer": options.layer,
        "shares": options.shares,
        "global_batch": options.batch_size,
        "data": data_used(load_digits(options.data_dir)),
        "images_per_second": {str(processes): found for processes, found in rates.items()},
        "ratio": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "load_average": load,
        "bar": BAR,
    }
    print(f"two processes over one: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    write(options.out, circumstances("benchmarks.distributed", arguments) | result)
    return 0 if median(ratios) >= BAR else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
