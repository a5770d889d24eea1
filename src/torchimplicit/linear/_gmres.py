"""Batched restarted GMRES: minimal residual over the Krylov space of each sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._solver import LinearOperator, LinearSolution, LinearSolver

_PROGRESS = 0.9
"""A step that cuts the residual below this factor continues from the residual, else from the last basis vector."""


@dataclass(frozen=True)
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

    A sample whose Krylov space is exhausted above the tolerance is SINGULAR; one that runs out of steps is MAX_STEPS.

    Args:
        restart: basis vectors kept before a restart. Memory `2·B·restart·n`.
        max_steps: products taken at most, over all restarts.
    """

    restart: int = 20
    max_steps: int = 200

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("restart", 1)
        self._require_count("max_steps", 1)

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        size = two(b)
        finite = size.isfinite()
        target = torch.where(finite, rtol * size, 0.0)
        run = _Run(
            value=torch.zeros_like(b),
            residual=torch.where(finite[:, None], b, 0.0),
            active=finite & (size > target),
            exhausted=torch.zeros_like(finite),
            steps=torch.zeros(b.shape[0], dtype=torch.long, device=b.device),
        )
        taken, previous = 0, two(run.residual)
        while taken < self.max_steps and bool(run.active.any()):
            taken += _cycle(operator, run, target, min(self.restart, self.max_steps - taken))
            if verify:
                run.residual = torch.where(finite[:, None], b - operator.mv(run.value), 0.0)
            norm = two(run.residual)
            run.exhausted &= ~(norm <= target)
            # A cycle that gained nothing will not gain in the next one: GMRES(restart) has stagnated.
            run.active = (norm > target) & (norm < 0.99 * previous) & ~run.exhausted & finite
            previous = norm
        return self._report(run, size, finite, target)

    @staticmethod
    def _report(run: "_Run", size: Tensor, finite: Tensor, target: Tensor) -> LinearSolution:
        norm = two(run.residual)
        status = torch.where(norm <= target, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(run.exhausted, int(Status.SINGULAR), status)
        status = torch.where(finite & norm.isfinite(), status, int(Status.NONFINITE))
        usable = (status == int(Status.CONVERGED)) | (status == int(Status.MAX_STEPS))
        relative = torch.where(size > 0, norm / size, 0.0)
        return LinearSolution(
            torch.where(usable[:, None], run.value, 0.0),
            status,
            torch.where(status == int(Status.NONFINITE), torch.inf, relative),
            run.steps,
            not bool(status.any()),
        )


@dataclass
class _Run:
    """The state of a solve; every field has the batch first."""

    value: Tensor
    residual: Tensor
    active: Tensor
    exhausted: Tensor
    steps: Tensor


def _cycle(operator: LinearOperator, run: _Run, target: Tensor, length: int) -> int:
    """One restart cycle of at most `length` products; updates `run` in place and returns the products taken.

    With directions `D`, `A D = Q R`: `Q` orthonormal, `R` upper triangular. The residual loses its part along each
    new column of `Q`, `w = Qᵀ r`, and `x += D R⁻¹ w` at the end. A sample that is done has the weight 0 from then on.
    """
    batch, n = run.residual.shape
    limits = torch.finfo(run.residual.dtype)
    directions, basis = run.residual.new_empty(2, batch, length, n)
    triangle = run.residual.new_zeros(batch, length, length)
    weights = run.residual.new_zeros(batch, length, 1)
    zero = run.residual.new_zeros(())
    residual, norm, active = run.residual, two(run.residual), run.active
    direction = residual / norm.clamp_min(limits.tiny)[:, None]
    taken = 0
    while taken < length:
        directions[:, taken] = direction
        image = operator.mv(direction)
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
        run.exhausted |= active & ~fresh
        run.steps += active
        active = active & fresh
        weight = torch.where(active, torch.linalg.vecdot(residual, column), zero)
        weights[:, taken, 0] = weight
        residual = torch.addcmul(residual, weight[:, None], column, value=-1)
        taken += 1
        previous, norm = norm, two(residual)
        active = active & (norm > target)
        if taken == length or not bool(active.any()):
            break
        direction = residual / norm.clamp_min(limits.tiny)[:, None]
        stagnant = norm > _PROGRESS * previous
        if bool(stagnant.any()):
            direction = torch.where(stagnant[:, None], column, direction)
    coefficients = torch.linalg.solve_triangular(triangle[:, :taken, :taken], weights[:, :taken], upper=True)
    run.value = run.value + torch.bmm(coefficients.mT.contiguous(), directions[:, :taken])[:, 0]
    run.residual = residual
    return taken
