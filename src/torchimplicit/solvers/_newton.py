"""Newton's method with a per-sample line search; dense LU or any linear solver for its steps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._norms import two
from .._problem import Evaluation, Problem
from .._solution import Status
from ..linear import LU, LinearSolver
from ._base import Solver, Step, hold

_ARMIJO = 1e-4
_ETA_MAX, _GAMMA = 0.5, 0.9


@dataclass
class _Progress:
    """What the forcing term needs: the last residual norms and the last forcing terms, `(B,)` each."""

    norm: Tensor
    eta: Tensor


@dataclass(frozen=True)
class Newton(Solver[_Progress]):
    """`z ← z + t A⁻¹ r` with `A = −∂r/∂z`, and `t` from a backtracking line search, for each sample.

    `A` is formed by automatic differentiation (n reverse products at once) or in the closed form that fn supplies,
    and factorised by LAPACK: O(n³) time and O(n²) memory per sample. A sample whose matrix is singular is SINGULAR
    and disturbs nobody. With a `GMRES` in `linear_solver` the steps need only products with `A` and are solved to the
    forcing term of Eisenstat & Walker (1996), choice 2 with its safeguard.

    Step control: `t` is halved from 1 until `‖r(z + tδ)‖ ≤ (1 − 10⁻⁴ t)‖r(z)‖` (Dennis & Schnabel 1983, §6.3); a sample
    that finds no such t is STALLED where it is.

    Args:
        linear_solver: None is `LU()`.
        max_backtracks: halvings tried; 0 takes full steps always (plain Newton, which may wander uphill).
        forcing: relative tolerance of the linear solves in (0, 1); None is Eisenstat–Walker. LU ignores it.
    """

    linear_solver: LinearSolver | None = None
    max_backtracks: int = 12
    forcing: float | None = None

    max_steps: ClassVar[int] = 100
    patience: ClassVar[int] = 30

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        ok = self.linear_solver is None or isinstance(self.linear_solver, LinearSolver)
        self._require("linear_solver", ok, "None or a linear solver such as torchimplicit.LU() or torchimplicit.GMRES()")
        self._require_count("max_backtracks", 0)
        self._require_number("forcing", 0.0, 1.0, open_low=True, optional=True)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Progress:
        """Forcing starts at 0.1."""
        norm = two(evaluation.residual)
        return _Progress(norm, torch.full_like(norm, 0.1))

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Progress, active: Tensor | None
    ) -> Step[_Progress]:
        """One linear solve and the line search along its direction."""
        eta = state.eta if self.forcing is None else self.forcing
        operator = problem.linearize(z, evaluation.value)
        # A resting sample's right-hand side is zero, which costs the linear solver nothing.
        residual = hold(active, evaluation.residual, torch.zeros_like(z))
        solved = (self.linear_solver or LU()).solve(operator, residual, eta, verify=False)
        running = active if active is not None else torch.ones_like(solved.status, dtype=torch.bool)
        singular = running & (solved.status >= int(Status.DIVERGED))
        new, found, stuck = self._search(problem, z, evaluation, solved.value, running & ~singular)
        failure = torch.where(singular, int(Status.SINGULAR), torch.where(stuck, int(Status.STALLED), -1))
        norm = two(found.residual)
        return Step(new, found, _Progress(norm, _forcing(norm, state)), failure)

    def _search(
        self, problem: Problem, z: Tensor, start: Evaluation, direction: Tensor, moving: Tensor
    ) -> tuple[Tensor, Evaluation, Tensor]:
        """Backtrack the moving samples along their directions; returns the point, fn there, and who found none."""
        merit = two(start.residual)
        length = moving.to(z.dtype)
        new = hold(moving, z + direction, z)
        found = problem.evaluate(new)
        for _ in range(self.max_backtracks):
            worse = moving & ~(two(found.residual) <= (1 - _ARMIJO * length) * merit)
            if not bool(worse.any()):
                break
            length = torch.where(worse, 0.5 * length, length)
            new = hold(worse, torch.addcmul(z, length[:, None], direction), new)
            found = problem.evaluate(new)
        norm = two(found.residual)
        good = norm <= (1 - _ARMIJO * length) * merit if self.max_backtracks else norm.isfinite()
        stuck = moving & ~good
        if bool(stuck.any()):
            new = hold(stuck, z, new)
            found = Evaluation(
                hold(stuck, start.value, found.value), residual=hold(stuck, start.residual, found.residual)
            )
        return new, found, stuck


def _forcing(norm: Tensor, state: _Progress) -> Tensor:
    """Eisenstat & Walker (1996), choice 2: `η = γ (‖r‖/‖r_prev‖)²`, not below `γ η_prev²` while that is above 0.1."""
    ratio = norm / torch.where(state.norm > 0, state.norm, 1.0)
    eta = _GAMMA * ratio * ratio
    memory = _GAMMA * state.eta * state.eta
    eta = torch.where(memory > 0.1, torch.maximum(eta, memory), eta)
    return torch.where(eta.isfinite(), eta, _ETA_MAX).clamp(1e-4, _ETA_MAX)
