"""What the examples on images share: digits by the batch, distortions, a progress bar, a result file, a plot."""

import json
import math
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

import torchimplicit as ti
from torchimplicit.experiments.data import Split

HERE = Path(__file__).parent


def batches(split: Split, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images `(B, 1, 28, 28)` in [0, 1] and labels `(B,)`; with a generator in random order, the odd rest left out."""
    if generator is None:
        order = torch.arange(len(split))
    else:
        order = torch.randperm(len(split), generator=generator)[: len(split) // size * size]
    for rows in order.split(size):
        images, labels = split.batch(rows)
        yield images[:, None], labels


def distort(
    images: Tensor, generator: torch.Generator, turn: float = 0.15, grow: float = 0.1, move: float = 2.0
) -> Tensor:
    """Each image turned (radians), scaled and moved (pixels) at random, up to so much."""
    batch, size = images.shape[0], images.shape[-1]
    draw = 2 * torch.rand(batch, 4, generator=generator) - 1
    angle, scale = turn * draw[:, 0], 1 + grow * draw[:, 1]
    cosine, sine, shift = scale * angle.cos(), scale * angle.sin(), 2 * move / size * draw[:, 2:]
    rows = [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def progress() -> Progress:
    """A bar with a count, the remaining time, and room for figures."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )


@dataclass
class Row:
    """A line of the table of results: one model, several seeds.

    `values` are the measured figures, one a seed; `literature` is the figure that they stand beside, with its source.
    """

    model: str
    metric: str
    parameters: int
    literature: str = ""
    values: list[float] = field(default_factory=list)
    more: dict[str, list[float]] = field(default_factory=dict)

    def add(self, value: float, **more: float) -> None:
        """The figures of one seed."""
        self.values.append(round(value, 6))
        for name, figure in more.items():
            self.more.setdefault(name, []).append(float(f"{figure:.6g}"))

    def __str__(self) -> str:
        sd = f" ± {stdev(self.values):.2f}" if len(self.values) > 1 else ""
        return f"{self.model}: {self.metric} {fmean(self.values):.2f}{sd}, {self.parameters:,} parameters"


def save_result(name: str, title: str, seeds: list[int], rows: list[Row], notes: list[str], **more: Any) -> Path:
    """Write `results/NAME.json`: the rows with mean and standard deviation, the date, the versions, the command."""
    table = []
    for row in rows:
        line = asdict(row)
        figures = {row.metric: line.pop("values")} | line.pop("more")
        line["figures"] = {
            key: {"mean": round(fmean(v), 6), "sd": round(stdev(v), 6) if len(v) > 1 else None, "values": v}
            for key, v in figures.items()
        }
        table.append(line)
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    arguments = " ".join(argument for argument in sys.argv[1:])
    content = {
        "name": name,
        "title": title,
        "date": date.today().isoformat(),
        "command": f"python -m examples.{Path(sys.argv[0]).stem} {arguments}".strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchimplicit": ti.__version__},
        "threads": torch.get_num_threads(),
        "seeds": seeds,
        "rows": table,
        "notes": notes,
    }
    path.write_text(json.dumps(content | more, indent=1, ensure_ascii=False) + "\n")
    return path


def peak_megabytes() -> float:
    """The most memory that the process has held, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def figure_path(name: str) -> Path:
    """`plots/NAME.png`."""
    path = HERE / "plots" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    return path


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image of values in [0, 1], in decibels, `(B,)`."""
    return -10 / math.log(10) * (image - truth).square().flatten(1).mean(1).log()


def pin_threads() -> None:
    """As many threads as OMP_NUM_THREADS says, one without it: small models gain nothing from more."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
