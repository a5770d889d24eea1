"""Batched conjugate gradients: for symmetric positive definite matrices, with memory for a single direction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._krylov import Rows, solve_in_cycles
from ._preconditioner import Preconditioner, require_preconditioner
from ._solver import LinearOperator, LinearSolution, LinearSolver


@dataclass(frozen=True, eq=False, repr=False)
class CG(LinearSolver):
    """Conjugate gradients of Hestenes & Stiefel (1952), for symmetric positive definite matrices.

    One product and four operations on `(B, n)` per step, whatever the number of steps. Such matrices are the Hessians
    of minimisations at a strict minimum, and `I − J` of a fixed point whose `J` is symmetric with eigenvalues below 1
    (a gradient step). Differences to the textbook's form:

    1. Every sample stops on its own, and those that are done leave the batch when at most half remain.
    2. A sample whose curvature `pᵀAp / pᵀMp` (a Rayleigh quotient of `M⁻¹A`; `M = I` without a preconditioner) is not
       positive, or is less than `10 ε` of the largest before, is SINGULAR; here that says *not positive definite*:
       indefinite, skew, or singular to rounding. `GMRES` may still solve it.
    3. The residual is recomputed at the end, and a sample that the recurrence wrongly took for done goes on from that
       one (`verify=False` trusts the recurrence, for steps whose effect is measured anyway).

    What runs out of steps is MAX_STEPS, what gains no more is STALLED. It is the error's energy `(x − x*)ᵀA(x − x*)`
    that falls in every step; the residual may rise above that of x = 0 meanwhile. Nothing gives away an unsymmetric
    matrix, but unless it is nearly symmetric its residual does not come down, and so its status is none of success.

    Args:
        max_steps: products at most, in each sample.
        preconditioner: a callable that is given the operator once per solve and returns `p -> M⁻¹p` on `(B, n)`, `M`
            symmetric positive definite, such as `Jacobi()`; one that is not makes samples SINGULAR. If it has a method
            `select(samples)`, samples that are done may leave the batch.
    """

    max_steps: int = 500
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("max_steps", 1)
        require_preconditioner(self, self.preconditioner)

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        return solve_in_cycles(
            _cycle,
            operator,
            b,
            rtol,
            verify,
            max_steps=self.max_steps,
            preconditioner=self.preconditioner,
            rise=torch.finfo(b.dtype).eps ** -0.5,
        )


def _cycle(whole: Rows, length: int, earlier: int) -> None:
    """At most `length` steps from the residual as it is."""
    del earlier
    rows = whole
    flat = 10 * torch.finfo(rows.value.dtype).eps
    zero = rows.norm.new_zeros(())
    square = torch.linalg.vecdot(rows.residual, rows.residual)
    direction = rows.apply(rows.residual)
    rho = square if rows.precondition is None else torch.linalg.vecdot(rows.residual, direction)
    floor, length_squared = torch.zeros_like(rho), rho
    goal = rows.target.square()
    active = square > goal
    taken = 0
    while True:
        image = rows.operator.mv(direction)
        curvature = torch.linalg.vecdot(direction, image)
        bend = curvature / length_squared
        active = active & (bend > floor)
        floor = torch.maximum(floor, flat * bend)
        step = torch.where(active, rho / curvature, zero)[:, None]
        rows.value = torch.addcmul(rows.value, step, direction)
        rows.residual = torch.addcmul(rows.residual, step, image, value=-1)
        rows.steps = rows.steps + active
        taken += 1
        square = torch.linalg.vecdot(rows.residual, rows.residual)
        conditioned = rows.apply(rows.residual)
        old, rho = rho, square if rows.precondition is None else torch.linalg.vecdot(rows.residual, conditioned)
        if rows.limit is not None:
            rows.rest(taken)
            goal = rows.target.square()
        active = active & (square > goal)
        count = int(torch.count_nonzero(active))
        shrinks = rows.may_shrink(count)
        if not count or taken == length or shrinks:
            rows.norm = square.sqrt()
            # Nothing else makes a row above its target give up.
            rows.singular = rows.singular | (square > goal) & ~active
            if not count or taken == length:
                break
        # A row at rest has the step 0, and keeps a direction that is finite.
        along = torch.where(active, rho / old, zero)
        direction = torch.addcmul(conditioned, along[:, None], direction)
        length_squared = torch.addcmul(rho, along * along, length_squared)
        if shrinks:
            left = active.nonzero()[:, 0]
            rows = rows.select(left)
            state = (direction, rho, length_squared, floor, goal, active)
            direction, rho, length_squared, floor, goal, active = (t.index_select(0, left) for t in state)
    rows.back_to(whole)
