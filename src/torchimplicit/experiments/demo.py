"""The notebook's two random-input examples (10 x 50): fixed point and Newton, with Anderson beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.decay import Decay, Solve, layer_solve, residual_decay, start_residual
from torchimplicit.experiments.files import write_atomically
from torchimplicit.experiments.recipe import make_dense_newton
from torchimplicit.experiments.textplot import TextSeries, text_plot

ROWS, FEATURES = 10, 50
FIXED_POINT_TOLERANCE, NEWTON_TOLERANCE = 1e-4, 1e-6


def random_problem(seed: int) -> tuple[nn.Linear, Tensor]:
    """`W` as torch initialises it and standard normal `x` of shape `(10, 50)`, as in the notebook.

    In float64: 500 numbers rounded to float32 alone leave a residual of about 1e-6, Newton's tolerance.
    """
    torch.manual_seed(seed)
    linear = nn.Linear(FEATURES, FEATURES, bias=False)
    return linear.double(), torch.randn(ROWS, FEATURES).double()


def run_demo(seed: int = 0) -> list[tuple[Decay, float]]:
    """Solve `z = tanh(W z + x)` by each solver; returns each decay with the tolerance it was given.

    The fixed-point solvers take the batch as one problem of 500 numbers and stop at its norm, as the notebook
    does; Newton takes each row by itself, since the Jacobian couples no two of them.
    """
    linear, x = random_problem(seed)
    options: Any = {"atol": FIXED_POINT_TOLERANCE, "rtol": 0.0, "norm": "two"}
    cases = [
        ("picard", _whole_batch(linear, x, ti.Picard(**options)), FIXED_POINT_TOLERANCE),
        ("anderson", _whole_batch(linear, x, ti.Anderson(**options)), FIXED_POINT_TOLERANCE),
        ("newton", layer_solve(linear, x, make_dense_newton(NEWTON_TOLERANCE, ROWS)), NEWTON_TOLERANCE),
    ]
    return [(residual_decay(name, solve, start_residual(x)), tolerance) for name, solve, tolerance in cases]


def _whole_batch(linear: nn.Linear, x: Tensor, solver: ti.Picard | ti.Anderson) -> Solve:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(linear(z) + x)

    def solve(limit: int) -> ti.Solution:
        z0 = torch.zeros_like(x)
        return ti.fixed_point(cell, z0, x, solver=solver, max_steps=limit, on_failure="ignore", trace=True)

    return solve


def show(results: list[tuple[Decay, float]], console: Console, png: Path | None) -> None:
    """Print the table, and the residuals as a plot in the terminal or, if `png` is given, into that file."""
    table = Table(title="z = tanh(W z + x) for 10 random inputs of 50 features", title_justify="left")
    table.add_column("solver")
    for name in ("tolerance", "iterations", "evaluations", "final residual", "converged"):
        table.add_column(name, justify="right")
    for decay, tolerance in results:
        table.add_row(
            decay.solver,
            f"{tolerance:.0e}",
            str(decay.iterations),
            str(decay.evaluations[-1]),
            f"{decay.residuals[-1]:.1e}",
            f"{decay.converged:.0%}",
        )
    console.print(table)
    console.print(
        "Tolerance and residual: Frobenius norm of tanh(W z + x) - z over all 10. Evaluations: calls "
        "of the cell, Jacobian products included.",
        style="dim",
    )
    if png is None:
        lines = [TextSeries(decay.solver, decay.steps, decay.residuals) for decay, _ in results]
        console.print()
        console.print(text_plot(lines, "iterations, residual upwards"), soft_wrap=True)
    else:
        write_png(results, png)
        console.print(f"plot: {png}", soft_wrap=True, highlight=False)


def write_png(results: list[tuple[Decay, float]], path: Path) -> None:
    """Draw the residuals against the iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for decay, _ in results:
        axes.semilogy(decay.steps, decay.residuals, marker="o", label=decay.solver)
    axes.set_xlabel("iterations")
    axes.set_ylabel("residual (Frobenius norm)")
    axes.set_title("z = tanh(W z + x), 10 random inputs of 50 features")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))
