"""Picard iteration, plain or damped: the cheapest step there is."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._problem import Evaluation, Problem
from ._base import Solver, Step


@dataclass(frozen=True)
class Picard(Solver[None]):
    """`z ← z + damping·r(z)`: with `damping=1`, `z ← fn(z)` for a fixed point (Picard 1890, Banach 1922).

    Converges at the rate `ρ(I + damping·(J − I))` where that is below 1, so a contraction needs no damping; damping
    η ∈ (0, 2(1 − Re λ)/|1 − λ|²) cures an eigenvalue λ of J with Re λ < 1 and |λ| ≥ 1. For a root it is Richardson's
    iteration `z ← z − damping·fn(z)`.

    Args:
        damping: in (0, 2); the stopping rule looks at the undamped residual.
    """

    damping: float = 1.0

    max_steps: ClassVar[int] = 1000
    patience: ClassVar[int] = 100

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_number("damping", 0.0, 2.0, inside=True)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> None:
        """No state."""

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: None, active: Tensor | None
    ) -> Step[None]:
        """One application of fn, to all samples: leaving some out would cost more than it saves."""
        z = torch.add(z, evaluation.residual, alpha=self.damping)
        return Step(z, problem.evaluate(z), None)

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: None, active: Tensor | None, count: int
    ) -> Step[None]:
        """Undamped, a step is a call of fn and nothing else."""
        if self.damping != 1.0 or problem.kind != "fixed_point":
            return self.step(problem, z, evaluation, state, active)
        z, value = problem.repeat(evaluation.value, count)
        return Step(z, problem.evaluation(z, value), None, count=count)
