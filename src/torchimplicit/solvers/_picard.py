"""Picard iteration, plain or damped: the cheapest step there is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._norms import two
from .._problem import Evaluation, Problem
from ._base import Solver, Step


@dataclass
class _Damping:
    """The damping of each sample, `(B,)`, its best residual norm, and the steps since that."""

    factor: Tensor
    best: Tensor
    since: Tensor


@dataclass(frozen=True)
class Picard(Solver[_Damping | None]):
    """`z ← z + damping·r(z)`: with `damping=1`, `z ← fn(z)` for a fixed point (Picard 1890, Banach 1922).

    Converges at the rate `ρ(I + damping·(J − I))` where that is below 1, so a contraction needs no damping; damping
    η ∈ (0, 2(1 − Re λ)/|1 − λ|²) cures an eigenvalue λ of J with Re λ < 1 and |λ| ≥ 1. For a root it is Richardson's
    iteration `z ← z − damping·fn(z)`.

    Args:
        damping: in (0, 2); the stopping rule looks at the undamped residual.
        damping_patience: steps without a new best residual after which a sample's damping is halved (as the halting of
            fixed-point reasoning models does it); None never. Maps whose eigenvalues have real parts below 1, but not
            absolute values, are then solved without a guess at η.
    """

    damping: float = 1.0
    damping_patience: int | None = None

    max_steps: ClassVar[int] = 1000
    patience: ClassVar[int] = 100

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_number("damping", 0.0, 2.0, inside=True)
        if self.damping_patience is not None:
            self._require_count("damping_patience", 1)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Damping | None:
        """No state, unless the damping changes."""
        if self.damping_patience is None:
            return None
        norm = two(evaluation.residual)
        return _Damping(torch.full_like(norm, self.damping), norm, torch.zeros_like(norm, dtype=torch.long))

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Damping | None, active: Tensor | None
    ) -> Step[_Damping | None]:
        """One application of fn, to all samples: leaving some out would cost more than it saves."""
        if state is None or self.damping_patience is None:
            z = torch.add(z, evaluation.residual, alpha=self.damping)
            return Step(z, problem.evaluate(z), None)
        z = torch.addcmul(z, state.factor[:, None], evaluation.residual)
        found = problem.evaluate(z)
        norm = two(found.residual)
        better = norm < state.best
        since = torch.where(better, 0, state.since + 1)
        tired = since >= self.damping_patience
        factor = torch.where(tired, 0.5 * state.factor, state.factor)
        best = torch.where(better | tired, norm, state.best)
        return Step(z, found, _Damping(factor, best, torch.where(tired, 0, since)))

    def steps(
        self,
        problem: Problem,
        z: Tensor,
        evaluation: Evaluation,
        state: _Damping | None,
        active: Tensor | None,
        count: int,
    ) -> Step[_Damping | None]:
        """Undamped, a step is a call of fn and nothing else."""
        if self.damping != 1.0 or state is not None or problem.kind != "fixed_point":
            return self.step(problem, z, evaluation, state, active)
        z, value = problem.repeat(evaluation.value, count)
        return Step(z, problem.evaluation(z, value), None, count=count)
