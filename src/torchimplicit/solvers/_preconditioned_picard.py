"""Picard iteration through one matrix that the cell supplies, the same for all samples and steps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from ._base import Solver, Step, hold

_FALL = 0.99
"""Factor by which a residual falls from look to look where the steps contract at all."""


@dataclass(eq=False, repr=False)
class _State:
    """What the residual's norm is to be below, and the samples that take plain steps, `(B,)` both; None for none."""

    bound: Tensor
    plain: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class PreconditionedPicard(Solver[_State]):
    """`z ← z + M r(z)` with a matrix `M ≈ A⁻¹` that the cell makes of its parameters alone, once for each solve.

    For a fixed point of a cell that has a method `preconditioned`, such as `torchimplicit.nn.TanhEquilibrium`, whose M
    is that of Newton's method with one slope for all samples: a step costs what a plain one does, one product with a
    matrix, and half as many or fewer are needed. To make M costs as much as some `n / B` to `7 n / B` steps of a batch
    of B samples: it pays where they are as many as the unknowns, or where plain steps converge slowly. Residuals are
    those of the equation itself. A look at them costs one evaluation: `check_every=8` suits cheap cells. A sample whose
    residual has not fallen from one look to the next goes on with plain steps, and so do all where the cell cannot give
    M: under autocast, or with hooks within.

    The adjoint solve of the same call uses the same matrix.
    """

    max_steps: ClassVar[int] = 1000
    patience: ClassVar[int] = 100

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _State:
        """Nobody takes plain steps.

        Raises:
            ValueError: fn is no fixed point of a cell that can be preconditioned.
        """
        if not problem.preconditionable:
            raise ValueError(
                f"solver=PreconditionedPicard(...) needs a cell with a method `preconditioned`, such as "
                f"torchimplicit.nn.TanhEquilibrium's, in a fixed point; this is a {problem.kind} of "
                f"{type(problem.fn).__name__}; use solver=torchimplicit.Picard()."
            )
        return _State(torch.full_like(evaluation.norm, torch.inf), None)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _State, active: Tensor | None
    ) -> Step[_State]:
        """One step of each sample."""
        return self.steps(problem, z, evaluation, state, active, 1)

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _State, active: Tensor | None, count: int
    ) -> Step[_State]:
        """So many steps, and one look."""
        norm, plain = evaluation.norm, state.plain
        if not torch.equal(norm, norm.minimum(state.bound)):  # the minimum with NaN is NaN, which equals nothing
            astray = (norm <= state.bound).logical_not_()
            plain = astray if plain is None else plain | astray
        if problem.preconditioned() and (plain is None or not bool(plain.all())):
            z, value = problem.approach(z, count)
            if plain is not None:
                before, after = problem.repeat(evaluation.value, count)
                z, value = hold(plain, before, z), hold(plain, after, value)
        else:
            z, value = problem.repeat(evaluation.value, count)
        return Step(z, problem.evaluation(z, value, norm_only=True), _State(_FALL * norm, plain), count=count)
