"""How the residual of one batch falls, against the number of times the cell was evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.recipe import RecipeSolver

POINTS = 40


@dataclass(frozen=True)
class Decay:
    """One solver's way from `z = 0` to the tolerance; `residuals[0]` belongs to the start.

    `residuals` are Frobenius norms of `f(z) - z` over the batch; `evaluations[i]` counts the calls of the
    cell, Jacobian products included, that a solve which ends there makes in total.
    """

    solver: str
    steps: list[int]
    evaluations: list[int]
    residuals: list[float]
    iterations: int  # of the sample that takes longest
    converged: float  # fraction of the samples

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


Solve = Callable[[int], ti.Solution]
"""Solve with a limit on the steps, from `z = 0`, with the trace; residuals in the two-norm."""


@torch.no_grad()
def residual_decay(name: str, solve: Solve, start: float, max_steps: int = 200) -> Decay:
    """Follow one solve; `start` is the residual at `z = 0`.

    The residuals are the solver's trace. What each of them cost is measured, not modelled: by solves that are
    ended there (at most `POINTS` of them, spread over the steps).
    """
    full = solve(max_steps)
    assert full.trace is not None
    iterations = int(full.steps.max())
    steps, evaluations, residuals = [0], [1], [start]
    for step in torch.linspace(1, iterations, min(POINTS, iterations)).round().int().unique().tolist():
        steps.append(step)
        evaluations.append(solve(step).evaluations)
        residuals.append(float(torch.linalg.vector_norm(full.trace[step - 1])))
    return Decay(name, steps, evaluations, residuals, iterations, float(full.converged.float().mean()))


def layer_solve(linear: nn.Linear, x: Tensor, solver: RecipeSolver) -> Solve:
    """Solve `z = tanh(W z + x)`, `W` in `linear`, for each row of `x` (shape `(B, features)`) by itself."""

    def solve(limit: int) -> ti.Solution:
        layer = ti.nn.TanhEquilibrium(x.shape[-1], solver=solver, max_steps=limit, on_failure="ignore")
        layer.cell.linear = linear
        return layer.solve(x, trace=True)

    return solve


def start_residual(x: Tensor) -> float:
    """The residual at `z = 0`, where `f(z) - z = tanh(x)`."""
    return float(torch.linalg.vector_norm(torch.tanh(x)))
