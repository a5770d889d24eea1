"""What the dense solvers share: whose matrices are formed, how they are scaled, and what counts as singular."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ._inverse import Factors
from ._solver import LinearOperator, LinearSolution, LinearSolver


@dataclass(frozen=True, eq=False, repr=False)
class DenseSolver(LinearSolver):
    """Base class: solves by the matrices themselves, those of the samples whose right-hand side is not zero."""

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`."""
        zeros = torch.zeros(b.shape[0], dtype=torch.long, device=b.device)
        needed = (b != 0).any(dim=1)
        if bool(needed.all()):
            value, status, residual, factors = self._factorise(operator.dense(), b, rtol, verify)
            return LinearSolution(value, status, residual, zeros, not bool(status.any()), factors)
        # Rows with b = 0 have x = 0: resting samples of a Newton step cost no factorisation.
        left = needed.nonzero()[:, 0]
        if not left.numel():
            return LinearSolution(torch.zeros_like(b), zeros, b.new_zeros(b.shape[0]), zeros.clone(), True)
        rtol = rtol.index_select(0, left) if isinstance(rtol, Tensor) and rtol.ndim else rtol
        *found, factors = self._factorise(operator.select(left).dense(), b.index_select(0, left), rtol, verify)
        value, status, residual = (
            whole.index_copy(0, left, part)
            for whole, part in zip((torch.zeros_like(b), zeros, b.new_zeros(b.shape[0])), found, strict=True)
        )
        return LinearSolution(value, status, residual, zeros, not bool(status.any()), factors, left)

    @abstractmethod
    def _factorise(
        self, matrix: Tensor, b: Tensor, rtol: float | Tensor, verify: bool
    ) -> tuple[Tensor, Tensor, Tensor, Factors | None]:
        """Solution, status, relative residual, and the LU factors if there are any.

        `(B, n, n)` and `(B, n)`, n and B positive, no row of b zero.
        """


def equilibrate(matrix: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices with rows of unit size, the factors that did it `(B, n)`, and which samples are finite `(B,)`.

    Row scaling leaves the solution of a regular system alone and makes pivots comparable whatever the units. What is
    not finite becomes a matrix of zeros.
    """
    rows = matrix.abs().amax(dim=-1)
    size = torch.linalg.vector_norm(b, dim=1, keepdim=True)
    # Their sum is finite only where all that went into it is.
    if torch.equal(rows, (rows + (size - size)).clamp(torch.finfo(rows.dtype).tiny, torch.finfo(rows.dtype).max)):
        scaling = rows.reciprocal()
        return matrix * scaling[:, :, None], scaling, torch.ones(len(b), dtype=torch.bool, device=b.device)
    finite = rows.isfinite().all(dim=-1) & b.isfinite().all(dim=-1)
    scaling = torch.where((rows > 0) & finite[:, None], rows, 1.0).reciprocal()
    return torch.where(finite[:, None, None], matrix * scaling[:, :, None], 0.0), scaling, finite


def condition_limit(b: Tensor, verify: bool) -> float:
    """The condition number up to which a matrix counts as regular, `1/(10 √n ε)`; more for a step to be measured."""
    return 1 / ((10.0 if verify else 1.0) * b.shape[1] ** 0.5 * torch.finfo(b.dtype).eps)
