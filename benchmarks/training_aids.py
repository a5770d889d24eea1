"""What each of the training aids does to the MNIST recipe: test error and evaluations, over seeds.

python -m benchmarks.training_aids
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchimplicit as ti
from benchmarks.record import RESULTS, circumstances, data_used, write
from torchimplicit.experiments.data import Digits, load_digits
from torchimplicit.experiments.metrics import Solves
from torchimplicit.experiments.recipe import make_model
from torchimplicit.experiments.train import evaluate

BATCH = 100


class Aid:
    """A training of its own: what is done to the layer before an epoch, and around a batch."""

    def __init__(self, model: nn.Sequential, samples: int, epochs: int) -> None:
        layer = model[2]
        assert isinstance(layer, ti.nn.TanhEquilibrium)
        self.layer, self.samples, self.epochs = layer, samples, epochs

    def before(self, epoch: int) -> None:
        """An epoch is about to begin."""

    def around(self, keys: Tensor) -> Any:
        """The context of a batch."""
        return nullcontext()

    def done(self) -> None:
        """Training is over: evaluation is at the layer's own tolerance, from its own start."""


class Schedule(Aid):
    """rtol from 1e-1 to 1e-4 in the first two thirds."""

    def __init__(self, model: nn.Sequential, samples: int, epochs: int) -> None:
        super().__init__(model, samples, epochs)
        self.schedule = ti.nn.ToleranceSchedule(model, start=1e-1, end=1e-4, steps=2 * epochs // 3)

    def before(self, epoch: int) -> None:
        """A step of the schedule."""
        if epoch:
            self.schedule.step()


class Loose(Aid):
    """rtol 1e-1 throughout, to compare the schedule with."""

    def __init__(self, model: nn.Sequential, samples: int, epochs: int) -> None:
        super().__init__(model, samples, epochs)
        self.schedule = ti.nn.ToleranceSchedule(model, start=1e-1, end=1e-1, steps=epochs)

    def done(self) -> None:
        """Tight again."""
        self.schedule.load_state_dict({"taken": self.epochs})


class Remembered(Aid):
    """Each sample starts from its solution of the epoch before."""

    def __init__(self, model: nn.Sequential, samples: int, epochs: int) -> None:
        super().__init__(model, samples, epochs)
        self.memory = ti.nn.BySample(samples)
        self.layer.init = self.memory

    def around(self, keys: Tensor) -> Any:
        """These samples."""
        return self.memory.of(keys)


class Shallow(Aid):
    """Three steps, differentiated, in the first third."""

    def before(self, epoch: int) -> None:
        """The switch."""
        self.layer.depth = 3 if 3 * epoch < self.epochs else None


class Random(Aid):
    """Random starts in training."""

    def __init__(self, model: nn.Sequential, samples: int, epochs: int) -> None:
        super().__init__(model, samples, epochs)
        self.layer.init = ti.nn.RandomStart()


AIDS: dict[str, type[Aid]] = {
    "plain": Aid,
    "tolerance schedule": Schedule,
    "loose throughout": Loose,
    "BySample": Remembered,
    "depth 3 at first": Shallow,
    "RandomStart": Random,
}


def run(name: str, seed: int, epochs: int, digits: Digits) -> dict[str, Any]:
    """Train once, as the command line does, and evaluate."""
    torch.manual_seed(seed)
    model = make_model("picard")
    aid = AIDS[name](model, len(digits.train), epochs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    forward, backward = [], []
    for epoch in range(epochs):
        aid.before(epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if 3 * epoch < 2 * epochs else 0.01
        model.train()
        totals = [0, 0]
        for keys in torch.randperm(len(digits.train), generator=generator).split(BATCH):
            images, labels = digits.train.batch(keys)
            optimizer.zero_grad()
            with ti.monitor(model) as log, aid.around(keys):
                nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            solves = Solves.of(log)
            totals[0] += solves.evaluations_forward
            totals[1] += solves.evaluations_backward
        forward.append(totals[0])
        backward.append(totals[1])
    aid.done()
    found = evaluate(model, digits.test)
    images, _ = digits.test.batch(slice(0, 200))
    with torch.no_grad():
        x = model[1](model[0](images))
        alignment = ti.path_independence(model[2], x).score
        radius = ti.spectral_radius(model[2], model[2](x), x).value
    return {
        "aid": name,
        "seed": seed,
        "test_error": found["test_error"],
        "forward": forward,
        "backward": backward,
        "test_evaluations": found["test_evaluations"],
        "alignment": alignment,
        "median_radius": float(radius.median()),
    }


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per aid, means over the seeds."""
    rows = []
    for name in AIDS:
        mine = [r for r in runs if r["aid"] == name]
        rows.append(
            {
                "aid": name,
                "test_error": mean(r["test_error"] for r in mine),
                "test_errors": [r["test_error"] for r in mine],
                "forward": mean(sum(r["forward"]) for r in mine),
                "backward": mean(sum(r["backward"]) for r in mine),
                "alignment": mean(r["alignment"] for r in mine),
                "median_radius": mean(r["median_radius"] for r in mine),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print them."""
    table = Table(title="digits, picard: evaluations of all epochs")
    for heading in ("aid", "test error", "of each seed", "forward", "backward", "alignment", "median ρ"):
        table.add_column(heading, justify="left" if heading == "aid" else "right")
    for row in rows:
        table.add_row(
            row["aid"],
            f"{row['test_error']:.2f} %",
            ", ".join(f"{error:.2f}" for error in row["test_errors"]),
            f"{row['forward']:,.0f}",
            f"{row['backward']:,.0f}",
            f"{row['alignment']:.4f}",
            f"{row['median_radius']:.3f}",
        )
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Train, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_aids", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--data-dir", type=Path, help="IDX files (else TORCHIMPLICIT_DATA, else 5,000 digits)")
    parser.add_argument("--out", type=Path, default=RESULTS / "training-aids.json", help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    digits = load_digits(options.data_dir)
    runs = []
    for seed in options.seeds:
        for name in AIDS:
            console.print(f"{name}, seed {seed}", highlight=False)
            runs.append(run(name, seed, options.epochs, digits))
    rows = summarise(runs)
    show(rows, console)
    record = {**circumstances("benchmarks.training_aids", arguments), "data": data_used(digits)}
    write(options.out, {**record, "rows": rows, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
