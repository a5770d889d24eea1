"""Newton's method with a per-sample line search; dense LU or any linear solver for its steps."""

from dataclasses import dataclass, replace
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
_LONGEST_WAIT = 16


@dataclass
class _Progress:
    """What the next step needs to know of each sample, `(B,)` each.

    Attributes:
        norm: the residual's norm.
        eta: the last forcing term.
        wait: plain steps to take before the next Newton step; None where there can be none.
        pause: length of the next wait.
        nobody: zeros.
        warmup: plain steps that every sample takes first.
    """

    norm: Tensor
    eta: Tensor
    wait: Tensor | None
    pause: Tensor
    nobody: Tensor
    warmup: int


@dataclass(frozen=True)
class Newton(Solver[_Progress]):
    """`z ← z + t A⁻¹ r` with `A = −∂r/∂z`, with step control for each sample.

    `A` is formed by automatic differentiation (n reverse products at once) or in the closed form that fn supplies,
    and factorised by LAPACK: O(n³) time and O(n²) memory per sample. A sample whose matrix is singular is SINGULAR
    and disturbs nobody. With a `GMRES` or `Cascade` in `linear_solver` the steps need only products with `A` and are
    solved to the forcing term of Eisenstat & Walker (1996), choice 2 with its safeguard.

    Step control: a step must fall to `‖r(z + tδ)‖ ≤ (1 − 10⁻⁴ t)‖r(z)‖`, with t halved from 1 (Dennis & Schnabel 1983,
    §6.3). A *fixed point* has another way out, tried before the halving: the plain step `z + r`. A sample that had to
    take it takes 1, 2, 4, … more of them before it pays for another Newton step: far from the solution of a
    contraction plain steps are the better ones, and the cheaper. A sample of a root that finds no t is STALLED.

    Args:
        linear_solver: None is `LU()`.
        max_backtracks: halvings tried; 0 takes full steps always (plain Newton, which may wander uphill).
        forcing: relative tolerance of the linear solves in (0, 1); None is Eisenstat–Walker. Looser near the solution,
            where less will do. LU ignores it.
        warmup: plain steps of a fixed point before the first Newton step, for maps that contract.
    """

    linear_solver: LinearSolver | None = None
    max_backtracks: int = 12
    forcing: float | None = None
    warmup: int = 0

    max_steps: ClassVar[int] = 100
    patience: ClassVar[int] = 30

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        ok = self.linear_solver is None or isinstance(self.linear_solver, LinearSolver)
        self._require(
            "linear_solver", ok, "None or a linear solver such as torchimplicit.LU() or torchimplicit.GMRES()"
        )
        self._require_count("max_backtracks", 0)
        self._require_number("forcing", 0.0, 1.0, inside=True, optional=True)
        self._require_count("warmup", 0)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Progress:
        """Forcing starts at 0.1; nobody waits."""
        norm = two(evaluation.residual)
        nobody = torch.zeros_like(norm, dtype=torch.long)
        plain = problem.kind == "fixed_point" and self.max_backtracks > 0
        eta = torch.full_like(norm, 0.1)
        return _Progress(norm, eta, nobody if plain else None, nobody + 1, nobody, self.warmup if plain else 0)

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Progress, active: Tensor | None, count: int
    ) -> Step[_Progress]:
        """The plain steps of the warm-up, as many at once as nobody looks at, or one step."""
        if not state.warmup:
            return self.step(problem, z, evaluation, state, active)
        count = min(count, state.warmup)
        z, value = problem.repeat(evaluation.value, count)
        found = problem.evaluation(z, value)
        return Step(z, found, replace(state, norm=two(found.residual), warmup=state.warmup - count), count=count)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Progress, active: Tensor | None
    ) -> Step[_Progress]:
        """One linear solve and the search along its direction, or a plain step for those that wait."""
        running = torch.ones_like(state.norm, dtype=torch.bool) if active is None else active
        trying = running if state.wait is None else running & (state.wait == 0)
        if state.wait is not None and not bool(trying.any()):
            found = problem.evaluate(evaluation.value)
            norm = two(found.residual)
            wait = torch.where(norm < state.norm, state.wait - 1, state.nobody)
            return Step(evaluation.value, found, replace(state, norm=norm, wait=wait))
        waiting = running & ~trying
        operator = problem.linearize(z, evaluation.value)
        # The right-hand side of all others is zero, which costs the linear solver nothing.
        rests = active is not None or bool(waiting.any())
        residual = hold(trying, evaluation.residual, torch.zeros_like(z)) if rests else evaluation.residual
        eta = self._tolerance(evaluation, state)
        solved = (self.linear_solver or LU()).solve(operator, residual, eta, verify=False)
        singular = None if solved.solved else trying & (solved.status >= int(Status.DIVERGED))
        moving = trying if singular is None else trying & ~singular
        search = _Search(problem, z, evaluation, state.norm, solved.value, moving, waiting, rests)
        stuck = search.run(self.max_backtracks, plain=state.wait is not None)
        failure = None
        if stuck is not None or singular is not None:
            failure = torch.full_like(solved.status, -1)
            if stuck is not None:
                failure = torch.where(stuck, int(Status.STALLED), failure)
            if singular is not None:
                failure = torch.where(singular, int(Status.SINGULAR), failure)
        return Step(search.z, search.found, self._after(search, state, waiting), failure, look=True)

    def _tolerance(self, evaluation: Evaluation, state: _Progress) -> Tensor:
        """Of the linear solves, `(B,)`: the forcing term, but no more than convergence asks (Kelley 1995, 6.20)."""
        forcing = state.eta if self.forcing is None else torch.full_like(state.norm, self.forcing)
        if self.atol is None or self.norm not in ("two", "rms"):
            return forcing
        goal = self.atol * (evaluation.value.shape[1] ** 0.5 if self.norm == "rms" else 1.0)
        enough = (0.5 * goal) / state.norm.clamp_min(goal)
        return torch.maximum(forcing, enough)

    def _after(self, search: "_Search", state: _Progress, waiting: Tensor) -> _Progress:
        """The state after a step in which some samples took Newton's, and `waiting` ones the plain one."""
        eta = _forcing(search.norm, state) if self.forcing is None else state.eta
        wait, pause = state.wait, state.pause
        if wait is not None:
            wait = torch.where(waiting & (search.norm < state.norm), wait - 1, state.nobody)
            wait = torch.where(search.refused, pause, wait)
            # A Newton step that was good makes the next wait short again.
            short = torch.where(waiting, pause, state.nobody + 1)
            pause = torch.where(search.refused, (2 * pause).clamp_max(_LONGEST_WAIT), short)
        return _Progress(search.norm, eta, wait, pause, state.nobody, 0)


