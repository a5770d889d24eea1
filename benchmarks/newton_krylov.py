"""Newton's method dense and by Krylov methods on `z = tanh(W z + x)`, n = 2000, 100 samples: time and peak memory.

Each solver runs in a process of its own, whose peak of resident memory over what it was before the solve is what the
solve took. The residual is recomputed in float64.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import torchimplicit as ti
from benchmarks.record import RESULTS, circumstances, write

SOLVERS = {"newton": ti.Newton, "newton-krylov": ti.NewtonKrylov}
BOUNDS = {"seconds": 1 / 50, "megabytes": 1 / 20}


def solve(name: str, n: int, batch: int, contraction: float, tolerance: float) -> dict[str, Any]:
    """Solve once in this process; the figures."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(n, n)
    weight *= contraction / torch.linalg.matrix_norm(weight, 2)
    x = torch.randn(batch, n)

    def fn(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ weight.T + x)

    solver = SOLVERS[name](rtol=tolerance, atol=0.0)
    start = torch.zeros_like(x)
    with torch.no_grad():
        # A first small solve loads what is loaded on first use.
        ti.fixed_point(lambda z: torch.cos(z), torch.zeros(2, 3), batch_dims=1, solver=solver)
        before, began = peak(), time.perf_counter()
        solution = ti.fixed_point(fn, start, x, batch_dims=1, solver=solver)
        seconds, after = time.perf_counter() - began, peak()
        z = solution.value.double()
        residual = torch.tanh(z @ weight.double().T + x.double()) - z
    return {
        "solver": name,
        "seconds": seconds,
        "megabytes": after - before,
        "converged": float(solution.converged.float().mean()),
        "steps": int(solution.steps.max()),
        "worst_residual": float(residual.square().mean(dim=1).sqrt().max()),
    }


def peak() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: Sequence[str]) -> int:
    """Measure both, print the table, write the figures; the status is 1 when a bound was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.newton_krylov", description=__doc__, allow_abbrev=False)
    parser.add_argument("--n", type=int, default=2000, help="unknowns of a sample")
    parser.add_argument("--batch", type=int, default=100, help="samples")
    parser.add_argument("--contraction", type=float, default=0.9, help="spectral norm of W")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the residual, relative")
    parser.add_argument("--only", choices=sorted(SOLVERS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "newton-krylov.json", help="where the figures go")
    options = parser.parse_args(arguments)
    if options.only:
        print(json.dumps(solve(options.only, options.n, options.batch, options.contraction, options.tolerance)))
        return 0
    console, rows = Console(), []
    for name in SOLVERS:
        console.print(f"{name} …")
        command = [sys.executable, "-m", "benchmarks.newton_krylov", "--only", name]
        for option in ("n", "batch", "contraction", "tolerance"):
            command += [f"--{option}", str(getattr(options, option))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    dense, krylov = rows
    ratios = {figure: krylov[figure] / dense[figure] for figure in BOUNDS}
    table = Table(title=f"n = {options.n}, {options.batch} samples, float32, 1 thread")
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    for figure, bound in BOUNDS.items():
        verdict = "met" if ratios[figure] <= bound else "NOT MET"
        console.print(f"{figure}: 1/{1 / ratios[figure]:.0f}, bar 1/{1 / bound:.0f}: {verdict}")
    settings = {k: v for k, v in vars(options).items() if k not in ("only", "out")}
    write(options.out, {**circumstances("benchmarks.newton_krylov", arguments), "settings": settings, "rows": rows})
    return int(any(ratios[figure] > bound for figure, bound in BOUNDS.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
