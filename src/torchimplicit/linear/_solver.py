"""The contract of linear operators and linear solvers on batches of systems."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .._options import Options


class LinearOperator(Protocol):
    """One square matrix per sample, known through its products."""

    def mv(self, p: Tensor) -> Tensor:
        """`A p`, `(B, n)` to `(B, n)`."""
        ...

    def richardson(self, p: Tensor) -> Tensor:
        """`p − A p`, `(B, n)` to `(B, n)`: what a plain step leaves of a residual."""
        ...

    def dense(self) -> Tensor:
        """`A`, `(B, n, n)`."""
        ...

    def select(self, samples: Tensor) -> "LinearOperator | None":
        """The operator of some samples alone, by their indices, or None if that is not to be had."""
        ...


@dataclass(frozen=True)
class LinearSolution:
    """What a linear solver found, per sample.

    Attributes:
        value: `(B, n)`; zero where `status` says SINGULAR or NONFINITE.
        status: `(B,)`, members of `Status`.
        residual: `(B,)`, relative residual `‖b − A x‖ / ‖b‖` (0 where b = 0).
        steps: `(B,)`, iterations taken (0 for a direct solver).
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    steps: Tensor


@dataclass(frozen=True)
class LinearSolver(Options, ABC):
    """Base class: solves `A x = b` for each sample of a batch, each with its own stopping and status."""

    @abstractmethod
    def solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool = True) -> LinearSolution:
        """Solve until `‖b − A x‖₂ ≤ rtol·‖b‖₂` in each sample.

        Args:
            operator: `A`, one matrix per sample.
            b: right-hand sides, `(B, n)`.
            rtol: one tolerance, or one per sample `(B,)`. A direct solver ignores it.
            verify: recompute the residual that the status is judged by; costs a product.
        """
