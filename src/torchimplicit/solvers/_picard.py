"""Picard iteration, plain, damped or extrapolated: the cheapest step there is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from ._base import Solver, Step, hold

_LONGEST, _SHORTEST = -50.0, 0.5
"""Bounds of an extrapolation: those of contractions by a factor between 0.98 and -1."""


@dataclass(eq=False, repr=False)
class _Damping:
    """The damping of each sample, `(B,)`, its best residual norm, and the steps since that."""

    factor: Tensor
    best: Tensor
    since: Tensor


@dataclass(eq=False, repr=False)
class Extrapolation:
    """What the last extrapolation began with, and what the next one needs.

    Attributes:
        taken: steps so far.
        residual: before the last step, `(B, n)`; None where no extrapolation comes next.
        plain: where a plain step would have led in the place of the last extrapolation, `(B, n)`.
        norm: of the residual when that was begun, `(B,)`.
        off: the samples for which it was of no use, `(B,)` bool.
    """

    taken: int = 0
    residual: Tensor | None = None
    plain: Tensor | None = None
    norm: Tensor | None = None
    off: Tensor | None = None

    def select(self, samples: Tensor) -> "Extrapolation":
        """That of some samples, by their indices."""
        parts = (self.residual, self.plain, self.norm, self.off)
        return Extrapolation(self.taken, *(None if t is None else t.index_select(0, samples) for t in parts))


_State = _Damping | Extrapolation | None


@dataclass(frozen=True, eq=False, repr=False)
class Picard(Solver[_State]):
    """`z ← z + damping·r(z)`: with `damping=1`, `z ← fn(z)` for a fixed point (Picard 1890, Banach 1922).

    Converges at the rate `ρ(I + damping·(J − I))` where that is below 1, so a contraction needs no damping; damping
    η ∈ (0, 2(1 − Re λ)/|1 − λ|²) cures an eigenvalue λ of J with Re λ < 1 and |λ| ≥ 1. For a root it is Richardson's
    iteration `z ← z − damping·fn(z)`.

    Args:
        damping: in (0, 2); the stopping rule looks at the undamped residual.
        damping_patience: steps without a new best residual after which a sample's damping is halved (as the halting of
            fixed-point reasoning models does it); None never. Maps whose eigenvalues have real parts below 1, but not
            absolute values, are then solved without a guess at η.
        extrapolate_every: after so many steps, and then again and again, a step goes on along the last one to where
            the residual is least to first order (the vector form of Aitken's Δ²: Irons & Tuck 1969; Anderson
            acceleration with a history of one, now and then: Banerjee, Suryanarayana & Pask 2016). Little is left by
            then but the slowest mode, which it removes if it is a real one: half of the steps on maps that have one,
            for next to no cost. A sample for which the residual has grown by the time of the next extrapolation goes
            back, and is not extrapolated again. None never.
    """

    damping: float = 1.0
    damping_patience: int | None = None
    extrapolate_every: int | None = None

    max_steps: ClassVar[int] = 1000
    patience: ClassVar[int] = 100

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_number("damping", 0.0, 2.0, inside=True)
        if self.damping_patience is not None:
            self._require_count("damping_patience", 1)
        if self.extrapolate_every is not None:
            self._require_count("extrapolate_every", 2)
            self._require("damping_patience", self.damping_patience is None, "None where extrapolate_every is given")

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _State:
        """No state, unless the damping changes or steps are extrapolated."""
        if self.extrapolate_every is not None:
            return Extrapolation()
        if self.damping_patience is None:
            return None
        norm = evaluation.norm
        return _Damping(torch.full_like(norm, self.damping), norm, torch.zeros_like(norm, dtype=torch.long))

    def step(
        self,
        problem: Problem,
        z: Tensor,
        evaluation: Evaluation,
        state: _State,
        active: Tensor | None,
    ) -> Step[_State]:
        """One application of fn, to all samples: leaving some out would cost more than it saves."""
        return self.steps(problem, z, evaluation, state, active, 1)

    def steps(
        self,
        problem: Problem,
        z: Tensor,
        evaluation: Evaluation,
        state: _State,
        active: Tensor | None,
        count: int,
    ) -> Step[_State]:
        """Undamped, a step is a call of fn and nothing else."""
        if isinstance(state, _Damping):
            return self._damped(problem, z, evaluation, state)
        if isinstance(state, Extrapolation):
            return self._block(problem, z, evaluation, state, active, count)
        z, evaluation = self._advance(problem, z, evaluation, count)
        return Step(z, evaluation, state, count=count)

    def _damped(self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Damping) -> Step[_State]:
        """A step whose damping each sample has found for itself."""
        assert self.damping_patience is not None
        z = torch.addcmul(z, state.factor[:, None], evaluation.residual)
        found = problem.evaluate(z)
        better = found.norm < state.best
        since = torch.where(better, 0, state.since + 1)
        tired = since >= self.damping_patience
        factor = torch.where(tired, 0.5 * state.factor, state.factor)
        best = torch.where(better | tired, found.norm, state.best)
        return Step(z, found, _Damping(factor, best, torch.where(tired, 0, since)))

    def _block(
        self,
        problem: Problem,
        z: Tensor,
        evaluation: Evaluation,
        state: Extrapolation,
        active: Tensor | None,
        count: int,
    ) -> Step[_State]:
        """Steps up to the next extrapolation: a plain one, the extrapolated one, and plain ones after that."""
        assert self.extrapolate_every is not None
        phase, taken = state.taken % self.extrapolate_every, 0
        if phase == 0 and state.taken:
            z, evaluation = self._look_back(problem, z, evaluation, state, active)
            z, evaluation, phase, taken = *self._advance(problem, z, evaluation, 1), 1, 1
        count = min(count, self.extrapolate_every - phase + taken)
        if phase == 1 and state.residual is not None and taken < count:
            start = self._extrapolated(problem, z, evaluation, state)
            if self._undamped(problem):
                z, value = problem.repeat(start, count - taken)
                evaluation = problem.evaluation(z, value, norm_only=True)
            else:
                z, evaluation = self._advance(problem, start, problem.evaluate(start), count - taken - 1)
        elif taken < count:
            z, evaluation = self._advance(problem, z, evaluation, count - taken)
        state.taken += count
        return Step(z, evaluation, state, count=count)

    def _advance(self, problem: Problem, z: Tensor, evaluation: Evaluation, count: int) -> tuple[Tensor, Evaluation]:
        """Plain steps."""
        if self._undamped(problem):
            z, value = problem.repeat(evaluation.value, count)
            return z, problem.evaluation(z, value, norm_only=True)
        for _ in range(count):
            z = torch.add(z, evaluation.residual, alpha=self.damping)
            evaluation = problem.evaluate(z)
        return z, evaluation

    def _undamped(self, problem: Problem) -> bool:
        """Whether the plain step is fn itself."""
        return self.damping == 1.0 and problem.kind == "fixed_point"

    def _look_back(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: Extrapolation, active: Tensor | None
    ) -> tuple[Tensor, Evaluation]:
        """Before the step that an extrapolation follows: has the last one been of use?"""
        norm = evaluation.norm
        # The minimum with NaN is NaN, which equals nothing.
        if state.norm is not None and state.plain is not None and not torch.equal(norm, norm.minimum(state.norm)):
            worse = (norm <= state.norm).logical_not_()
            if active is not None:
                worse &= active
            if state.off is not None:
                worse &= ~state.off
            if bool(worse.any()):
                state.off = worse if state.off is None else state.off | worse
                z = hold(worse, state.plain, z)
                evaluation = problem.evaluate(z)
                norm = evaluation.norm
        state.norm, state.residual = norm, evaluation.residual
        return z, evaluation

    def _extrapolated(self, problem: Problem, z: Tensor, evaluation: Evaluation, state: Extrapolation) -> Tensor:
        """With `Δ` the change of r in the last step, from z to p: `p + g (p − z)`, `g = argmin ‖r + g Δ‖`."""
        residual = evaluation.residual
        assert state.residual is not None
        plain = evaluation.value if self._undamped(problem) else torch.add(z, residual, alpha=self.damping)
        change = residual - state.residual
        square = torch.linalg.vecdot(change, change).clamp_min_(torch.finfo(change.dtype).tiny)
        length = torch.linalg.vecdot(change, residual).div_(square).clamp_(_LONGEST, _SHORTEST)
        if state.off is not None:
            length = length.masked_fill_(state.off, 0.0)
        state.plain, state.residual = plain, None
        return torch.addcmul(plain, length[:, None], residual, value=-self.damping)
