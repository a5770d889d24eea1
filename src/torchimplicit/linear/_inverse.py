"""Approximate inverses of `A` that a solver has at hand when it is done, for the adjoint system to use."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Inverse(Protocol):
    """`H ≈ A⁻¹` of each sample."""

    def apply(self, p: Tensor, transposed: bool) -> Tensor:
        """`H p`, or `Hᵀ p`, `(B, n)` to `(B, n)`."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class LowRank:
    """`H = σ I + Lᵀ R`: what secant pairs make of a multiple of the identity.

    Attributes:
        scale: σ, `(B,)`.
        left: L, `(B, k, n)`.
        right: R, `(B, k, n)`.
    """

    scale: Tensor
    left: Tensor
    right: Tensor

    def apply(self, p: Tensor, transposed: bool) -> Tensor:
        """`H p`, or `Hᵀ p`."""
        left, right = (self.right, self.left) if transposed else (self.left, self.right)
        weights = torch.bmm(p[:, None], right.transpose(1, 2))
        return torch.baddbmm((self.scale[:, None] * p)[:, None], weights, left)[:, 0]


@dataclass(eq=False, repr=False)
class Factors:
    """The LU factors of each sample's latest matrix, its rows scaled; the identity where there was none.

    Attributes:
        factors: `(B, n, n)`.
        pivots: `(B, n)`.
        scaling: of the rows, `(B, n)`.
        known: `(B,)` bool.
    """

    factors: Tensor
    pivots: Tensor
    scaling: Tensor
    known: Tensor

    @staticmethod
    def none(p: Tensor) -> "Factors":
        """Of nobody, for states `(B, n)`."""
        batch, n = p.shape
        pivots = torch.ones(batch, n, dtype=torch.int32, device=p.device)
        nobody = torch.zeros(batch, dtype=torch.bool, device=p.device)
        return Factors(p.new_zeros(batch, n, n), pivots, torch.ones_like(p), nobody)

    def update(self, rows: Tensor | None, found: "Factors") -> "Factors":
        """With newer ones of all samples, or of those with the indices `rows`."""
        if rows is None:
            return found
        for name in ("factors", "pivots", "scaling", "known"):
            getattr(self, name).index_copy_(0, rows, getattr(found, name))
        return self

    def apply(self, p: Tensor, transposed: bool) -> Tensor:
        """`A⁻¹ p`, or `A⁻ᵀ p`, of that matrix; p where there is none, or where it is singular."""
        right = (p if transposed else p * self.scaling)[:, :, None]
        solved = torch.linalg.lu_solve(self.factors, self.pivots, right, adjoint=transposed)[:, :, 0]
        solved = solved * self.scaling if transposed else solved
        return torch.where((self.known & solved.isfinite().all(dim=1))[:, None], solved, p)
