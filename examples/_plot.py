"""Plots without a display, saved beside the results."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@contextmanager
def figure(out: Path, name: str, width: float = 6.0, height: float = 3.5, columns: int = 1) -> Iterator[Any]:
    """Axes to draw on, several where there are columns; saved as `plots/NAME.png`."""
    made, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    yield axes
    save(made, out, name)


def save(made: Any, out: Path, name: str) -> None:
    """Write a figure as `plots/NAME.png` and close it."""
    path = out / "plots" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120)
    plt.close(made)
