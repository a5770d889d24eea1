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
    53, 2010): an orthonormal basis `Q` of the image `A K` is kept together with its preimages `P`, `A P = Q`. Each
    step projects the residual on one more vector of `Q`. Differences to the textbook's Arnoldi form:

    1. The residual itself is at hand after every step, so each sample stops on its own without a Hessenberg system.
    2. The next direction is the residual where the last step made progress, else the last basis vector; the first
       alone breaks down on stagnation (as GCR does), the second alone is ill-conditioned (Walker & Zhou 1994).
    3. Every restart starts from the recomputed residual, and a sample is CONVERGED only if that one says so.

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

    def solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor) -> LinearSolution:
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
    """One restart cycle of at most `length` products; updates `run` in place and returns the products taken."""
    batch, n = run.residual.shape
    tiny = 4 * torch.finfo(run.residual.dtype).eps
    # Rows [q | p] with A p = q, so that one product orthogonalises both.
    basis = run.residual.new_empty(batch, length, 2 * n)
    weights = run.residual.new_zeros(batch, length, 1)
    residual, norm = run.residual, two(run.residual)
    direction = residual / torch.where(norm > 0, norm, 1.0)[:, None]
    active = run.active
    taken = 0
    while taken < length:
        image = operator.mv(direction)
        pair = torch.cat((image, direction), dim=1)
        if taken:
            known = basis[:, :taken]
            for _ in range(2):  # twice is enough (Giraud et al. 2005)
                overlap = torch.bmm(pair[:, None, :n], known[:, :, :n].mT)
                pair = torch.baddbmm(pair[:, None], overlap, known, alpha=-1)[:, 0]
        length_before, length_after = two(image), two(pair[:, :n])
        fresh = length_after > tiny * length_before
        pair = pair / torch.where(fresh, length_after, 1.0)[:, None]
        basis[:, taken] = torch.where((fresh & active)[:, None], pair, 0.0)
        pair = basis[:, taken]
        weight = (residual * pair[:, :n]).sum(dim=1)
        weights[:, taken, 0] = weight
        residual = torch.addcmul(residual, weight[:, None], pair[:, :n], value=-1)
        run.steps += active
        run.exhausted |= active & ~fresh
        taken += 1
        previous, norm = norm, two(residual)
        active = active & fresh & (norm > target)
        if taken == length or not bool(active.any()):
            break
        towards = residual / torch.where(norm > 0, norm, 1.0)[:, None]
        direction = torch.where((norm <= _PROGRESS * previous)[:, None], towards, pair[:, :n])
    run.value = run.value + torch.bmm(weights[:, :taken].mT, basis[:, :taken, n:])[:, 0]
    return taken
