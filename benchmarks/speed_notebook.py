"""An epoch of training with our layers against an epoch with the notebook's: the times, and what was reached in them.

One process, one thread, the same data in the same order, the same initial weights, the same tolerance. At two moments:
the first epoch, and an epoch that starts from weights trained for several. Every batch's residual is recomputed here.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.record import RESULTS, circumstances, data_used, write
from torchimplicit.experiments.bench.epochs import FEATURES, initial_model, learning_rate, make_batches, trained
from torchimplicit.experiments.bench.notebook import NotebookFixedPoint, NotebookNewton, make_notebook_model
from torchimplicit.experiments.bench.timing import Batch, Tally, Weights, paired_ratio, race
from torchimplicit.experiments.data import Digits, load_digits
from torchimplicit.experiments.recipe import make_model


@dataclass(frozen=True)
class Contender:
    """A layer to be timed; `reference` is the one its time is divided by, `bound` what the ratio has to stay under."""

    build: Callable[[float, int], nn.Module]
    reference: str | None = None
    bound: float | None = None


def _ours(layer: str) -> Callable[[float, int], nn.Module]:
    return lambda tolerance, batch_size: make_model(
        layer, tolerance=tolerance, batch_size=batch_size, features=FEATURES
    )


CONTENDERS = {
    "notebook fixed point": Contender(
        lambda tolerance, _: make_notebook_model(NotebookFixedPoint(FEATURES, tolerance), FEATURES)
    ),
    "picard": Contender(_ours("picard"), "notebook fixed point", 0.75),
    "anderson": Contender(_ours("anderson"), "notebook fixed point"),
    "notebook newton": Contender(
        lambda tolerance, _: make_notebook_model(NotebookNewton(FEATURES, tolerance), FEATURES)
    ),
    "newton": Contender(_ours("newton"), "notebook newton", 0.10),
}


@dataclass(frozen=True)
class Settings:
    """The choices of one measurement; see `--help`."""

    data_dir: Path | None
    weights: tuple[str, ...]
    trained_epochs: int
    repeats: int
    batches: int | None
    segment: int
    batch_size: int
    tolerance: float
    seed: int
    out: Path


def shuffled(digits: Digits, settings: Settings, seed: int) -> list[Batch]:
    """Cut one shuffled epoch, or its first `settings.batches` batches."""
    return make_batches(digits, seed, batches=settings.batches, batch_size=settings.batch_size)


def starting_weights(moment: str, digits: Digits, settings: Settings) -> Weights:
    """Make the weights every contender starts from: seeded, and for "trained" taken through some epochs of `picard`."""
    model = initial_model(settings.seed, tolerance=settings.tolerance, batch_size=settings.batch_size)
    epochs = range(settings.trained_epochs if moment == "trained" else 0)
    return trained(model, [shuffled(digits, settings, settings.seed + 1000 + epoch) for epoch in epochs])


def measure(moment: str, digits: Digits, settings: Settings, console: Console) -> dict[str, list[Tally]]:
    """Race all contenders `settings.repeats` times, each time over a differently shuffled epoch."""
    weights = starting_weights(moment, digits, settings)
    rate = learning_rate(settings.trained_epochs if moment == "trained" else 0)
    builders = {
        name: partial(contender.build, settings.tolerance, settings.batch_size)
        for name, contender in CONTENDERS.items()
    }
    runs: dict[str, list[Tally]] = {name: [] for name in CONTENDERS}
    for repeat in range(settings.repeats):
        batches = shuffled(digits, settings, settings.seed + repeat)
        for name, tally in race(builders, weights, batches, learning_rate=rate, segment=settings.segment).items():
            runs[name].append(tally)
        seconds = ", ".join(f"{name} {tallies[-1].seconds:.2f} s" for name, tallies in runs.items())
        console.print(f"{moment}, run {repeat + 1} of {settings.repeats}: {seconds}", highlight=False)
    return runs


def summarise(runs: dict[str, list[Tally]], tolerance: float) -> dict[str, dict[str, Any]]:
    """Reduce the runs of one moment to a row per contender."""
    rows = {}
    for name, contender in CONTENDERS.items():
        tallies = runs[name]
        worst = max(max(tally.residuals) for tally in tallies)
        row: dict[str, Any] = {
            "seconds": median(tally.seconds for tally in tallies),
            "iterations": mean(mean(tally.iterations) for tally in tallies),
            "worst_residual": worst,
            "reached": worst <= tolerance,
            "skipped_steps": sum(tally.skipped for tally in tallies),
        }
        if all(tally.forward for tally in tallies):
            row["evaluations_forward"] = mean(mean(tally.forward) for tally in tallies)
            row["evaluations_backward"] = mean(mean(tally.backward) for tally in tallies)
        if contender.reference:
            reference = runs[contender.reference]
            wall = paired_ratio([t.seconds for t in tallies], [t.seconds for t in reference])
            cpu = paired_ratio([t.cpu_seconds for t in tallies], [t.cpu_seconds for t in reference])
            row |= {"against": contender.reference, "ratio": asdict(wall), "cpu_ratio": asdict(cpu)}
            if contender.bound is not None:
                row |= {"bound": contender.bound, "within_bound": wall.median <= contender.bound}
        rows[name] = row
    return rows


def show(moment: str, rows: dict[str, dict[str, Any]], settings: Settings, console: Console) -> None:
    """Print the rows of one moment as a table."""
    title = "first epoch" if moment == "initial" else f"epoch {settings.trained_epochs + 1}"
    table = Table(title=f"{title}: {settings.repeats} runs, 1 thread, tolerance {settings.tolerance:g}")
    table.add_column("layer")
    for heading in ("seconds", "ratio (range)", "bound", "iterations", "worst residual", "reached"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        ratio = row.get("ratio")
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio else "",
            f"{row['bound']:.2f} {'met' if row['within_bound'] else 'NOT MET'}" if "bound" in row else "",
            f"{row['iterations']:.1f}",
            f"{row['worst_residual']:.2e}",
            "yes" if row["reached"] else "NO",
        )
    console.print(table)


def passes(rows: dict[str, dict[str, Any]]) -> bool:
    """Say whether our layers reached the tolerance on every batch and stayed within their bounds."""
    ours = [row for row in rows.values() if "against" in row]
    return all(row["reached"] and row.get("within_bound", True) for row in ours)


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed_notebook", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--data-dir", type=Path, help="folder of IDX files (else TORCHIMPLICIT_DATA, else 5,000 digits)"
    )
    parser.add_argument("--weights", choices=("initial", "trained", "both"), default="both", help="where epochs start")
    parser.add_argument("--trained-epochs", type=int, default=5, help="epochs of training behind the trained weights")
    parser.add_argument("--repeats", type=int, default=5, help="paired runs")
    parser.add_argument("--batches", type=int, help="batches of each epoch (default: all)")
    parser.add_argument("--segment", type=int, default=25, help="batches a contender trains before the next one's turn")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="Frobenius norm of the residual over a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "notebook-speed.json", help="where the figures go")
    options = vars(parser.parse_args(arguments))
    for name in ("repeats", "batches", "segment", "batch_size", "trained_epochs"):
        if options[name] is not None and options[name] < 1:
            parser.error(f"--{name.replace('_', '-')} {options[name]}: give a number of at least 1")
    if not options["tolerance"] > 0:
        parser.error(f"--tolerance {options['tolerance']}: give a number above 0")
    weights = options.pop("weights")
    return Settings(weights=("initial", "trained") if weights == "both" else (weights,), **options)


def main(arguments: Sequence[str]) -> int:
    """Measure, print the tables, write the figures; the status is 1 when a bound or a tolerance was missed."""
    settings = parse(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    digits = load_digits(settings.data_dir)
    console.print(digits.describe(), highlight=False)
    result: dict[str, Any] = {
        **circumstances("benchmarks.speed_notebook", arguments),
        "data": data_used(digits),
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("data_dir", "out")},
        "moments": {},
    }
    good = True
    for moment in settings.weights:
        runs = measure(moment, digits, settings, console)
        rows = summarise(runs, settings.tolerance)
        show(moment, rows, settings, console)
        good = good and passes(rows)
        result["moments"][moment] = {
            "rows": rows,
            "runs": {
                name: [
                    {
                        "seconds": tally.seconds,
                        "cpu_seconds": tally.cpu_seconds,
                        "mean_iterations": mean(tally.iterations),
                        "worst_residual": max(tally.residuals),
                    }
                    for tally in tallies
                ]
                for name, tallies in runs.items()
            },
        }
    write(settings.out, result)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
