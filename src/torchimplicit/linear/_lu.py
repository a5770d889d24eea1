"""Dense LU of a batch of matrices, in which a singular matrix is its own failure and nobody else's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._dense import DenseSolver, condition_limit, equilibrate
from ._inverse import Factors
from ._probe import signs


@dataclass(frozen=True)
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
        scaled, scaling, finite = equilibrate(matrix, b)
        factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
        both = torch.linalg.lu_solve(factors, pivots, torch.stack((b * scaling, signs(b)), dim=2))
        solved, stretched = both[:, :, 0], both[:, :, 1]
        first = two(stretched)
        size = torch.linalg.vector_norm(scaled, dim=(1, 2))
        limit = condition_limit(b, verify)
        if not verify:
            # NaN and infinity among the solutions of a regular matrix, or of a singular one, equal nothing.
            condition = first * size + (solved.sum(dim=1) * 0)
            if not bool(info.any()) and torch.equal(condition, condition.clamp_max(limit)):
                nothing = torch.zeros_like(info, dtype=torch.long)
                kept = Factors(factors, pivots, scaling, finite)
                return solved, nothing, torch.zeros_like(first), kept
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
