"""The Jacobian of `tanh(W z + x)` in closed form, and its systems by series."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

_FEWEST = 4
"""Products below which the series is as good."""


@dataclass(frozen=True, eq=False, repr=False)
class TanhJacobian:
    """`J = D W` with `D = diag(1 − tanh²)`, one per sample; products in the batch's own shape `(B, n)`."""

    slope: Tensor
    weight: Tensor
    z: Tensor

    reads: ClassVar[tuple[str, ...]] = ("linear.weight",)

    def mv(self, p: Tensor) -> Tensor:
        """`D W p`."""
        if p.ndim == 2:
            return torch.mm(p, self.weight.t()).mul_(self.slope)
        return self.slope * functional.linear(p, self.weight)

    def rmv(self, u: Tensor) -> Tensor:
        """`Wᵀ D u`."""
        scaled = self.slope * u
        return torch.mm(scaled, self.weight) if u.ndim == 2 else torch.matmul(scaled, self.weight)

    def neumann(self, p: Tensor, terms: int, transposed: bool) -> tuple[Tensor, Tensor]:
        """`uₜ = Σₖ Jᵏ p` over `k < terms`, and `J^terms p = uₜ₊₁ − uₜ`, by `uₖ₊₁ = p + J uₖ`; `Jᵀ` if transposed."""
        if not transposed:
            weight, u = self.weight.t(), p
            for _ in range(terms - 1):
                u = torch.addcmul(p, self.slope, torch.matmul(u, weight))
            return u, torch.addcmul(p, self.slope, torch.matmul(u, weight)).sub_(u)
        # With y = D u one operation less: yₖ₊₁ = D p + D Wᵀ yₖ, uₖ₊₁ = p + Wᵀ yₖ.
        u, first = p, self.slope * p
        if terms > 1:
            y = first
            for _ in range(terms - 2):
                y = torch.addcmul(first, self.slope, torch.matmul(y, self.weight))
            u = torch.matmul(y, self.weight).add_(p)
        return u, torch.matmul(self.slope * u, self.weight).add_(p).sub_(u)

    def select(self, samples: Tensor) -> "TanhJacobian":
        """The Jacobian of some samples, by their indices."""
        return TanhJacobian(self.slope.index_select(0, samples), self.weight, self.z)

    def pullback(self, u: Tensor) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        """`D u` for x, and `Σ D u zᵀ` over the samples for W."""
        scaled = self.slope * u
        n = self.weight.shape[0]
        return (scaled,), {"linear.weight": torch.mm(scaled.reshape(-1, n).t(), self.z.reshape(-1, n))}

    def dense(self) -> Tensor:
        """`(B, n, n)`."""
        return self.slope[..., :, None] * self.weight


@dataclass(frozen=True, eq=False, repr=False)
class ShiftedTanhJacobian(TanhJacobian):
    """The same, whose systems are solved by the steps of `ShiftedTanh`: with the slopes less a constant.

    Attributes:
        shift: c.
        product: `P = W (I − c W)⁻¹`, transposed.
    """

    shift: float
    product: Tensor

    def approach(self, p: Tensor, terms: int, transposed: bool) -> tuple[Tensor, Tensor]:
        """`u ≈ (I − J)⁻¹ p` by `terms` products, and `p − (I − J) u`; `Jᵀ` for `J` if transposed."""
        if p.ndim != 2 or terms < _FEWEST:
            return self.neumann(p, terms, transposed)
        rest = self.slope - self.shift
        if transposed:
            # u = p + Wᵀ D u  ⟺  u = q + Pᵀ (D − c) u  with  q = (I − c Wᵀ)⁻¹ p = p + c Pᵀ p.
            product = self.product.t()
            q = torch.addmm(p, p, product, alpha=self.shift)
            first = y = rest * q
            for _ in range(terms - 3):
                y = torch.addcmul(first, rest, torch.mm(y, product))
            u = torch.addmm(q, y, product)
            return u, torch.addmm(p, self.slope * u, self.weight).sub_(u)
        # With w = W u: w = P (p + (D − c) w), and u = p + D w.
        w = torch.mm(p, self.product)
        for _ in range(terms - 2):
            w = torch.mm(torch.addcmul(p, rest, w), self.product)
        u = torch.addcmul(p, self.slope, w)
        return u, torch.addcmul(p, self.slope, torch.mm(u, self.weight.t())).sub_(u)

    def select(self, samples: Tensor) -> "ShiftedTanhJacobian":
        """The Jacobian of some samples, by their indices."""
        slope = self.slope.index_select(0, samples)
        return ShiftedTanhJacobian(slope, self.weight, self.z, self.shift, self.product)
