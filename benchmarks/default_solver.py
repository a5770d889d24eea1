"""The default solver against each single one, on every map of `benchmarks.maps`: evaluations and time.

One process, one thread, all solvers in turn in every repeat, each at the same tolerance; the residual of what each
returned is recomputed. A ratio is the default's figure over that of the best single solver for the map.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torchimplicit as ti
from benchmarks.maps import Map, maps
from benchmarks.record import RESULTS, circumstances, write

BOUND = 1.25
_ROUNDING = 1.05
"""A residual at 1e-5 in float32 is known to some per cent."""
SINGLE = {
    "picard": ti.Picard,
    "anderson": ti.Anderson,
    "broyden": ti.Broyden,
    "newton": ti.Newton,
    "newton-krylov": ti.NewtonKrylov,
}


def run(problem: Map, solver: ti.solvers.Method, tolerance: float) -> tuple[float, ti.Solution, float]:
    """Solve once: the seconds, the solution, and the worst recomputed residual over its tolerance."""
    began = time.perf_counter()
    solution = ti.fixed_point(
        problem.fn, problem.z0, *problem.args, solver=solver, batch_dims=1, on_failure="ignore", max_steps=2000
    )
    seconds = time.perf_counter() - began
    value = problem.fn(solution.value, *problem.args)
    return seconds, solution, float((_rms(value - solution.value) / (tolerance * _rms(value))).max())


def _rms(t: Tensor) -> Tensor:
    return t.flatten(1).square().mean(dim=1).sqrt()


def measure(problem: Map, tolerance: float, repeats: int) -> dict[str, dict[str, Any]]:
    """Every solver's evaluations and median seconds on one map."""
    solvers = {"auto": ti.Auto(rtol=tolerance), **{n: make(rtol=tolerance) for n, make in SINGLE.items()}}
    if problem.z0[0].numel() > 500:
        del solvers["newton"]  # dense Jacobians of such a batch
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in solvers}
    for turn in range(repeats + 1):
        for name, solver in solvers.items():
            seconds, solution, worst = run(problem, solver, tolerance)
            if turn:
                times[name].append(seconds)
            rows[name] = {
                "evaluations": solution.evaluations,
                "solved": bool(solution.converged.all()) and worst <= _ROUNDING,
                "worst": worst,
            }
    for name, row in rows.items():
        row["seconds"] = median(times[name])
    return rows


def ratio(rows: dict[str, dict[str, Any]], figure: str) -> tuple[float, str]:
    """The default's figure over the best single solver's, and who that is."""
    single = {name: row[figure] for name, row in rows.items() if name != "auto" and row["solved"]}
    best = min(single, key=lambda name: single[name])
    return rows["auto"][figure] / single[best], best


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, write the figures; the status is 1 when the default missed its bound on a map."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.default_solver", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--repeats", type=int, default=7, help="of every solver on every map")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, in float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "default-solver.json", help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=f"the default against the best single solver, relative tolerance {options.tolerance:g}")
    for heading in ("map", "evaluations", "best", "ratio", "ms", "best", "ratio", "solved"):
        table.add_column(heading, justify="left" if heading in ("map", "best") else "right")
    result, good = {}, True
    with torch.no_grad():
        for problem in maps():
            rows = measure(problem, options.tolerance, options.repeats)
            count, fewest = ratio(rows, "evaluations")
            clock, fastest = ratio(rows, "seconds")
            met = rows["auto"]["solved"] and max(count, clock) <= BOUND
            good = good and met
            result[problem.name] = {"rows": rows, "evaluations_ratio": count, "seconds_ratio": clock, "met": met}
            table.add_row(
                problem.name,
                str(rows["auto"]["evaluations"]),
                f"{fewest} {rows[fewest]['evaluations']}",
                f"{count:.2f}",
                f"{1e3 * rows['auto']['seconds']:.2f}",
                f"{fastest} {1e3 * rows[fastest]['seconds']:.2f}",
                f"{clock:.2f}",
                ("yes" if rows["auto"]["solved"] else "NO") + ("" if met else "  ratio over the bound"),
            )
    console.print(table)
    settings = {"repeats": options.repeats, "tolerance": options.tolerance, "bound": BOUND}
    write(options.out, {**circumstances("benchmarks.default_solver", arguments), "settings": settings, "maps": result})
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
