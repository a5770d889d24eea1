"""What the examples on sequences, graphs and equations share: options, a clock, a plot, and the record of a result."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import torchimplicit as ti

HERE = Path(__file__).parent


def options(description: str, **extra: Any) -> argparse.Namespace:
    """The command line: `--seeds 0 1 2`, `--threads 1`, and `--NAME` for every further keyword with its default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar; call what it gives once per step, with a text to show beside it."""
    if not sys.stdout.isatty():
        done = 0

        def print_some(text: str) -> None:
            nonlocal done
            done += 1
            if done % max(total // 20, 1) == 0:
                print(f"{what}: {done}/{total} {text}", flush=True)

        yield print_some
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[say]}"),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total, say="")
        yield lambda say: bar.update(task, advance=1, say=say)


class Meter:
    """Counts what solves cost and how many samples converged, from the Solutions it is shown."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.converged = self.samples = 0
        self._pending: ti.Solution | None = None
        self.began = time.perf_counter()

    def see(self, solution: ti.Solution) -> Tensor:
        """Take note of a solve; returns its value."""
        self._settle()
        self.forward.append(solution.evaluations)
        self.converged += int(solution.converged.sum())
        self.samples += solution.converged.numel()
        self._pending = solution
        return solution.value

    def _settle(self) -> None:
        if self._pending is not None and self._pending.adjoint.evaluations is not None:
            self.backward.append(self._pending.adjoint.evaluations)
        self._pending = None

    def figures(self) -> dict[str, float]:
        """Evaluations per batch, converged fraction, seconds since it was made."""
        self._settle()
        return {
            "evaluations_forward": statistics.fmean(self.forward or [0]),
            "evaluations_backward": statistics.fmean(self.backward or [0]),
            "converged_fraction": self.converged / max(self.samples, 1),
            "seconds": time.perf_counter() - self.began,
        }


def parameters(*modules: nn.Module) -> int:
    """How many there are."""
    return sum(p.numel() for module in modules for p in module.parameters())


def record(
    name: str, *, what: str, metric: str, runs: list[dict[str, Any]], literature: str, source: str, note: str = ""
) -> None:
    """Write `results/NAME.json`: every run, mean and standard deviation of each figure, and how they were obtained.

    Runs of other seeds that are there already are kept, if `what` and `note` are the same.

    Args:
        name: of the file.
        what: is measured, in a sentence.
        metric: the figure of the runs that counts.
        runs: one for each seed.
        literature: the figure to compare with.
        source: of that.
        note: what a reader should know.
    """
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.json"
    if file.exists():
        before = json.loads(file.read_text())
        if (before["what"], before["note"]) == (what, note):
            mine = {r["seed"] for r in runs}
            runs = sorted([*runs, *(r for r in before["runs"] if r["seed"] not in mine)], key=lambda r: r["seed"])
    keys = [k for k in runs[0] if k != "seed" and isinstance(runs[0][k], int | float)]
    mean = {k: statistics.fmean(r[k] for r in runs) for k in keys}
    sd = {k: statistics.stdev(r[k] for r in runs) if len(runs) > 1 else None for k in keys}
    result = {
        "name": name,
        "what": what,
        "metric": metric,
        "mean": mean,
        "sd": sd,
        "runs": runs,
        "literature": literature,
        "source": source,
        "note": note,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchimplicit": ti.__version__},
        "threads": torch.get_num_threads(),
        "command": " ".join(["python", f"examples/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    file.write_text(json.dumps(result, indent=2) + "\n")
    spread = "" if sd[metric] is None else f" ± {sd[metric]:.3g}"
    print(f"{what}: {metric} = {mean[metric]:.6g}{spread} over {len(runs)} seed(s); literature: {literature}")


@contextmanager
def figure(name: str, width: float = 7.0, height: float = 3.2, columns: int = 1) -> Iterator[Any]:
    """Axes to draw on, saved as `plots/NAME.png`."""
    made: tuple[Figure, Any] = plt.subplots(1, columns, figsize=(width, height), constrained_layout=True)
    yield made[1]
    folder = HERE / "plots"
    folder.mkdir(exist_ok=True)
    made[0].savefig(folder / f"{name}.png", dpi=110)
    plt.close(made[0])
