"""Preconditioners: approximate inverses that a Krylov solver applies before each product."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._options import Options
from ._solver import LinearOperator, LinearSolver

Apply = Callable[[Tensor], Tensor]
"""`p ↦ M⁻¹ p`, `(B, n)` to `(B, n)`, sample by sample."""

Preconditioner = Callable[[Any], Apply]
"""Given the operator `A`, once per solve, makes `p ↦ M⁻¹ p` with `M ≈ A`."""


@dataclass(frozen=True, eq=False, repr=False)
class Jacobi(Options):
    """The diagonal of each sample's matrix as its preconditioner (Jacobi 1845), `M = diag(A)`.

    Worth it where the units of single equations differ by far. The diagonal is the operator's own `diagonal()` if it
    has one, else that of its `dense()`, which by automatic differentiation costs n products. A zero on the diagonal,
    or what is not finite, counts as 1.
    """

    def __call__(self, operator: Any) -> "Diagonal":
        """`p ↦ p / diag(A)`."""
        cheap = getattr(operator, "diagonal", None)
        diagonal = operator.dense().diagonal(dim1=-2, dim2=-1) if cheap is None else cheap()
        inverse = diagonal.reciprocal()
        return Diagonal(torch.where(inverse.isfinite() & (inverse != 0), inverse, 1.0))


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal:
    """`p ↦ p / d`, for some samples alone if asked."""

    inverse: Tensor

    def __call__(self, p: Tensor) -> Tensor:
        """`p / d`."""
        return p * self.inverse

    def select(self, samples: Tensor) -> "Diagonal":
        """That of some samples, by their indices."""
        return Diagonal(self.inverse.index_select(0, samples))


@dataclass(frozen=True, eq=False, repr=False)
class Checked:
    """`p ↦ M⁻¹ p` that answers for the shape of what it returns."""

    apply: Any

    @classmethod
    def build(cls, preconditioner: Preconditioner | None, operator: LinearOperator) -> "Checked | None":
        """What a solver's `preconditioner` option makes of an operator.

        Raises:
            TypeError: it is nothing that can be called.
        """
        if preconditioner is None:
            return None
        apply = preconditioner(operator)
        if not callable(apply):
            raise TypeError(
                f"preconditioner: given the operator it must return a callable p -> M⁻¹p, but it returned {apply!r}."
            )
        return cls(apply)

    @property
    def splits(self) -> bool:
        """Whether it can go on with some samples alone.

        It can if it has a method `select(samples)`, as operators have. Another one is a closure over the whole batch;
        to build it again for the samples left may cost more than they do, so they stay in the batch with all others.
        """
        return hasattr(self.apply, "select")

    def select(self, samples: Tensor) -> "Checked":
        """That of some samples, by their indices."""
        return Checked(self.apply.select(samples))

    def __call__(self, p: Tensor) -> Tensor:
        """`M⁻¹ p`.

        Raises:
            ValueError: what it returns has another shape or dtype.
        """
        z = self.apply(p)
        if z.shape != p.shape or z.dtype != p.dtype:
            raise ValueError(
                f"preconditioner: p is {tuple(p.shape)} of {p.dtype}, but M⁻¹p is {tuple(z.shape)} of {z.dtype}."
            )
        return z


def require_preconditioner(solver: LinearSolver, preconditioner: Preconditioner | None) -> None:
    """Validate a solver's `preconditioner` option."""
    # A class is callable too, but a class of options is a forgotten pair of brackets.
    forgotten = isinstance(preconditioner, type) and issubclass(preconditioner, Options)
    ok = preconditioner is None or (callable(preconditioner) and not forgotten)
    solver._require("preconditioner", ok, "None or a callable of the operator such as torchimplicit.Jacobi()")
