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
        n = matrix.shape[-1]
        zeros = torch.zeros(b.shape[0], dtype=torch.long, device=b.device)
        if b.numel() == 0:
            return LinearSolution(torch.zeros_like(b), zeros, b.new_zeros(b.shape[0]), zeros)
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
        error = b - torch.bmm(matrix, value[:, :, None])[:, :, 0]
        size = two(b)
        residual = torch.where(size > 0, two(error) / size, 0.0)
        status = torch.where(regular, int(Status.CONVERGED), int(Status.SINGULAR))
        status = torch.where(finite, status, int(Status.NONFINITE))
        return LinearSolution(value, status, torch.where(residual.isnan(), torch.inf, residual), zeros)
