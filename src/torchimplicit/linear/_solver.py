"""The contract of linear operators and linear solvers on batches of systems."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .._norms import two
from .._options import Options
from .._solution import Status
from ._inverse import Factors


class LinearOperator(Protocol):
    """One square matrix per sample, known through its products."""

    def mv(self, p: Tensor) -> Tensor:
        """`A p`, `(B, n)` to `(B, n)`."""
        ...

    def neumann(self, p: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """`Σₖ (I − A)ᵏ p` over `k < terms`, and `(I − A)^terms p`, what is left of `p` then; `terms ≥ 1`."""
        ...

    def dense(self) -> Tensor:
        """`A`, `(B, n, n)`."""
        ...

    def select(self, samples: Tensor) -> "LinearOperator":
        """The operator of some samples alone, by their indices."""
        ...


_SAFE = 1e12
"""Entries up to this size, and not below its inverse, can be squared and summed in every dtype."""


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """What a linear solver found, per sample.

    The statuses: CONVERGED, solved to the tolerance asked for, or by a direct method as exactly as rounding allows.
    MAX_STEPS and STALLED, not solved, because the steps ran out or would gain no more (as where the system has no
    solution); the value is the best that was found, and may be used as a step. SINGULAR, the matrix was found to be
    one that the method cannot solve with, and NONFINITE, it or b is NaN or infinite: there is no value to use.

    Attributes:
        value: `(B, n)`, always finite; zero where `status` says SINGULAR or NONFINITE.
        status: `(B,)`, members of `Status`.
        residual: `(B,)`, relative residual `‖b − A x‖ / ‖b‖` of the value (0 where b = 0, infinite where NONFINITE).
        steps: `(B,)`, iterations taken (0 for a direct solver).
        solved: whether every sample is CONVERGED, known to the host.
        factors: those of the matrices that were factorised, where that was done by LU.
        rows: which samples these are, by their indices; None for all.
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    steps: Tensor
    solved: bool
    factors: Factors | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LinearSolver(Options, ABC):
    """Base class: solves `A x = b` for each sample of a batch, each with its own stopping and status."""

    def solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool = True) -> LinearSolution:
        """Solve until `‖b − A x‖₂ ≤ rtol·‖b‖₂` in each sample.

        Right-hand sides of extreme size are scaled first, so that no norm can overflow or underflow; one that is not
        finite makes its own sample NONFINITE.

        Args:
            operator: `A`, one matrix per sample.
            b: right-hand sides, `(B, n)`.
            rtol: one tolerance, or one per sample `(B,)`. A direct solver ignores it.
            verify: recompute the residual that the status is judged by; costs a product.
        """
        if b.numel() == 0:
            status = torch.zeros(b.shape[0], dtype=torch.long, device=b.device)
            return LinearSolution(torch.zeros_like(b), status, b.new_zeros(b.shape[0]), status.clone(), True)
        size = two(b)
        if torch.equal(size, size.clamp(1 / _SAFE, _SAFE)):
            return self._solve(operator, b, rtol, verify)
        size = torch.linalg.vector_norm(b, ord=torch.inf, dim=1)
        # A right-hand side of zero, such as a resting sample's, needs no scaling.
        least, largest = torch.stack(torch.aminmax(size.masked_fill(size == 0, 1.0))).tolist()
        if least > 1 / _SAFE and largest < _SAFE:
            return self._solve(operator, b, rtol, verify)
        if math.isfinite(largest):
            # A power of two, so that the scaling rounds nothing.
            scale = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 1)[:, None]
            found = self._solve(operator, b / scale, rtol, verify)
            return _without_overflow(replace(found, value=found.value * scale))
        finite = size.isfinite()
        found = self.solve(operator, torch.where(finite[:, None], b, 0.0), rtol, verify)
        status = torch.where(finite, found.status, int(Status.NONFINITE))
        residual = torch.where(finite, found.residual, torch.inf)
        return replace(found, status=status, residual=residual, solved=False)

    @abstractmethod
    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """`solve` for right-hand sides of moderate size, or zero."""


def _without_overflow(found: LinearSolution) -> LinearSolution:
    """A value beyond the range of the dtype is none."""
    finite = found.value.isfinite().all(dim=1)
    if bool(finite.all()):
        return found
    return LinearSolution(
        torch.where(finite[:, None], found.value, 0.0),
        torch.where(finite, found.status, int(Status.NONFINITE)),
        torch.where(finite, found.residual, torch.inf),
        found.steps,
        False,
    )
