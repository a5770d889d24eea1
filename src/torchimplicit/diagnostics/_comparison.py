"""`Comparison`: what several solvers made of one problem, as rows, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .._options import nearest
from .._problem import Kind
from .._solution import PyTree, Status
from ..solvers import Method
from ._figure import draw
from ._table import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

By = Literal["evaluations", "seconds"]
_BY = ("evaluations", "seconds")


@dataclass(frozen=True)
class Trace:
    """How the residuals of a solve fell; the first entry of each is the start, the others follow a step each.

    Attributes:
        evaluations: calls of fn until then, Jacobian products included.
        median: residual norm, the median over the samples; infinite where it is not finite.
        worst: the largest over the samples.
    """

    evaluations: tuple[int, ...]
    median: tuple[float, ...]
    worst: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class SolverResult:
    """One solver's row. If it raised, `error` says why, numbers are NaN or 0, and the rest is None or empty.

    Attributes:
        name: the label given, or the solver's `repr` without the options that have their default value.
        solver: what ran, with the tolerance it ran under.
        converged: fraction of the samples, in [0, 1], that converged; only such whose recomputed residual agrees.
        solved: how many these are.
        steps: median over the samples.
        max_steps: the largest number of steps of a sample.
        evaluations: calls of fn, Jacobian products included (one call evaluates the whole batch).
        seconds: wall time of a solve, the median of the repeats.
        residual: norm of the residual of the returned value, evaluated anew by the comparison, in the solver's `norm`;
            median over the samples. In units of z (`fixed_point`), of fn (`root`), or of the gradient.
        worst_residual: the largest over the samples; infinite where fn is not finite.
        tolerance: what the residual must not exceed, `atol + rtol·scale`; median over the samples that converged, or
            over all if none did.
        tolerance_range: the smallest and the largest among these samples.
        objective: of `minimize` and `least_squares`, its median over the samples; None of the others.
        failures: how many samples ended how, for those whose status is not `CONVERGED`.
        refuted: samples called converged whose residual, evaluated anew, is well above the tolerance and what the
            solver said: fn is not the same function each time (it has a state, say). They do not count as converged.
        elsewhere: samples that this solver and the first of the rows both solved, with solutions more than 10 % apart.
        value: the solutions, in the structure and shapes of z0; detached.
        status: int tensor over the batch shape, members of `Status`.
        trace: residuals against steps and evaluations.
        error: the error's type and the first line of its message.
    """

    name: str
    solver: Method
    converged: float = 0.0
    solved: int = 0
    steps: float = float("nan")
    max_steps: int = 0
    evaluations: int = 0
    seconds: float = float("nan")
    residual: float = float("nan")
    worst_residual: float = float("nan")
    tolerance: float = float("nan")
    tolerance_range: tuple[float, float] = (float("nan"), float("nan"))
    objective: float | None = None
    failures: Mapping[Status, int] = field(default_factory=dict)
    refuted: int = 0
    elsewhere: int = 0
    value: PyTree = None
    status: Tensor | None = None
    trace: Trace | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """What `compare_solvers` found. `print` shows it as a table, `plot` draws it; `comparison[name]` is one row.

    Attributes:
        kind: of the problem.
        samples: independent problems, B.
        unknowns: real unknowns of each, n.
        dtype: of the state, the widest of its leaves.
        device: of the state.
        repeats: timed runs per solver.
        rows: one `SolverResult` per solver: those that solved most samples first, then by evaluations; errors last.
        skipped: names of the applicable solvers that were not run.
        skipped_because: why.
    """

    kind: Kind
    samples: int
    unknowns: int
    dtype: torch.dtype
    device: torch.device
    repeats: int
    rows: tuple[SolverResult, ...]
    skipped: tuple[str, ...] = ()
    skipped_because: str = ""

    def __getitem__(self, name: str) -> SolverResult:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; {nearest(str(name), [row.name for row in self.rows])}")

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return self.table()

    def ranked(self, by: By = "evaluations") -> tuple[SolverResult, ...]:
        """The rows: those that solved most samples first, then those that cost least; errors last.

        Args:
            by: the cost, `"evaluations"` or `"seconds"`.

        Raises:
            ValueError: for another `by`.
        """
        if by not in _BY:
            raise ValueError(f"by={by!r} is not known; {nearest(str(by), _BY)}")
        return tuple(sorted(self.rows, key=lambda row: (row.error is not None, -row.solved, getattr(row, by))))

    def best(self, by: By = "evaluations") -> SolverResult | None:
        """The solver that solved every sample at least cost; None if there is none.

        Args:
            by: the cost, `"evaluations"` or `"seconds"`.

        Raises:
            ValueError: for another `by`.
        """
        first = self.ranked(by)[0]
        return first if first.error is None and first.solved == self.samples else None

    def table(self, by: By = "evaluations") -> str:
        """The rows as plain text in aligned columns, in the order of `ranked`.

        A star marks the best figure of a column, among the solvers that solved every sample.

        Args:
            by: the cost, `"evaluations"` or `"seconds"`.

        Raises:
            ValueError: for another `by`.
        """
        return table(self, by)

    def plot(
        self,
        path: str | PathLike[str] | None = None,
        ax: Axes | None = None,
        *,
        x: Literal["evaluations", "steps"] = "evaluations",
        sample: Literal["worst", "median"] = "worst",
    ) -> Axes:
        """Draw the residuals of all solvers, on a logarithmic axis; needs matplotlib.

        A line ends in a dot where its solver solved every sample, in a cross where it did not.

        Args:
            path: file to write, PNG or whatever its suffix says; None writes none.
            ax: where to draw; None makes a figure (of pyplot's, if there is no `path`, so that `plt.show()` shows it).
            x: against the evaluations of fn or the steps.
            sample: the largest residual over the samples, or the median.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: for another `x` or `sample`.
        """
        return draw(self, path, ax, x, sample)
