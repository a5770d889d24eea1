"""MNIST epochs at the notebook's tolerance, against the notebook's own algorithms."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from torch import nn

from torchimplicit._extension import library
from torchimplicit.experiments.bench.epochs import (
    BATCH,
    FEATURES,
    initial_model,
    learning_rate,
    make_batches,
    trained,
)
from torchimplicit.experiments.bench.exactness import gradient_errors
from torchimplicit.experiments.bench.notebook import NotebookFixedPoint, NotebookNewton, make_notebook_model
from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.bench.timing import Tally, Weights, paired_ratio, race
from torchimplicit.experiments.data import Digits, load_digits
from torchimplicit.experiments.recipe import make_model
from torchimplicit.nn._compiled import LOOPS

TOLERANCE = 1e-4
"""The notebook's: the Frobenius norm of `f(z) − z` over a batch."""
EXACT = 2e-4
"""A gradient with at most this relative error counts as exact: the notebook's own has up to 8e-4."""
LATER = 5
"""Epochs of training behind "trained" weights."""
PIECE = 15
"""Batches of a piece."""
CHECKED = 5
"""Batches whose gradient is compared to the exact one, at each of two places."""
QUICK = 40
"""Batches of an epoch that is to be quick."""


@dataclass(frozen=True)
class Epoch:
    """What a row trains: the recipe's layer `ours`, the notebook's layer `theirs`, and how much in each run.

    Attributes:
        epochs: of training behind the weights that both start from.
        pieces: of the epoch that are trained: None is all of it in one; else so many, equally far apart, each from the
            weights that belong to its place. The equation is easy where an epoch begins: its beginning is no sample.
    """

    ours: str
    theirs: Callable[[int, float], NotebookFixedPoint | NotebookNewton]
    epochs: int = 0
    pieces: int | None = None

    def builders(self) -> dict[str, Callable[[], nn.Module]]:
        """Both models, ours compiled and as it is."""
        ours = partial(make_model, self.ours, tolerance=TOLERANCE, batch_size=BATCH, features=FEATURES)
        return {
            "ours": partial(ours, compiled=True),
            "uncompiled": ours,
            "theirs": lambda: make_notebook_model(self.theirs(FEATURES, TOLERANCE), FEATURES),
        }


def measure(epoch: Epoch, settings: Settings) -> Measurement:
    """Race both through differently shuffled epochs, a few batches at a time, from the same weights.

    Ours is compiled before the clock starts, as in any epoch but the first one on a machine; the evidence says how long
    that takes, what the ratio is with it in an epoch of its own, and what it is uncompiled.
    """
    digits = load_digits(settings.data_dir)
    compiling = _seconds_to_compile()
    few = QUICK if settings.quick else None
    starts = _starts(epoch, digits, settings.seed, few)
    runs: dict[str, list[Tally]] = {name: [] for name in epoch.builders()}
    for repeat in range(settings.repeats):
        batches = make_batches(digits, settings.seed + repeat, batches=few)
        whole = {name: Tally() for name in runs}
        for place, weights in starts.items():
            length = len(batches) if epoch.pieces is None else PIECE
            piece = batches[place : place + length]
            for name, tally in race(
                epoch.builders(), weights, piece, learning_rate=learning_rate(epoch.epochs), segment=10
            ).items():
                whole[name].add(tally)
        for name, tally in whole.items():
            runs[name].append(tally)
    seconds = {name: [tally.seconds for tally in tallies] for name, tallies in runs.items()}
    ratio = paired_ratio(seconds["ours"], seconds["theirs"])
    share = len(runs["ours"][0].residuals) / (len(digits.train) / BATCH)
    first = paired_ratio([s + share * compiling for s in seconds["ours"]], seconds["theirs"])
    worst = max(max(tally.residuals) for tally in runs["ours"])
    gradients = _gradient_errors(epoch, [*starts.values()], digits, settings)
    return Measurement(
        value=ratio.median,
        low=ratio.low,
        high=ratio.high,
        runs=settings.repeats,
        ours=median(tally.seconds for tally in runs["ours"]),
        theirs=median(tally.seconds for tally in runs["theirs"]),
        verified=worst <= TOLERANCE and (gradients["ours"]["worst"] or 1.0) <= EXACT,
        evidence={
            "tolerance": TOLERANCE,
            "uncompiled_ratio": paired_ratio(seconds["uncompiled"], seconds["theirs"]).median,
            "seconds_to_compile": compiling,
            "first_epoch_ratio": first.median,
            "batches_per_run": len(runs["ours"][0].residuals),
            "worst_residual": {name: max(max(t.residuals) for t in tallies) for name, tallies in runs.items()},
            "batches_above_tolerance": {
                name: sum(residual > TOLERANCE for t in tallies for residual in t.residuals)
                for name, tallies in runs.items()
            },
            "gradient_error": gradients,
            "steps": {name: mean(mean(t.iterations) for t in tallies) for name, tallies in runs.items()},
            "evaluations_forward": mean(mean(tally.forward) for tally in runs["ours"]),
            "evaluations_backward": mean(mean(tally.backward) for tally in runs["ours"]),
            "cpu_ratio": paired_ratio(
                [t.cpu_seconds for t in runs["ours"]], [t.cpu_seconds for t in runs["theirs"]]
            ).median,
            "images": len(digits.train),
        },
    )


def _seconds_to_compile() -> float:
    """How long it takes to compile the loops of our layer on a machine that does not have them yet."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        library(LOOPS, Path(folder))
    return time.perf_counter() - began


def _starts(epoch: Epoch, digits: Digits, seed: int, few: int | None) -> dict[int, Weights]:
    """The weights at each place of the epoch where a piece begins, by the number of its first batch."""
    model = initial_model(seed)
    before = [make_batches(digits, seed + 1000 + i, batches=few) for i in range(epoch.epochs)]
    starts = {0: trained(model, before)}
    batches = make_batches(digits, seed + 999, batches=few)
    places = range(0, len(batches), max(1, len(batches) // (epoch.pieces or 1)))[: epoch.pieces or 1]
    for last, place in pairwise(places):
        starts[place] = trained(model, [batches[last:place]], first=epoch.epochs)
    return starts


def _gradient_errors(
    epoch: Epoch, starts: list[Weights], digits: Digits, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Of both, at the weights where the first piece starts and where the last one ends, if there is a reference."""
    batches = make_batches(digits, settings.seed + 500, batches=QUICK if settings.quick else None)
    last = epoch.builders()["ours"]()
    ends = trained(last, [batches[: None if epoch.pieces is None else PIECE]], starts[-1], first=epoch.epochs)
    found = {}
    for name, build in epoch.builders().items():
        errors = [
            error
            for weights in (starts[0], ends)
            for error in gradient_errors(build, weights, batches[:CHECKED])
            if error is not None
        ]
        found[name] = {
            "batches": len(errors),
            "median": median(errors) if errors else None,
            "worst": max(errors, default=None),
        }
    return found


ROWS = (
    Row(
        "mnist/picard",
        "MNIST epoch, equal tolerance, exact gradient, against the notebook's fixed point",
        0.50,
        partial(measure, Epoch("picard", NotebookFixedPoint)),
    ),
    Row(
        "mnist/picard-trained",
        f"the same after {LATER} epochs of training",
        None,
        partial(measure, Epoch("picard", NotebookFixedPoint, epochs=LATER)),
    ),
    Row(
        "mnist/newton",
        "MNIST epoch of Newton's method, equal tolerance, against the notebook's Newton",
        0.05,
        partial(measure, Epoch("newton", NotebookNewton, pieces=4)),
    ),
)
