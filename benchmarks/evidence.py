"""The table of full-MNIST results: reads finished runs `LAYER-SEED` of one folder, checks and averages them.

make evidence TORCHIMPLICIT_DATA=DIR
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, circumstances, write

TRAIN_SAMPLES = 60_000


@dataclass(frozen=True)
class Target:
    """What the runs of a layer have to show: a mean test error in percent, after so many epochs."""

    error: float
    epochs: int


TARGETS = {"picard": Target(3.2, 10), "anderson": Target(3.2, 10), "newton": Target(3.5, 8)}


@dataclass(frozen=True)
class Run:
    """One finished run: its last epoch, and what became of its batches over all epochs.

    `below_one` counts the batches in which some sample did not converge, `worst` is the smallest fraction that did.
    """

    seed: int
    epochs: int
    test_error: float
    iterations: float
    batches: int
    below_one: int
    worst: float
    seconds_per_epoch: float


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_run(folder: Path, layer: str, seed: int) -> Run:
    """Read a run folder; a run of another layer, seed or data set, or one that has not finished, is an error."""
    config = json.loads((folder / "config.json").read_text())
    options = config["options"]
    rows, batches = _lines(folder / "metrics.jsonl"), _lines(folder / "batches.jsonl")
    expected = {"layer": layer, "seed": seed, "epochs": TARGETS[layer].epochs, "tolerance": 1e-4, "batch_size": 100}
    for name, value in expected.items():
        if options[name] != value:
            raise ValueError(
                f"{folder}: {name} is {options[name]!r}, a run with {value!r} belongs here; train it again"
            )
    if len(rows) != expected["epochs"]:
        raise ValueError(f"{folder}: {len(rows)} of {expected['epochs']} epochs are there; run `make evidence` again")
    if config["data"]["train"] != TRAIN_SAMPLES:
        raise ValueError(
            f"{folder}: not a run on the full {TRAIN_SAMPLES:,} images; set TORCHIMPLICIT_DATA, train again"
        )
    fractions = [batch["converged"] for batch in batches]
    return Run(
        seed=seed,
        epochs=len(rows),
        test_error=rows[-1]["test_error"],
        iterations=rows[-1]["iterations"],
        batches=len(fractions),
        below_one=sum(fraction < 1.0 for fraction in fractions),
        worst=min(fractions),
        seconds_per_epoch=mean(row["seconds"] for row in rows),
    )


def summarise(layer: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Average the runs of one layer and compare with its target."""
    error = mean(run.test_error for run in runs)
    return {
        "test_error": error,
        "target": TARGETS[layer].error,
        "met": error <= TARGETS[layer].error,
        "runs": [asdict(run) for run in runs],
    }


def show(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Print a row per layer."""
    table = Table(title="full MNIST")
    for heading in (
        "layer",
        "epochs",
        "test error",
        "of each seed",
        "target",
        "iterations",
        "batches not all converged",
    ):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer, row in rows.items():
        runs = row["runs"]
        table.add_row(
            layer,
            str(runs[0]["epochs"]),
            f"{row['test_error']:.2f} %",
            ", ".join(f"{run['test_error']:.2f}" for run in runs),
            f"{row['target']:.1f} % {'met' if row['met'] else 'NOT MET'}",
            f"{mean(run['iterations'] for run in runs):.1f}",
            f"{sum(run['below_one'] for run in runs)} of {sum(run['batches'] for run in runs):,} "
            f"(worst {min(run['worst'] for run in runs):.0%})",
        )
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Read, print, write; the status is 1 when a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where the run folders LAYER-SEED are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "mnist.json", help="where the figures go")
    options = parser.parse_args(arguments)
    try:
        rows = {
            layer: summarise(
                layer, [read_run(options.folder / f"{layer}-{seed}", layer, seed) for seed in options.seeds]
            )
            for layer in TARGETS
        }
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    show(rows, Console(width=None if sys.stdout.isatty() else 140))
    write(options.out, {**circumstances("benchmarks.evidence", ["RUNS"]), "layers": rows})
    return 0 if all(row["met"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