class _Search:
    """The search for an acceptable point from `start`, sample by sample.

    Attributes:
        z: the points so far, `(B, n)`.
        found: fn there.
        norm: of the residual there, `(B,)`.
        moving: samples on a Newton direction.
        refused: samples that took the plain step in its place.
    """

    def __init__(
        self,
        problem: Problem,
        start: Tensor,
        evaluation: Evaluation,
        merit: Tensor,
        direction: Tensor,
        moving: Tensor,
        waiting: Tensor,
        rests: bool,
    ) -> None:
        self._problem = problem
        self._start, self._evaluation, self._merit, self._direction = start, evaluation, merit, direction
        self.moving = moving
        self.refused = torch.zeros_like(moving)
        self._length = torch.ones_like(merit)
        # A sample that does not move has the direction zero.
        target = start + direction
        if rests:
            target = hold(waiting, start + evaluation.residual, target)
        self._go(target)

    def run(self, halvings: int, plain: bool) -> Tensor | None:
        """Search; returns the samples that found no point and are back at the start, or None if all did.

        Args:
            halvings: of the Newton step, at most; 0 takes the full step unless fn is not finite there.
            plain: whether the plain step may replace Newton's.
        """
        if not halvings:
            stuck = self.moving & ~self.norm.isfinite()
        else:
            stuck = self._worse()
            if plain and bool(stuck.any()):
                self._plain(stuck)
                stuck = self._worse()
            for _ in range(halvings):
                if not bool(stuck.any()):
                    return None
                self._halve(stuck)
                stuck = self._worse()
        if not bool(stuck.any()):
            return None
        if plain:
            # A fixed point is never stuck: the plain step, uphill or not.
            self._plain(stuck, at_all_costs=True)
            return None
        self._back(stuck)
        return stuck

    def _go(self, z: Tensor) -> None:
        self.z = z
        self.found = self._problem.evaluate(z)
        self.norm = two(self.found.residual)

    def _worse(self) -> Tensor:
        good = self.norm <= (1 - _ARMIJO * self._length) * self._merit
        return self.moving & ~good & ~self.refused

    def _plain(self, samples: Tensor, at_all_costs: bool = False) -> None:
        """The plain step for some samples; refuses their Newton step where that is an improvement, or at all costs."""
        self._go(hold(samples, self._start + self._evaluation.residual, self.z))
        self.refused = self.refused | (samples if at_all_costs else samples & (self.norm < self._merit))

    def _halve(self, samples: Tensor) -> None:
        """Half the step for some samples."""
        self._length = torch.where(samples, 0.5 * self._length, self._length)
        self._go(hold(samples, torch.addcmul(self._start, self._length[:, None], self._direction), self.z))

    def _back(self, samples: Tensor) -> None:
        """Some samples back to where they were."""
        old, new = self._evaluation, self.found
        self.z = hold(samples, self._start, self.z)
        self.norm = torch.where(samples, self._merit, self.norm)
        self.found = Evaluation(hold(samples, old.value, new.value), residual=hold(samples, old.residual, new.residual))


def _forcing(norm: Tensor, state: _Progress) -> Tensor:
    """Eisenstat & Walker (1996), choice 2: `η = γ (‖r‖/‖r_prev‖)²`, not below `γ η_prev²` while that is above 0.1."""
    ratio = norm / torch.where(state.norm > 0, state.norm, 1.0)
    eta = _GAMMA * ratio * ratio
    memory = _GAMMA * state.eta * state.eta
    eta = torch.where(memory > 0.1, torch.maximum(eta, memory), eta)
    return torch.where(eta.isfinite(), eta, _ETA_MAX).clamp(1e-2, _ETA_MAX)
