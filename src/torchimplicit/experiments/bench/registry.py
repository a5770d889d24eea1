"""All rows, and how they are chosen by name."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torchimplicit.experiments.bench import (
    rows_accuracy,
    rows_costs,
    rows_jax,
    rows_mnist,
    rows_scaling,
    rows_solvers,
    rows_torchdeq,
    rows_warm,
)
from torchimplicit.experiments.bench.row import Row
from torchimplicit.experiments.errors import ExperimentError

# A file of rows is added here, and in the import above.
ROWS: tuple[Row, ...] = (
    *rows_mnist.ROWS,
    *rows_accuracy.ROWS,
    *rows_torchdeq.ROWS,
    *rows_jax.ROWS,
    *rows_solvers.ROWS,
    *rows_costs.ROWS,
    *rows_warm.ROWS,
    *rows_scaling.ROWS,
)


@dataclass(frozen=True)
class Summary:
    """A claim about several rows together: the median of their values; it is computed, never measured.

    Attributes:
        name: like a row's.
        title: what it is, in words.
        bar: the median must be at most this.
        rows: names of the rows.
    """

    name: str
    title: str
    bar: float
    rows: tuple[str, ...]


SUMMARIES: tuple[Summary, ...] = (
    Summary(
        "torchdeq/median",
        "the median of the rows against TorchDEQ",
        rows_torchdeq.MEDIAN_BAR,
        tuple(row.name for row in rows_torchdeq.ROWS),
    ),
)


def select(patterns: Sequence[str], rows: Sequence[Row] = ROWS) -> tuple[Row, ...]:
    """The rows that some pattern names, in their order; all of them if there are no patterns.

    Args:
        patterns: names, or globs such as "torchdeq/*"; a summary's name stands for its rows.
        rows: to choose from.

    Raises:
        ExperimentError: for a pattern that names nothing, with the nearest names.
    """
    if not patterns:
        return tuple(rows)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {row.name for row in rows if fnmatchcase(row.name, pattern)}
        for summary in SUMMARIES:
            if summary.name == pattern:
                found |= set(summary.rows)
        if not found:
            names = [*(row.name for row in rows), *(summary.name for summary in SUMMARIES)]
            raise ExperimentError(f"ROW: no row is called {pattern!r}{_nearest(pattern, names)}; --list shows them all")
        chosen |= found
    return tuple(row for row in rows if row.name in chosen)


def find(name: str) -> Row:
    """The row of a name."""
    (row,) = (row for row in ROWS if row.name == name)
    return row


def _nearest(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
    return f"; did you mean {', '.join(near)}?" if near else ""
