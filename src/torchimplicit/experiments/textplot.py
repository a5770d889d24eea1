"""Lines on a logarithmic axis, drawn in the terminal with braille dots and a marker at each point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

MARKERS = ("●", "▲", "■", "◆")
COLORS = ("blue", "dark_orange", "green", "magenta")
# The dot at (row, column) of a braille cell of 4 x 2, as a bit of its code point.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass(frozen=True)
class TextSeries:
    """A line: `y` must be above 0."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def text_plot(series: Sequence[TextSeries], x_label: str, width: int = 64, height: int = 16) -> Text:
    """Draw `series` in about `height` rows of `width` characters, a whole number of rows per power of ten."""
    logs = [[math.log10(value) for value in line.y] for line in series]
    low = math.floor(min(min(values) for values in logs))
    high = max(math.ceil(max(max(values) for values in logs)), low + 1)
    decade = max(round(height / (high - low)), 1)
    height = decade * (high - low) + 1
    right = max(max(line.x) for line in series) or 1.0
    cells: dict[tuple[int, int], tuple[int, int]] = {}  # (row, column) -> braille bits, series
    marks: dict[tuple[int, int], int] = {}

    def place(x: float, y: float) -> tuple[float, float]:
        """In dots, from the top left."""
        return x / right * (2 * width - 1), 4 * decade * (high - y) + 1

    for i, (line, values) in enumerate(zip(series, logs, strict=True)):
        points = [place(x, y) for x, y in zip(line.x, values, strict=True)]
        for (x0, y0), (x1, y1) in pairwise(points):
            length = max(round(max(abs(x1 - x0), abs(y1 - y0))), 1)
            for k in range(length + 1):
                x, y = round(x0 + (x1 - x0) * k / length), round(y0 + (y1 - y0) * k / length)
                bits, _ = cells.get((y // 4, x // 2), (0, i))
                cells[y // 4, x // 2] = (bits | DOTS[y % 4][x % 2], i)
        for x, y in points:
            marks[round(y) // 4, round(x) // 2] = i

    ticks = {decade * (high - power): power for power in range(low, high + 1)}
    text = Text(no_wrap=True)
    for row in range(height):
        text.append(f"{f'1e{ticks[row]:+d}' if row in ticks else '':>6} ", style="dim")
        text.append("┤" if row in ticks else "│", style="dim")
        for column in range(width):
            if (row, column) in marks:
                i = marks[row, column]
                text.append(MARKERS[i % len(MARKERS)], style=COLORS[i % len(COLORS)])
            else:
                bits, i = cells.get((row, column), (0, 0))
                text.append(chr(0x2800 + bits) if bits else " ", style=COLORS[i % len(COLORS)])
        text.append("\n")
    text.append(f"{'':>7}└{'─' * width}\n", style="dim")
    text.append(f"{'':>8}0{x_label:^{width - 1 - len(f'{right:g}')}}{right:g}\n", style="dim")
    text.append(" " * 8)
    for i, line in enumerate(series):
        text.append(f"{MARKERS[i % len(MARKERS)]} {line.label}   ", style=COLORS[i % len(COLORS)])
    return text
