"""Dense LU of a batch of matrices, in which a singular matrix is its own failure and nobody else's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._solver import LinearOperator, LinearSolution, LinearSolver


@dataclass(frozen=True)
class LU(LinearSolver):
    """Gaussian elimination with partial pivoting (LAPACK `getrf`/`getrs`) of every sample's matrix.

    A sample is SINGULAR when a pivot is zero or the pivots span more than the dtype resolves: the ratio of the
    smallest to the largest pivot, after scaling every row to unit size, is below `n·ε`. Cost O(B n³), memory O(B n²).
    """

    def solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool = True) -> LinearSolution:
        """Solve `A x = b`; `b` is `(B, n)`. `rtol` and `verify` do not matter."""
        del rtol, verify
        matrix = operator.dense()
        zeros = torch.zeros(b.shape[0], dtype=torch.long, device=b.device)
        needed = (b != 0).any(dim=1)
        if bool(needed.all()) and b.numel():
            value, status, residual = _solve(matrix, b)
            return LinearSolution(value, status, residual, zeros)
        # Rows with b = 0 have x = 0: resting samples of a Newton step cost no factorisation.
        value, status, residual = torch.zeros_like(b), zeros.clone(), b.new_zeros(b.shape[0])
        if bool(needed.any()):
            value[needed], status[needed], residual[needed] = _solve(matrix[needed], b[needed])
        return LinearSolution(value, status, residual, zeros)


def _solve(matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solution, status and relative residual; `(B, n, n)` and `(B, n)`, n and B positive."""
    n = matrix.shape[-1]
    rows = matrix.abs().amax(dim=-1)
    finite = rows.isfinite().all(dim=-1) & b.isfinite().all(dim=-1)
    # Row scaling: it leaves the solution alone and makes the pivots comparable whatever the units.
    scaling = torch.where((rows > 0) & finite[:, None], rows, 1.0).reciprocal()
    scaled = torch.where(finite[:, None, None], matrix * scaling[:, :, None], 0.0)
    factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
    u = factors.diagonal(dim1=-2, dim2=-1).abs()
    smallest, largest = u.amin(dim=-1), u.amax(dim=-1)
    regular = (info == 0) & (smallest > n * torch.finfo(b.dtype).eps * largest)
    solved = torch.linalg.lu_solve(factors, pivots, (b * scaling)[:, :, None])[:, :, 0]
    regular &= solved.isfinite().all(dim=-1)
    value = torch.where((regular & finite)[:, None], solved, 0.0)
    residual = two(b - torch.bmm(matrix, value[:, :, None])[:, :, 0]) / two(b)
    status = torch.where(regular, int(Status.CONVERGED), int(Status.SINGULAR))
    status = torch.where(finite, status, int(Status.NONFINITE))
    return value, status, torch.where(residual.isnan(), torch.inf, residual)
