"""Batched restarted GMRES: minimal residual over the Krylov space of each sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from ._krylov import Rows, solve_in_cycles
from ._preconditioner import Preconditioner, require_preconditioner
from ._solver import LinearOperator, LinearSolution, LinearSolver

_PROGRESS = 0.9
"""A step that cuts the residual below this factor continues from the residual, else from the last basis vector."""


@dataclass(frozen=True, eq=False, repr=False)
class GMRES(LinearSolver):
    """GMRES of Saad & Schultz (1986), restarted, for every sample of a batch at once; needs only products `A p`.

    Computed as *adaptive simpler GMRES* (Jiránek & Rozložník, "Adaptive version of Simpler GMRES", Numer. Algorithms
    53, 2010): the basis that is orthonormal is that of the image `A K`, and each step projects the residual on one
    more vector of it. Differences to the textbook's Arnoldi form:

    1. The residual itself is at hand after every step, so each sample stops on its own without a Hessenberg system.
    2. The next direction is the residual where the last step made progress, else the last basis vector; the first
       alone breaks down on stagnation (as GCR does), the second alone is ill-conditioned (Walker & Zhou 1994).
    3. Every restart starts from the recomputed residual, and a sample is CONVERGED only if that one says so
       (`verify=False` trusts the updated one, for steps whose effect is measured anyway).

    A sample whose Krylov space is exhausted above the tolerance is SINGULAR; one that runs out of steps is MAX_STEPS,
    and one whose last cycle gained nothing is STALLED: a larger `restart` may help. Samples that are done leave the
    batch between cycles when at most half remain.

    Args:
        restart: basis vectors kept before a restart. Memory `2·B·restart·n`.
        max_steps: products at most, over all restarts, in each sample.
        preconditioner: a callable that is given the operator once per solve and returns `p -> M⁻¹p` on `(B, n)`, such
            as `Jacobi()`; applied from the right, so residuals stay those of the system. It need not be linear, nor
            the same in every step (Saad's flexible GMRES, 1993). If it has a method `select(samples)`, samples that
            are done may leave the batch.
    """

    restart: int = 20
    max_steps: int = 200
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("restart", 1)
        self._require_count("max_steps", 1)
        require_preconditioner(self, self.preconditioner)

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""

        def cycle(rows: Rows, length: int, earlier: int) -> None:
            del earlier
            _cycle(rows, min(length, self.restart))

        return solve_in_cycles(
            cycle, operator, b, rtol, verify, max_steps=self.max_steps, preconditioner=self.preconditioner
        )


def _cycle(rows: Rows, length: int) -> None:
    """One restart cycle of at most `length` products.

    With directions `D`, `A D = Q R`: `Q` orthonormal, `R` upper triangular. The residual loses its part along each
    new column of `Q`, `w = Qᵀ r`, and `x += D R⁻¹ w` at the end. A sample that is done has the weight 0 from then on.
    With a preconditioner `D` holds `M⁻¹` times the direction, so that `x` needs no more of it.
    """
    batch, n = rows.residual.shape
    limits = torch.finfo(rows.residual.dtype)
    directions, basis = rows.residual.new_empty(2, batch, length, n)
    triangle = rows.residual.new_zeros(batch, length, length)
    weights = rows.residual.new_zeros(batch, length, 1)
    zero = rows.residual.new_zeros(())
    residual, norm, steps = rows.residual, rows.norm, rows.steps
    active = norm > rows.target
    direction = residual / norm.clamp_min(limits.tiny)[:, None]
    taken = 0
    while taken < length:
        direction = rows.apply(direction)
        directions[:, taken] = direction
        image = rows.operator.mv(direction)
        whole = two(image)
        if taken:
            known = basis[:, :taken]
            overlap = torch.bmm(image[:, None], known.mT)
            image = torch.baddbmm(image[:, None], overlap, known, alpha=-1)[:, 0]
            triangle[:, :taken, taken] = overlap[:, 0]
        size = two(image)
        fresh = size > (4 * limits.eps) * whole
        size = size.clamp_min(limits.tiny)
        triangle[:, taken, taken] = size
        column = torch.div(image, size[:, None], out=basis[:, taken])
        steps = steps + active
        active = active & fresh
        weight = torch.where(active, torch.linalg.vecdot(residual, column), zero)
        weights[:, taken, 0] = weight
        residual = torch.addcmul(residual, weight[:, None], column, value=-1)
        taken += 1
        previous, norm = norm, two(residual)
        rows.rest(taken)
        active = active & (norm > rows.target)
        if taken == length or not bool(active.any()):
            break
        direction = residual / norm.clamp_min(limits.tiny)[:, None]
        stagnant = norm > _PROGRESS * previous
        if bool(stagnant.any()):
            direction = torch.where(stagnant[:, None], column, direction)
    coefficients = torch.linalg.solve_triangular(triangle[:, :taken, :taken], weights[:, :taken], upper=True)
    rows.value = rows.value + torch.bmm(coefficients.mT.contiguous(), directions[:, :taken])[:, 0]
    rows.residual, rows.norm, rows.steps = residual, norm, steps
    # Nothing else makes a sample above its target give up.
    rows.singular = rows.singular | (norm > rows.target) & ~active
