"""The adjoint `Implicit`: what it is asked for, and the linear solve `Aᵀu = v` behind a backward pass."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ._options import Options
from ._solution import Status
from .linear import Cascade, LinearSolution, LinearSolver, ResidualJacobian


@dataclass(frozen=True)
class Implicit(Options):
    """Exact gradients by the implicit function theorem: `Aᵀu = v`, then `uᵀ ∂r/∂θ` (`A = −∂r/∂z` at the solution).

    The tolerance is relative to the incoming gradient `v`, per sample, so that results do not depend on the scale of
    the loss. A sample whose adjoint system cannot be solved contributes exactly zero, and its status says why.

    Args:
        linear_solver: None is `Cascade()`: Neumann series, GMRES, LU, each for the samples that need it.
        rtol: of the adjoint system, `‖v − Aᵀu‖ ≤ rtol·‖v‖`; None is `ε^(2/3)` of the dtype.
        unconverged: gradient of a sample that ran out of steps or stalled: `"linearize"` takes that of the equation
            linearised at its best iterate, `"zero"` none. (A sample that is NONFINITE, DIVERGED or SINGULAR has none.)
    """

    linear_solver: LinearSolver | None = None
    rtol: float | None = None
    unconverged: Literal["linearize", "zero"] = "linearize"

    def __post_init__(self) -> None:
        """Validate."""
        ok = self.linear_solver is None or isinstance(self.linear_solver, LinearSolver)
        self._require(
            "linear_solver", ok, "None or a linear solver such as torchimplicit.LU() or torchimplicit.GMRES()"
        )
        self._require_number("rtol", 0.0, 1.0, inside=True, optional=True)
        self._require_choice("unconverged", ("linearize", "zero"))

    def without_gradient(self, status: Tensor) -> Tensor:
        """Which samples get an exactly zero gradient, `(B,)` bool."""
        dead = status >= int(Status.DIVERGED)
        if self.unconverged == "zero":
            dead = dead | (status != int(Status.CONVERGED))
        return dead

    def solve(self, operator: ResidualJacobian, v: Tensor) -> LinearSolution:
        """`operator u = v` for each sample, `(B, n)`; zero where it could not be solved."""
        rtol = torch.finfo(v.dtype).eps ** (2 / 3) if self.rtol is None else self.rtol
        rtol = max(rtol, 4 * torch.finfo(v.dtype).eps)
        found = (self.linear_solver or Cascade()).solve(operator, v, rtol)
        if found.solved:
            return found
        solved = found.status == int(Status.CONVERGED)
        return replace(found, value=torch.where(solved[:, None], found.value, 0.0))
