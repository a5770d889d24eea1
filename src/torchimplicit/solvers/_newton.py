"""Newton's method with a per-sample line search: dense, or matrix-free with a Krylov method."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from .._solution import Status
from ..linear import GMRES, LU, Factors, Inverse, LinearSolver
from ._base import Solver, Step, hold
from ._line_search import Search
from ._picard import Extrapolation, Picard

_ETA_MAX, _GAMMA = 0.5, 0.9
_LONGEST_WAIT = 16
_WARMUP = Picard(extrapolate_every=12)


@dataclass(eq=False, repr=False)
class _Progress:
    """What the next step needs to know of each sample, `(B,)` each.

    Attributes:
        norm: the residual's norm.
        eta: the last forcing term.
        wait: plain steps to take before the next Newton step; None where there can be none.
        pause: length of the next wait.
        nobody: zeros.
        warmup: plain steps that every sample takes first.
        factors: of each sample's latest matrix, where they are kept.
        before: the state of the plain steps.
    """

    norm: Tensor
    eta: Tensor
    wait: Tensor | None
    pause: Tensor
    nobody: Tensor
    warmup: int
    factors: Factors | None = None
    before: Extrapolation | None = None


@dataclass(frozen=True, eq=False, repr=False)
class _NewtonSteps(Solver[_Progress]):
    """What `Newton` and `NewtonKrylov` share: a linear solve per step, and the search along its direction."""

    linear_solver: LinearSolver | None = None
    max_backtracks: int = 12
    forcing: float | Literal["eisenstat-walker"] | None = None
    warmup: int = 0

    max_steps: ClassVar[int] = 100
    patience: ClassVar[int] = 30

    @abstractmethod
    def _linear(self) -> LinearSolver:
        """The solver of the linear systems."""

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        ok = self.linear_solver is None or isinstance(self.linear_solver, LinearSolver)
        self._require(
            "linear_solver", ok, "None or a linear solver such as torchimplicit.LU() or torchimplicit.GMRES()"
        )
        self._require_count("max_backtracks", 0)
        if isinstance(self.forcing, str):
            self._require_choice("forcing", ("eisenstat-walker",))
        else:
            self._require_number("forcing", 0.0, 1.0, inside=True, optional=True)
        self._require_count("warmup", 0)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Progress:
        """Forcing starts at 0.1; nobody waits."""
        norm = evaluation.norm
        nobody = torch.zeros_like(norm, dtype=torch.long)
        plain = problem.kind == "fixed_point" and self.max_backtracks > 0
        eta = torch.full_like(norm, 0.1)
        warmup, before = (self.warmup, Extrapolation()) if plain and self.warmup else (0, None)
        return _Progress(norm, eta, nobody if plain else None, nobody + 1, nobody, warmup, before=before)

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Progress, active: Tensor | None, count: int
    ) -> Step[_Progress]:
        """The plain steps of the warm-up, as many at once as nobody looks at, or one step."""
        if not state.warmup:
            return self.step(problem, z, evaluation, state, active)
        plain = _WARMUP.steps(problem, z, evaluation, state.before, active, min(count, state.warmup))
        left = state.warmup - plain.count
        # Newton's first step asks for the norm.
        norm = state.norm if left else plain.evaluation.norm
        after = replace(state, norm=norm, warmup=left, before=state.before if left else None)
        return Step(plain.z, plain.evaluation, after, count=plain.count)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Progress, active: Tensor | None
    ) -> Step[_Progress]:
        """One linear solve and the search along its direction, or a plain step for those that wait."""
        running = torch.ones_like(state.norm, dtype=torch.bool) if active is None else active
        trying = running if state.wait is None else running & (state.wait == 0)
        if state.wait is not None and not bool(trying.any()):
            found = problem.evaluate(evaluation.value)
            norm = found.norm
            wait = torch.where(norm < state.norm, state.wait - 1, state.nobody)
            return Step(evaluation.value, found, replace(state, norm=norm, wait=wait))
        waiting = None if state.wait is None else running & ~trying
        operator = problem.linearize(z, evaluation.value)
        # The right-hand side of all others is zero, which costs the linear solver nothing.
        rests = active is not None or (waiting is not None and bool(waiting.any()))
        residual = hold(trying, evaluation.residual, torch.zeros_like(z)) if rests else evaluation.residual
        eta = self._tolerance(evaluation, state)
        solved = self._linear().solve(operator, residual, eta, verify=False)
        if problem.keeps_inverse and solved.factors is not None:
            before = state.factors or Factors.none(z)
            state = replace(state, factors=before.update(solved.rows, solved.factors))
        singular = None if solved.solved else trying & (solved.status >= int(Status.DIVERGED))
        moving = trying if singular is None else trying & ~singular
        search = Search(problem, z, evaluation, state.norm, solved.value, moving, waiting if rests else None)
        stuck = search.run(self.max_backtracks, plain=state.wait is not None)
        failure = None
        if stuck is not None or singular is not None:
            failure = torch.full_like(solved.status, -1)
            if stuck is not None:
                failure = torch.where(stuck, int(Status.STALLED), failure)
            if singular is not None:
                failure = torch.where(singular, int(Status.SINGULAR), failure)
        return Step(search.z, search.found, self._after(search, state, waiting), failure, look=True)

    def inverse(self, state: _Progress) -> Inverse | None:
        """The LU factors of each sample's last Newton step, where they were kept."""
        return state.factors

    def _tolerance(self, evaluation: Evaluation, state: _Progress) -> Tensor:
        """Of the linear solves, `(B,)`: the forcing term, but no more than convergence asks (Kelley 1995, 6.20)."""
        forcing = torch.full_like(state.norm, self.forcing) if isinstance(self.forcing, float) else state.eta
        if self.atol is None or self.norm not in ("two", "rms"):
            return forcing
        goal = self.atol * (evaluation.value.shape[1] ** 0.5 if self.norm == "rms" else 1.0)
        enough = (0.5 * goal) / state.norm.clamp_min(goal)
        return torch.maximum(forcing, enough)

    def _after(self, search: Search, state: _Progress, waiting: Tensor | None) -> _Progress:
        """The state after a step in which some samples took Newton's, and `waiting` ones the plain one."""
        constant = isinstance(self.forcing, float) or isinstance(self._linear(), LU)  # which needs no tolerance
        eta = state.eta if constant else _forcing(search.norm, state)
        wait, pause = state.wait, state.pause
        if wait is not None and waiting is not None:
            wait = torch.where(waiting & (search.norm < state.norm), wait - 1, state.nobody)
            # A Newton step that was good makes the next wait short again.
            short = torch.where(waiting, pause, state.nobody + 1)
            if search.refused is None:
                pause = short
            else:
                wait = torch.where(search.refused, pause, wait)
                pause = torch.where(search.refused, (2 * pause).clamp_max(_LONGEST_WAIT), short)
        return _Progress(search.norm, eta, wait, pause, state.nobody, 0, state.factors)


