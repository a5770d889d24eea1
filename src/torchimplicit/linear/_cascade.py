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


@dataclass(frozen=True)
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
        found = self._continue(operator, b, rtol, verify, found, _left(found))
        if not found.solved and b.shape[0] * b.shape[1] ** 2 * b.element_size() <= self.dense_limit:
            left = _left(found)
            again = LU().solve(operator, torch.where(left[:, None], b, 0.0), rtol, verify)
            found = _merge(left, again, found, found.steps)
        return found

    def _continue(
        self,
        operator: LinearOperator,
        b: Tensor,
        rtol: float | Tensor,
        verify: bool,
        found: LinearSolution,
        left: Tensor,
    ) -> LinearSolution:
        """GMRES on the residual equation of the samples left."""
        size = two(b)
        residual = torch.where(left[:, None], b - operator.mv(found.value), 0.0)
        norm = two(residual)
        # What Neumann made worse starts again from zero.
        worse = left & ~(norm < size)
        start = torch.where(worse[:, None], 0.0, found.value)
        residual = torch.where(worse[:, None], b, residual)
        norm = torch.where(worse, size, norm)
        needed = torch.where(left & (norm > 0), rtol * size / norm, 1.0)
        more = self.gmres.solve(operator, residual, needed, verify)
        relative = more.residual * norm / torch.where(size > 0, size, 1.0)
        usable = more.status < int(Status.DIVERGED)
        value = torch.where(usable[:, None], start + more.value, 0.0)
        relative = torch.where(usable, relative, torch.where(relative.isfinite(), 1.0, torch.inf))
        total = LinearSolution(value, more.status, relative, more.steps, more.solved)
        return _merge(left, total, found, found.steps + more.steps)


def _left(found: LinearSolution) -> Tensor:
    """Samples not solved that may yet be."""
    return found.status != int(Status.CONVERGED)


def _merge(chosen: Tensor, new: LinearSolution, old: LinearSolution, steps: Tensor) -> LinearSolution:
    """`new` for the chosen samples, which are all that were left of `old`."""
    return LinearSolution(
        torch.where(chosen[:, None], new.value, old.value),
        torch.where(chosen, new.status, old.status),
        torch.where(chosen, new.residual, old.residual),
        steps,
        new.solved,
    )
