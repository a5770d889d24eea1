"""A million brackets at once: `Chandrupatla` against SciPy's elementwise root finder, same method, same tolerance.

One process, one thread, in turn; SciPy's figures are its own counts. The function is given to us with its inputs as
arguments, as it is to SciPy, so that both may leave out what is done.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import elementwise

import torchimplicit as ti
from benchmarks.record import RESULTS, circumstances, write

BOUND = 1.0
FUNCTIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "cubic": lambda z, a, xp: z**3 + z - a,
    "exponential": lambda z, a, xp: xp.exp(z) - 1 - a,
    "steep": lambda z, a, xp: xp.tanh(50 * (z - a / 8)),
    "wavy": lambda z, a, xp: z + xp.sin(8 * z) / 8 - a / 8,
}


def ours(name: str, a: torch.Tensor, low: torch.Tensor, high: torch.Tensor, tolerance: float) -> ti.Solution:
    """All brackets by `Chandrupatla`."""
    solver = ti.Chandrupatla(low, high, rtol=0.0, atol=tolerance)
    with torch.no_grad():
        return ti.root(
            lambda z, a: FUNCTIONS[name](z, a, torch), low, a, solver=solver, batch_dims=1, on_failure="ignore"
        )


def theirs(name: str, a: np.ndarray, low: np.ndarray, high: np.ndarray, tolerance: float) -> Any:
    """All brackets by SciPy."""
    tolerances = {"fatol": tolerance, "frtol": 0, "xatol": 0, "xrtol": 0}
    return elementwise.find_root(lambda z, a: FUNCTIONS[name](z, a, np), (low, high), args=(a,), tolerances=tolerances)


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, write the figures; the status is 1 when we were slower or counts differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.brackets", description=__doc__, allow_abbrev=False)
    parser.add_argument("--brackets", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=1e-12, help="of |f|")
    parser.add_argument("--out", type=Path, default=RESULTS / "brackets.json", help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    a = random.uniform(0.1, 6.0, options.brackets)
    low, high = random.uniform(-2.0, -0.1, options.brackets), random.uniform(3.0, 5.0, options.brackets)
    inputs, lower, upper = (torch.from_numpy(t) for t in (a, low, high))
    table = Table(title=f"{options.brackets:,} brackets, float64, 1 thread, |f| ≤ {options.tolerance:g}")
    for heading in ("function", "SciPy, s", "ours, s", "ratio (range)", "mean steps", "counts within 1", "solved"):
        table.add_column(heading, justify="right")
    rows, good = {}, True
    for name in FUNCTIONS:
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for turn in range(options.repeats + 1):
            began = time.perf_counter()
            solution = ours(name, inputs, lower, upper, options.tolerance)
            between = time.perf_counter()
            reference = theirs(name, a, low, high, options.tolerance)
            ended = time.perf_counter()
            if turn:
                times["ours"].append(between - began)
                times["theirs"].append(ended - between)
        ratios = [o / t for o, t in zip(times["ours"], times["theirs"], strict=True)]
        close = float(np.mean(np.abs(solution.steps.numpy() - reference.nit) <= 1))
        row = {
            "scipy_seconds": median(times["theirs"]),
            "seconds": median(times["ours"]),
            "ratio": median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "mean_steps": float(solution.steps.double().mean()),
            "counts_within_one": close,
            "converged": float(solution.converged.double().mean()),
        }
        good = good and row["ratio"] <= BOUND and close == 1.0 and row["converged"] == 1.0
        rows[name] = row
        table.add_row(
            name,
            f"{row['scipy_seconds']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
            f"{row['mean_steps']:.1f}",
            f"{100 * close:.2f} %",
            f"{100 * row['converged']:.2f} %",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    settings = {"brackets": options.brackets, "repeats": options.repeats, "tolerance": options.tolerance}
    write(options.out, {**circumstances("benchmarks.brackets", arguments), "settings": settings, "rows": rows})
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