@dataclass(frozen=True, eq=False, repr=False)
class Newton(_NewtonSteps):
    """`z ← z + t A⁻¹ r` with `A = −∂r/∂z`, with step control for each sample.

    `A` is formed by automatic differentiation (n reverse products at once) or in the closed form that fn supplies,
    and factorised by LAPACK: O(n³) time and O(n²) memory per sample. A sample whose matrix is singular is SINGULAR
    and disturbs nobody. With a `GMRES` or `Cascade` in `linear_solver` the steps need only products with `A` and are
    solved to the forcing term of Eisenstat & Walker (1996), choice 2 with its safeguard; `NewtonKrylov` is that.

    Step control: a step must fall to `‖r(z + tδ)‖ ≤ (1 − 10⁻⁴ t)‖r(z)‖`, with t halved from 1 (Dennis & Schnabel 1983,
    §6.3). A *fixed point* has another way out, tried before the halving: the plain step `z + r`. A sample that had to
    take it takes 1, 2, 4, … more of them before it pays for another Newton step: far from the solution of a
    contraction plain steps are the better ones, and the cheaper. A sample of a root that finds no t is STALLED.

    Args:
        linear_solver: None is `LU()`.
        max_backtracks: halvings tried; 0 takes full steps always (plain Newton, which may wander uphill).
        forcing: relative tolerance of the linear solves in (0, 1); None is Eisenstat–Walker. Looser near the solution,
            where less will do. LU ignores it.
        warmup: plain steps of a fixed point before the first Newton step, for maps that contract; each twelfth of them
            is extrapolated, as by `Picard(extrapolate_every=12)`.
    """

    def _linear(self) -> LinearSolver:
        return self.linear_solver or LU()


@dataclass(frozen=True, eq=False, repr=False)
class NewtonKrylov(_NewtonSteps):
    """Newton's method without matrices: each step is solved by a Krylov method, from products `A p` alone.

    "Truncated" or inexact Newton (Dembo, Eisenstat & Steihaug 1982; Knoll & Keyes 2004). The products are exact, by
    automatic differentiation or the closed form that fn supplies, not differences of fn. How far the linear system is
    solved is the forcing term of Eisenstat & Walker (1996), choice 2 with its safeguard, from the fall of the residual
    in the step just taken, for each sample; near the solution no further than convergence asks. Step control is
    `Newton`'s. Memory O(B n) times the Krylov method's `restart`.

    Args:
        linear_solver: `GMRES`, `BiCGStab`, `CG`, `Neumann` or `Cascade`, with its preconditioner; None is `GMRES()`.
        max_backtracks: halvings tried; 0 takes full steps always.
        forcing: `"eisenstat-walker"`, or a constant in (0, 1).
        warmup: plain steps of a fixed point before the first Newton step, for maps that contract; each twelfth of them
            is extrapolated, as by `Picard(extrapolate_every=12)`.
    """

    forcing: float | Literal["eisenstat-walker"] = "eisenstat-walker"

    def _linear(self) -> LinearSolver:
        return self.linear_solver or GMRES()


def _forcing(norm: Tensor, state: _Progress) -> Tensor:
    """Eisenstat & Walker (1996), choice 2: `η = γ (‖r‖/‖r_prev‖)²`, not below `γ η_prev²` while that is above 0.1."""
    ratio = norm / torch.where(state.norm > 0, state.norm, 1.0)
    eta = _GAMMA * ratio * ratio
    memory = _GAMMA * state.eta * state.eta
    eta = torch.where(memory > 0.1, torch.maximum(eta, memory), eta)
    return torch.where(eta.isfinite(), eta, _ETA_MAX).clamp(1e-2, _ETA_MAX)
