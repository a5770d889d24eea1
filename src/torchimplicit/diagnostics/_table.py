"""A comparison as plain text in aligned columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._comparison import By, Comparison, SolverResult

_WIDTH = 118
_RESIDUALS = {
    "fixed_point": "fn(z) - z",
    "root": "fn(z)",
    "minimize": "the gradient",
    "least_squares": "the gradient",
}
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass(frozen=True)
class _Column:
    """A column: what stands over it, its cells, and whose figure is the best (smallest) one."""

    title: str
    cell: Callable[[SolverResult], str]
    figure: Callable[[SolverResult], float] | None = None
    left: bool = False


def table(comparison: Comparison, by: By) -> str:
    """See `Comparison.table`."""
    rows = comparison.ranked(by)
    ran = [row for row in rows if row.error is None]
    complete = [row for row in ran if row.solved == comparison.samples]
    lines = [_heading(comparison)]
    lines += _aligned(_columns(comparison, ran), rows, complete)
    notes = _notes(comparison, ran, complete) + [f"{row.name}: {row.error}" for row in rows if row.error is not None]
    lines += [textwrap.fill(note, _WIDTH, subsequent_indent="  ") for note in notes]
    return "\n".join(lines)


def describe(comparison: Comparison) -> str:
    """The problem in a few words."""
    samples, unknowns = comparison.samples, comparison.unknowns
    return (
        f"{comparison.kind}: {samples} sample{'s' * (samples != 1)} of {unknowns} unknown{'s' * (unknowns != 1)}, "
        f"{str(comparison.dtype).removeprefix('torch.')}, {comparison.device}"
    )


def residual_name(comparison: Comparison) -> str:
    """What the residual is the norm of, and the norm's name where it is one for all."""
    norms = {row.solver.norm if isinstance(row.solver.norm, str) else "norm" for row in comparison.rows}
    return f"{norms.pop() if len(norms) == 1 else 'norm'} of {_RESIDUALS[comparison.kind]}"


def counted(comparison: Comparison) -> str:
    """What the evaluations are of."""
    gradient = " and its gradient" if comparison.kind in ("minimize", "least_squares") else ""
    products = "Hessian" if comparison.kind == "minimize" else "Jacobian"
    return f"of fn{gradient} (whole batch at once; {products} products count as such)"


def duration(seconds: float) -> str:
    """A time in its unit, to three figures."""
    scale, unit = _unit(seconds)
    return f"{seconds / scale:#.3g}".removesuffix(".") + f" {unit}"


def failures(row: SolverResult) -> str:
    """How the samples ended that did not converge."""
    if row.error is not None:
        return "error"
    told = [f"{count} {status.name}" for status, count in row.failures.items()]
    told += [f"{row.refuted} refuted"] if row.refuted else []
    return ", ".join(told)


def _heading(comparison: Comparison) -> str:
    runs = f"{comparison.repeats} runs" if comparison.repeats > 1 else "one run"
    return f"{describe(comparison)}; time: {'median of ' * (comparison.repeats > 1)}{runs} after a warm-up"


def _columns(comparison: Comparison, ran: Sequence[SolverResult]) -> list[_Column]:
    many = comparison.samples > 1
    scale, unit = _unit(min((row.seconds for row in ran), default=1.0))
    shortest = min((row.seconds / scale for row in ran), default=1.0)
    digits = max(0, 2 - math.floor(math.log10(shortest))) if shortest > 0 else 2
    columns = [
        _Column("solver", lambda row: row.name, left=True),
        _Column("solved", lambda row: f"{row.solved}/{comparison.samples}"),
        _Column("steps", lambda row: f"{row.steps:g}", lambda row: row.steps),
    ]
    if many:
        columns.append(_Column("max", lambda row: str(row.max_steps), lambda row: row.max_steps))
    columns += [
        _Column("evaluations", lambda row: str(row.evaluations), lambda row: row.evaluations),
        _Column(f"time [{unit}]", lambda row: f"{row.seconds / scale:.{digits}f}", lambda row: row.seconds),
        _Column("residual", lambda row: f"{row.residual:.1e}"),
    ]
    if many:
        columns.append(_Column("worst", lambda row: f"{row.worst_residual:.1e}"))
    if any(row.objective is not None for row in ran):
        columns.append(_Column("objective", lambda row: "" if row.objective is None else f"{row.objective:.4g}"))
    if any(row.elsewhere for row in ran):
        columns.append(_Column("elsewhere", lambda row: str(row.elsewhere)))
    return columns


def _aligned(columns: list[_Column], rows: Sequence[SolverResult], complete: list[SolverResult]) -> list[str]:
    """Lines of the header and the rows."""
    parts = []
    for column in columns:
        starred = column.figure is not None and bool(complete)
        least = min((column.figure(row) for row in complete), default=0.0) if column.figure else 0.0
        cells = [column.title + " " * starred]
        for row in rows:
            text = column.cell(row) if row.error is None or column.left else "-"
            best = starred and column.figure is not None and row in complete and column.figure(row) == least
            cells.append(text + ("*" if best else " ") * starred)
        width = max(map(len, cells))
        parts.append([cell.ljust(width) if column.left else cell.rjust(width) for cell in cells])
    last = [failures(row) for row in rows]
    parts.append(["failures" if any(last) else "", *last])
    return ["  ".join(cells).rstrip() for cells in zip(*parts, strict=True)]


def _notes(comparison: Comparison, ran: list[SolverResult], complete: list[SolverResult]) -> list[str]:
    notes = []
    if complete:
        few, fast = comparison.best("evaluations"), comparison.best("seconds")
        assert few is not None
        assert fast is not None
        notes.append(
            f"* best among those that solved everything: fewest evaluations {few.name} ({few.evaluations}), "
            f"least time {fast.name} ({duration(fast.seconds)})."
        )
    else:
        notes.append("No solver solved every sample.")
    limits = [limit for row in ran for limit in row.tolerance_range if math.isfinite(limit)]
    tolerance = ""
    if limits:
        low, high = min(limits), max(limits)
        tolerance = f"; tolerance {low:.1e}" + (f" to {high:.1e}" if high > 1.05 * low else "")
    both = "steps and residual: median over the samples, then the largest; " if comparison.samples > 1 else ""
    notes.append(f"{both}residual: {residual_name(comparison)}, evaluated anew{tolerance}.")
    notes.append(f"evaluations: {counted(comparison)}.")
    if any(row.refuted for row in ran):
        notes.append(
            "refuted: called converged, but the residual evaluated anew is larger: does fn return the same value "
            "each time (no state of its own, no random numbers but torch's)?"
        )
    if any(row.elsewhere for row in ran):
        notes.append(
            f"elsewhere: samples with a solution more than 10 % from that of {comparison.rows[0].name}: another one, "
            "or a tolerance too loose to tell."
        )
    if comparison.skipped:
        notes.append(f"skipped: {', '.join(comparison.skipped)}: {comparison.skipped_because}.")
    return notes


def _unit(seconds: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in _UNITS if seconds >= scale), _UNITS[-1])
