"""The default linear solver: the cheapest method that works, for each sample."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._gmres import GMRES
from ._lu import LU
from ._neumann import Neumann
from ._solver import LinearOperator, LinearSolution, LinearSolver


@dataclass(frozen=True, eq=False, repr=False)
class Cascade(LinearSolver):
    """`Neumann` while it contracts well, then `GMRES` for the samples it leaves, then `LU` for those that GMRES leaves.

    Up to `small` unknowns it is `LU` at once.

    Args:
        small: unknowns up to which the dense solve is cheaper than any iteration.
        dense_limit: bytes of `(B, n, n)` up to which LU may be used as the last resort.
        neumann: the first stage.
        gmres: the second stage.
    """

    small: int = 16
    dense_limit: int = 2**30
    neumann: Neumann = field(default_factory=lambda: Neumann(slowest=0.93))
    gmres: GMRES = field(default_factory=GMRES)

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("small", 0)
        self._require_count("dense_limit", 0)
        self._require("neumann", isinstance(self.neumann, Neumann), "torchimplicit.Neumann(...)")
        self._require("gmres", isinstance(self.gmres, GMRES), "torchimplicit.GMRES(...)")

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        if b.shape[1] <= self.small:
            return LU().solve(operator, b, rtol, verify)
        found = self.neumann._solve(operator, b, rtol, verify)
        if found.solved:
            return found
        left, operator, b, rtol = _left(found, operator, b, rtol)
        more = self._continue(operator, b, rtol, verify, found.value.index_select(0, left))
        found = _merge(found, left, more)
        if more.solved:
            return found
        lost, operator, b, rtol = _left(more, operator, b, rtol)
        if b.shape[0] * b.shape[1] ** 2 * b.element_size() <= self.dense_limit:
            found = _merge(found, left.index_select(0, lost), LU().solve(operator, b, rtol, verify))
        return found

    def _continue(
        self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool, start: Tensor
    ) -> LinearSolution:
        """GMRES on the residual equation of samples, from what Neumann left."""
        size, residual = two(b), b - operator.mv(start)
        norm = two(residual)
        needed = torch.where(norm > 0, rtol * size / norm, 1.0)
        more = self.gmres.solve(operator, residual, needed, verify)
        relative = more.residual * norm / torch.where(size > 0, size, 1.0)
        usable = more.status < int(Status.DIVERGED)
        value = torch.where(usable[:, None], start + more.value, 0.0)
        relative = torch.where(usable, relative, torch.where(relative.isfinite(), 1.0, torch.inf))
        return LinearSolution(value, more.status, relative, more.steps, more.solved)


def _left(
    found: LinearSolution, operator: LinearOperator, b: Tensor, rtol: float | Tensor
) -> tuple[Tensor, LinearOperator, Tensor, float | Tensor]:
    """The samples not solved, by their indices, and the systems of these alone."""
    left = (found.status != int(Status.CONVERGED)).nonzero()[:, 0]
    if left.numel() == b.shape[0]:
        return left, operator, b, rtol
    rtol = rtol.index_select(0, left) if isinstance(rtol, Tensor) and rtol.ndim else rtol
    return left, operator.select(left), b.index_select(0, left), rtol


def _merge(old: LinearSolution, samples: Tensor, new: LinearSolution) -> LinearSolution:
    """`new` for some samples, which are all that were left of `old`; their steps add up."""
    return LinearSolution(
        old.value.index_copy(0, samples, new.value),
        old.status.index_copy(0, samples, new.status),
        old.residual.index_copy(0, samples, new.residual),
        old.steps.index_add(0, samples, new.steps),
        new.solved,
    )
