"""The report's figures, as SVG text whose colours are the page's own, so that they follow its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Stand-ins that matplotlib accepts; `_themed` turns each into a CSS variable of report.css.
INK, FAINT = "#010203", "#010204"
SERIES = tuple(f"#0102{i:02x}" for i in range(0x10, 0x18))
DASHES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
}


@dataclass(frozen=True)
class Series:
    """One line of a figure; `style` picks colour (by `color`) and dashes."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0
    dash: int = 0


def line_figure(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    whole_x: bool = True,
    level: tuple[float, str] | None = None,
) -> str:
    """Lines over a common axis; `level` draws a labelled horizontal line."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for line in series:
            values = [float("nan") if value is None else value for value in line.y]
            axes.plot(
                line.x,
                values,
                DASHES[line.dash % len(DASHES)],
                color=SERIES[line.color % len(SERIES)],
                marker="o" if len(values) <= 50 else None,
                label=line.label,
            )
        if log:
            axes.set_yscale("log")
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if y_label.startswith("%"):  # a share: nothing lies beyond 0 and 100
            axes.set_ylim(max(axes.get_ylim()[0], -2.0), min(axes.get_ylim()[1], 102.0))
        if level is not None:
            axes.axhline(level[0], color=INK, linewidth=1.0, linestyle=":", label=level[1])
        _label(axes, title, x_label, y_label)
        return _svg(figure, f"{title}: {y_label} against {x_label}")


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(fontsize=9)


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _themed(buffer.getvalue(), description)


def _themed(svg: str, description: str) -> str:
    """Cut what only a file of its own needs, let the page scale it, and hand the colours to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
    names = {INK: "--ink", FAINT: "--faint"} | {color: f"--series-{i}" for i, color in enumerate(SERIES)}
    for color, name in names.items():
        svg = svg.replace(color, f"var({name})")
    return svg
