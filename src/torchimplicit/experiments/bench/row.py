"""What a benchmark row is: a name, a bar, and a function that measures; the measurement is plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Of one run of the benchmarks.

    Attributes:
        repeats: interleaved runs per contender.
        quick: whether a row may leave out what takes long and is not needed for its value.
        seed: of the weights and inputs.
        data_dir: a folder with the IDX files of MNIST, for the rows that need them.
    """

    repeats: int = 7
    quick: bool = False
    seed: int = 0
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        """Validate."""
        if self.repeats < 1:
            raise ValueError(f"repeats: must be at least 1, not {self.repeats}")


@dataclass(frozen=True)
class Measurement:
    """What a row found.

    Attributes:
        value: the median over the runs: a ratio ours/theirs unless the row's unit says otherwise.
        low: the smallest of the runs.
        high: the largest of the runs.
        runs: how many there were.
        ours: median seconds, or of the unit; None where there is nothing to say.
        theirs: the same of the peer.
        verified: whether the benchmark itself found what it compares to be equal: residual, gradient error, accuracy.
        evidence: what else a reader wants to see, fit for JSON: residuals, gradient errors, steps, settings found.
    """

    value: float
    low: float
    high: float
    runs: int
    ours: float | None
    theirs: float | None
    verified: bool
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A claim and how it is measured.

    Attributes:
        name: a path, such as "torchdeq/broyden/tanh-100/0.95"; rows are selected by it.
        title: what is measured, in words.
        bar: the value must be at most this; None for a row that only reports.
        measure: takes the measurement, in a process of its own that has one thread.
        unit: of the value; "ratio" is ours over theirs.
        needs: importable names of the packages that it needs beside our own.
    """

    name: str
    title: str
    bar: float | None
    measure: Callable[[Settings], Measurement]
    unit: str = "ratio"
    needs: tuple[str, ...] = ()
