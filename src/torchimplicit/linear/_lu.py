"""Dense LU of a batch of matrices, in which a singular matrix is its own failure and nobody else's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._dense import DenseSolver, condition_limit, equilibrate
from ._inverse import Factors
from ._probe import kept_signs


@dataclass(frozen=True, eq=False, repr=False)
class LU(DenseSolver):
    """Gaussian elimination with partial pivoting (LAPACK `getrf`/`getrs`) of every sample's matrix.

    A sample is SINGULAR when a pivot is zero or the condition number of the matrix, its rows scaled to unit size, is
    estimated at more than `1/(10 √n ε)`: nothing of the solution could be trusted then. The estimate is Hager's (1984)
    idea with a fixed start: two steps of the power method on `A⁻¹A⁻ᵀ`. Where the solution is a step whose effect is
    measured anyway (`verify=False`), one step of it and ten times that limit do, and the residual is not computed: it
    is reported as rounding's, 0. Cost O(B n³), memory O(B n²). `QR` solves singular systems in the sense of least
    squares.
    """

    def _factorise(
        self, matrix: Tensor, b: Tensor, rtol: float | Tensor, verify: bool
    ) -> tuple[Tensor, Tensor, Tensor, Factors]:
        """Solution, status, relative residual and factors."""
        del rtol
        if not verify:
            step = _plainly(matrix, b)
            if step is not None:
                return step
        scaled, scaling, finite = equilibrate(matrix, b)
        factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
        solved, stretched = _solve_both(factors, pivots, b * scaling)
        first = two(stretched)
        size = torch.linalg.vector_norm(scaled, dim=(1, 2))
        limit = condition_limit(b, verify)
        again = torch.linalg.lu_solve(factors, pivots, (stretched / first[:, None])[:, :, None], adjoint=True)[:, :, 0]
        condition = torch.maximum(first, two(again)) * size
        regular = (info == 0) & (condition < limit)
        regular &= solved.isfinite().all(dim=-1)
        value = torch.where((regular & finite)[:, None], solved, 0.0)
        residual = two(b - torch.bmm(matrix, value[:, :, None])[:, :, 0]) / two(b)
        status = torch.where(regular, int(Status.CONVERGED), int(Status.SINGULAR))
        status = torch.where(finite, status, int(Status.NONFINITE))
        kept = Factors(factors, pivots, scaling, regular & finite)
        return value, status, torch.where(residual.isnan(), torch.inf, residual), kept


def _plainly(matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Factors] | None:
    """What `_factorise` finds of matrices that are regular and finite, all of them; None where one is not."""
    scaling = matrix.abs().amax(dim=-1).reciprocal_()
    scaled = matrix * scaling[:, :, None]
    factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
    solved, stretched = _solve_both(factors, pivots, b * scaling)
    # NaN and infinity, in what came in or of a row of zeros, come out again; they equal nothing.
    condition = two(stretched) * torch.linalg.vector_norm(scaled, dim=(1, 2)) + (solved.sum(dim=1) * 0)
    if bool(info.any()) or not torch.equal(condition, condition.clamp_max(condition_limit(b, False))):
        return None
    everyone = torch.ones(len(b), dtype=torch.bool, device=b.device)
    nothing = torch.zeros_like(info, dtype=torch.long)
    return solved, nothing, torch.zeros_like(condition), Factors(factors, pivots, scaling, everyone)


def _solve_both(factors: Tensor, pivots: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`A⁻¹ b`, and what `A⁻¹` makes of the signs; side by side in memory as LAPACK would have them."""
    both = torch.linalg.lu_solve(factors, pivots, torch.stack((b, kept_signs(b)), dim=1).mT)
    return both[:, :, 0], both[:, :, 1]
