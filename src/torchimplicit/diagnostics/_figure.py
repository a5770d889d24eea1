"""A comparison as a figure: residuals against what they cost. The only file here that imports matplotlib."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING, Any

from .._options import nearest
from ._table import counted, describe, residual_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ._comparison import Comparison, SolverResult

_X = ("evaluations", "steps")
_SAMPLES = {"worst": "largest over the samples", "median": "median over the samples"}
_UNITS = {
    "fixed_point": "units of z",
    "root": "units of fn",
    "minimize": "units of fn / units of z",
    "least_squares": "units of fn² / units of z",
}
# Okabe & Ito (2008): told apart with any colour vision; the dashes tell apart what 7 colours do not, and print in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_END: dict[bool, dict[str, Any]] = {
    True: {"marker": "o", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.8, "linestyle": "none"},
    False: {"marker": "X", "markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.8, "linestyle": "none"},
}
_MANY = 200
"""Points from which on a line is thin."""
_ABOVE, _BELOW = 1e4, 1e-3
"""How far beyond the start and below the tolerance the axis goes."""
_WIDE = 6.0
"""Ratio of the dearest to the cheapest solve from which on costs are drawn on a logarithmic axis."""


def draw(comparison: Comparison, path: str | PathLike[str] | None, ax: Axes | None, x: str, sample: str) -> Axes:
    """See `Comparison.plot`."""
    for name, value, known in (("x", x, _X), ("sample", sample, _SAMPLES)):
        if value not in known:
            raise ValueError(f"plot: {name}={value!r} is not known; {nearest(str(value), known)}")
    axes = _axes(path) if ax is None else ax
    rows = [row for row in comparison.rows if row.trace is not None]
    curves = [_curve(row, x, sample) for row in rows]
    bottom, top = _range(rows, curves)
    ends = set()
    for i, (row, (along, up)) in enumerate(zip(rows, curves, strict=True)):
        done = row.solved == comparison.samples
        ends.add(done)
        style: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "zorder": 3 + i / len(rows)}
        up = [min(max(value, bottom), 1e3 * top) for value in up]
        label = row.name if done else f"{row.name}: {row.solved} of {comparison.samples} solved"
        width = 1.8 if len(up) <= _MANY else 1.0
        axes.plot(along, up, linestyle=_DASHES[i % len(_DASHES)], linewidth=width, label=label, **style)
        axes.plot(along[-1:], [min(up[-1], top)], clip_on=False, **_END[done], **style)
    _tolerance(axes, rows, comparison.samples)
    for done in sorted(ends, reverse=True):
        told = "solved every sample" if done else "did not solve every sample"
        axes.plot([], [], color="0.35", label=told, **_END[done])
    _scales(axes, x, [along[-1] for along, _ in curves], (bottom, top))
    axes.set_xlabel(f"evaluations {counted(comparison)}" if x == "evaluations" else "steps")
    newline, which = ("\n", f"{_SAMPLES[sample]} ") if comparison.samples > 1 else (" ", "")
    units = _UNITS[comparison.kind]
    axes.set_ylabel(f"residual: {residual_name(comparison)}{newline}{which}[{units}]")
    axes.set_title(describe(comparison), loc="left", fontsize="medium", fontweight="bold", pad=12)
    axes.grid(True, which="major", color="0.88", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if rows:
        beside: Any = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0}
        axes.legend(frameon=False, fontsize=9, handlelength=3.2, **beside)
    if path is not None:
        axes.figure.canvas.figure.savefig(path, dpi=160, bbox_inches="tight")
    return axes


def _axes(path: str | PathLike[str] | None) -> Axes:
    """New axes: of pyplot's, for it to show, or of a figure of its own that leaves nothing open."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Comparison.plot needs matplotlib, which is not installed: pip install matplotlib, or "
            "pip install 'torchimplicit[train]', which brings it."
        ) from error
    if path is None:
        from matplotlib import pyplot

        return pyplot.figure(figsize=(9.6, 4.8), layout="constrained").add_subplot()
    return Figure(figsize=(9.6, 4.8), layout="constrained").add_subplot()


def _curve(row: SolverResult, x: str, sample: str) -> tuple[list[int], list[float]]:
    assert row.trace is not None
    up = list(row.trace.worst if sample == "worst" else row.trace.median)
    return list(range(len(up))) if x == "steps" else list(row.trace.evaluations), up


def _range(rows: list[SolverResult], curves: list[tuple[list[int], list[float]]]) -> tuple[float, float]:
    """From below the tolerance and whatever was reached, within reason, to above the starts."""
    limits = [row.tolerance_range[0] for row in rows if 0 < row.tolerance_range[0] < math.inf]
    seen = [value for _, up in curves for value in up if 0 < value < math.inf]
    starts = [up[0] for _, up in curves if 0 < up[0] < math.inf]
    if not seen:
        return 1e-16, 1.0
    least = min(limits, default=min(seen))
    bottom = max(min([*seen, least]), _BELOW * least) / 3
    return bottom, 3 * max(min(max(seen), _ABOVE * max(starts, default=max(seen))), 10 * bottom)


def _tolerance(axes: Axes, rows: list[SolverResult], samples: int) -> None:
    """A line for each tolerance that was asked for, and a band where it came to different limits for the samples."""
    groups: dict[Any, list[SolverResult]] = {}
    for row in rows:
        groups.setdefault((row.solver.rtol, row.solver.atol, row.solver.norm), []).append(row)
    label = "tolerance" + " (band: of all samples)" * (samples > 1)
    for members in groups.values():
        line = members[0].tolerance
        if 0 < line < math.inf:
            axes.axhline(line, color="0.45", linewidth=1.0, linestyle=(0, (1, 2.5)), label=label, zorder=2)
            low, high = zip(*(row.tolerance_range for row in members), strict=True)
            axes.axhspan(min(low), max(high), color="0.5", alpha=0.12, linewidth=0, zorder=1)
            label = None


def _scales(axes: Axes, x: str, ends: list[int], limits: tuple[float, float]) -> None:
    """Residuals on a logarithmic axis, and costs too where they differ much; these as plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(*limits)
    if ends and max(ends) > _WIDE * max(min(ends), 1):
        axes.set_xscale("log") if x == "evaluations" else axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(left=0 if x == "steps" or axes.get_xscale() == "linear" else 1)
