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

    A sample is SINGULAR when a pivot is zero or the condition number of the matrix, its rows scaled to unit size, is
    estimated at more than `1/(10 √n ε)` (ten times that where the solution is a step whose effect is measured anyway:
    `verify=False`): nothing of the solution could be trusted then. The estimate is Hager's (1984)
    idea with a fixed start: two steps of the power method on `A⁻¹A⁻ᵀ`. Cost O(B n³), memory O(B n²).
    """

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`; `b` is `(B, n)`. `rtol` does not matter."""
        del rtol
        trust = 10.0 if verify else 1.0
        matrix = operator.dense()
        zeros = torch.zeros(b.shape[0], dtype=torch.long, device=b.device)
        needed = (b != 0).any(dim=1)
        if bool(needed.all()) and b.numel():
            value, status, residual = _solve(matrix, b, trust)
            return LinearSolution(value, status, residual, zeros, not bool(status.any()))
        # Rows with b = 0 have x = 0: resting samples of a Newton step cost no factorisation.
        value, status, residual = torch.zeros_like(b), zeros.clone(), b.new_zeros(b.shape[0])
        if bool(needed.any()):
            value[needed], status[needed], residual[needed] = _solve(matrix[needed], b[needed], trust)
        return LinearSolution(value, status, residual, zeros, not bool(status.any()))


def _solve(matrix: Tensor, b: Tensor, trust: float) -> tuple[Tensor, Tensor, Tensor]:
    """Solution, status and relative residual; `(B, n, n)` and `(B, n)`, n and B positive."""
    n = matrix.shape[-1]
    rows = matrix.abs().amax(dim=-1)
    finite = rows.isfinite().all(dim=-1) & b.isfinite().all(dim=-1)
    # Row scaling: it leaves the solution alone and makes the pivots comparable whatever the units.
    scaling = torch.where((rows > 0) & finite[:, None], rows, 1.0).reciprocal()
    scaled = torch.where(finite[:, None, None], matrix * scaling[:, :, None], 0.0)
    factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
    # Signs without a pattern, the same for every matrix: a start that no singular vector is likely to be orthogonal to.
    signs = torch.sin(torch.arange(1, n + 1, dtype=b.dtype, device=b.device) ** 2).sign().expand_as(b) / n**0.5
    both = torch.linalg.lu_solve(factors, pivots, torch.stack((b * scaling, signs), dim=2))
    solved, stretched = both[:, :, 0], both[:, :, 1]
    first = two(stretched)
    again = torch.linalg.lu_solve(factors, pivots, (stretched / first[:, None])[:, :, None], adjoint=True)[:, :, 0]
    inverse_norm = torch.maximum(first, two(again))
    condition = inverse_norm * two(scaled.flatten(1))
    regular = (info == 0) & (condition * (trust * n**0.5 * torch.finfo(b.dtype).eps) < 1)
    regular &= solved.isfinite().all(dim=-1)
    value = torch.where((regular & finite)[:, None], solved, 0.0)
    residual = two(b - torch.bmm(matrix, value[:, :, None])[:, :, 0]) / two(b)
    status = torch.where(regular, int(Status.CONVERGED), int(Status.SINGULAR))
    status = torch.where(finite, status, int(Status.NONFINITE))
    return value, status, torch.where(residual.isnan(), torch.inf, residual)
