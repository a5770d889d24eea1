"""What the Jacobian penalty saves and costs: the job `torchimplicit train mnist` with and without it, over seeds.

make jacobian-penalty TORCHIMPLICIT_DATA=DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, circumstances, data_used, write
from torchimplicit.experiments.config import DEFAULT_EPOCHS, TrainConfig
from torchimplicit.experiments.console import PlainReporter
from torchimplicit.experiments.data import Digits, load_digits
from torchimplicit.experiments.recipe import SOLVERS
from torchimplicit.experiments.train import Job, train

SAVED, LOST = 0.40, 0.3
"""What is claimed: so much of the evaluations of the last epoch saved, for so many points of test error at most."""
PLOT = Path(__file__).parent / "plots" / "jacobian-penalty.png"


def run(layer: str, weight: float, seed: int, epochs: int, digits: Digits, console: Console) -> dict[str, Any]:
    """Train once; the evaluations are the cell's, Jacobian products included, those of the penalty not."""
    console.print(f"layer {layer}, weight {weight:g}, seed {seed}", highlight=False)
    config = TrainConfig(layer=layer, epochs=epochs, seed=seed, jacobian_penalty=weight, threads=1)
    with TemporaryDirectory() as folder, PlainReporter(console) as reporter:
        _, rows = train(Job(config, digits, Path(folder) / "run"), reporter)
    last = rows[-1]
    return {
        "layer": layer,
        "weight": weight,
        "seed": seed,
        "test_error": last["test_error"],
        "train_error": last["train_error"],
        "forward": [row["evaluations_forward"] for row in rows],
        "backward": [row["evaluations_backward"] for row in rows],
        "test_evaluations": last["test_evaluations"],
        "test_steps": last["test_steps"],
        "failed_batches": sum(row["failed_batches"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
    }


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per layer and weight, means over the seeds, with what is saved and lost against weight 0."""
    rows: list[dict[str, Any]] = []
    plain: dict[str, dict[str, Any]] = {}
    for layer, weight in sorted({(r["layer"], r["weight"]) for r in runs}):
        mine = [r for r in runs if (r["layer"], r["weight"]) == (layer, weight)]
        row: dict[str, Any] = {
            "layer": layer,
            "weight": weight,
            "test_error": mean(r["test_error"] for r in mine),
            "test_errors": [r["test_error"] for r in mine],
            "last_epoch": mean(r["forward"][-1] + r["backward"][-1] for r in mine),
            "all_epochs": mean(sum(r["forward"]) + sum(r["backward"]) for r in mine),
            "test_evaluations": mean(r["test_evaluations"] for r in mine),
            "failed_batches": sum(r["failed_batches"] for r in mine),
        }
        plain.setdefault(layer, row)
        for name in ("last_epoch", "all_epochs", "test_evaluations"):
            row[f"saved_{name}"] = 1 - row[name] / plain[layer][name]
        row["lost"] = row["test_error"] - plain[layer]["test_error"]
        row["met"] = row["saved_last_epoch"] >= SAVED and row["lost"] <= LOST if weight else None
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print them."""
    table = Table(title="evaluations of the cell, forward and backward; test error in %")
    for heading in ("layer", "weight", "last epoch", "saved", "all epochs", "saved", "test", "saved", "error", "lost"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in rows:
        figures = [
            text
            for name in ("last_epoch", "all_epochs", "test_evaluations")
            for text in (f"{row[name]:,.0f}", f"{row[f'saved_{name}']:.0%}" if row["weight"] else "")
        ]
        errors = ", ".join(f"{error:.2f}" for error in row["test_errors"])
        error = f"{row['test_error']:.2f} ({errors})"
        table.add_row(
            row["layer"], f"{row['weight']:g}", *figures, error, f"{row['lost']:+.2f}" if row["weight"] else ""
        )
    console.print(table)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Evaluations of each epoch, mean over the seeds: a panel for each layer, a line for each weight."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    layers = sorted({r["layer"] for r in runs})
    figure = Figure(figsize=(4.5 * len(layers), 3.4), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        weights = sorted({r["weight"] for r in runs if r["layer"] == layer})
        for i, weight in enumerate(weights):
            mine = [r for r in runs if (r["layer"], r["weight"]) == (layer, weight)]
            epochs = range(1, len(mine[0]["forward"]) + 1)
            sums = [mean(r["forward"][e - 1] + r["backward"][e - 1] for r in mine) for e in epochs]
            error = mean(r["test_error"] for r in mine)
            axes.plot(
                epochs, sums, "o-", markersize=3, color=f"C{i}", label=f"weight {weight:g}: test error {error:.2f} %"
            )
        axes.set(title=f"MNIST, {layer}", xlabel="epoch", ylabel="evaluations per epoch")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"written: {path}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """Train, print, write; the status is 1 unless a weight of each layer does what is claimed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jacobian_penalty", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--layers", choices=SOLVERS, nargs="+", default=["picard"])
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="0, to compare with, is added"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the layer's own")
    parser.add_argument("--data-dir", type=Path, help="IDX files (else TORCHIMPLICIT_DATA, else 5,000 digits)")
    parser.add_argument("--out", type=Path, default=RESULTS / "jacobian-penalty.json", help="where the figures go")
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 140)
    digits = load_digits(options.data_dir)
    runs = [
        run(layer, weight, seed, options.epochs or DEFAULT_EPOCHS[layer], digits, console)
        for layer in options.layers
        for seed in options.seeds
        for weight in sorted({0.0, *options.weights})
    ]
    rows = summarise(runs)
    show(rows, console)
    draw(runs, options.plot)
    record = {**circumstances("benchmarks.jacobian_penalty", arguments), "data": data_used(digits)}
    write(options.out, {**record, "rows": rows, "runs": runs})
    return 0 if all(any(r["met"] for r in rows if r["layer"] == layer) for layer in options.layers) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
