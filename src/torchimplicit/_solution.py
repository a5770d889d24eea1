"""What a solve returns: `Solution`, the `Status` of each sample, the backward pass's report, and the error."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

PyTree = Any
"""A tensor, or a nested tuple, list or dict of tensors."""


class Status(IntEnum):
    """How the solve of one sample ended; `advice` says what to try next."""

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    DIVERGED = 3
    NONFINITE = 4
    SINGULAR = 5

    @property
    def advice(self) -> str:
        """One sentence: what happened, and what to try next."""
        return _ADVICE[self]

    @property
    def has_gradient(self) -> bool:
        """Whether a sample that ended so still has a usable linearisation (DESIGN: its gradient is not zeroed)."""
        return self in (Status.CONVERGED, Status.MAX_STEPS, Status.STALLED)


_ADVICE = {
    Status.CONVERGED: "The residual of the returned value is within the tolerance.",
    Status.MAX_STEPS: "The steps ran out while the residual was still falling: raise max_steps, loosen rtol, or "
    "use a faster solver (Anderson for a slow contraction, Newton near a solution).",
    Status.STALLED: "The residual stopped falling above the tolerance: there may be no solution nearby; try another "
    "start or solver, float64, or a looser rtol.",
    Status.DIVERGED: "The residual grew without bound: the map is no contraction here; use Newton or Anderson, "
    "damping < 1, a better start, or smaller weights.",
    Status.NONFINITE: "The function returned NaN or infinity: check the inputs of this sample and the function's "
    "domain at the start z0.",
    Status.SINGULAR: "The Jacobian is singular: the solution is not isolated or does not depend smoothly on the "
    "inputs; try another start or reformulate.",
}

WITHOUT_GRADIENT = tuple(int(s) for s in Status if not s.has_gradient)
"""Statuses whose samples get an exactly zero gradient."""


@dataclass
class AdjointReport:
    """What the backward pass found; every field is None until it has run (and is of its latest run after that).

    Attributes:
        status: int tensor over the batch shape, members of `Status`.
        residual: relative residual of the adjoint system, `‖v − Aᵀu‖ / ‖v‖`, over the batch shape.
        steps: steps of the linear solver, over the batch shape.
        evaluations: vector-Jacobian products taken.
    """

    status: Tensor | None = None
    residual: Tensor | None = None
    steps: Tensor | None = None
    evaluations: int | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of `fixed_point` or `root`. Per-sample fields have the batch shape, `z.shape[:batch_dims]`.

    Attributes:
        value: the solution, in the structure, shapes and dtypes of `z0`; differentiable. Always finite.
        status: int tensor, members of `Status`.
        converged: bool tensor, `status == Status.CONVERGED`.
        residual: norm of the residual *of the returned value, re-evaluated*; infinity where the function is not
            finite. In the solver's `norm`, in units of z (`fixed_point`) or of fn (`root`).
        steps: int tensor, updates applied to each sample.
        evaluations: calls of fn, Jacobian products included (one call evaluates the whole batch); −1 where they are not
            counted, in a compiled or exported graph.
        trace: residual norms after each step, `(steps, *batch)`, or None unless `trace=True`.
        adjoint: an `AdjointReport` that the backward pass fills.
    """

    value: PyTree
    status: Tensor
    converged: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: int
    trace: Tensor | None = None
    adjoint: AdjointReport = field(default_factory=AdjointReport)


class ConvergenceWarning(UserWarning):
    """Some samples of a solve, forward or adjoint, did not converge."""


class ConvergenceError(RuntimeError):
    """Some samples did not converge and `on_failure="raise"` was asked for.

    Attributes:
        solution: the `Solution`, with every sample's status and best iterate. None when raised by a backward pass,
            whose report is in the `adjoint` field of the forward pass's Solution.
    """

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        super().__init__(message)
        self.solution = solution


def describe_failures(what: str, status: Tensor, others: Sequence[str] = ()) -> str:
    """A message such as "fixed_point: 2 of 5 samples did not converge: 1 STALLED, …" with the advice per status."""
    counts = torch.bincount(status.reshape(-1).long().cpu(), minlength=len(Status)).tolist()
    bad = [(s, counts[s]) for s in Status if s is not Status.CONVERGED and counts[s]]
    lines = [
        f"{what}: {sum(n for _, n in bad)} of {status.numel()} samples did not converge: "
        + ", ".join(f"{n} {s.name}" for s, n in bad)
        + "."
    ]
    lines += [f"  {s.name}: {s.advice}" for s, _ in bad]
    lines += [f"  {line}" for line in others]
    return "\n".join(lines)
