"""What a point of a quadratic program proves: that it is the solution, or that there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from ._qp_program import Point, Program, largest, mv


class Measures:
    """Residuals at a point, and how large they are beside what they are differences of."""

    def __init__(self, of: Program, at: Point) -> None:
        self.Qz, self.Gz, self.Az = mv(of.Q, at.z), mv(of.G, at.z), mv(of.A, at.z)
        self.pulled = mv(of.G.mT, at.lam) + mv(of.A.mT, at.nu)
        self.dual = self.Qz + of.p + self.pulled
        self.inequality, self.equality = self.Gz + at.s - of.h, self.Az - of.b
        self.gap = (at.s * at.lam).sum(1)
        self.primal_size = largest(self.Gz, at.s, of.h, self.Az, of.b)
        self.dual_size = largest(self.Qz, of.p, self.pulled)
        self.linear, curved = (of.p * at.z).sum(1), (self.Qz * at.z).sum(1)
        self.supply = (of.h * at.lam).sum(1) + (of.b * at.nu).sum(1)
        self.gap_size = torch.stack([self.linear, curved, self.supply]).abs().amax(0)

    def merit(self, first: Tensor) -> Tensor:
        """The largest of the relative residuals: primal, dual and gap, `(B,)`; `first` are those where it began."""
        size = torch.stack([self.primal_size, self.dual_size, self.gap_size], dim=1).maximum(first)
        return (self.sizes() / torch.where(size > 0, size, 1.0)).amax(1)

    def sizes(self) -> Tensor:
        """What the residuals are at this point, `(B, 3)`: none need be smaller than rounding beside where it began."""
        return torch.stack([largest(self.inequality, self.equality), largest(self.dual), self.gap], dim=1)


def certificates(of: Program, at: Measures) -> tuple[Tensor, Tensor]:
    """Whether there is no feasible point, and whether there is no dual feasible one, `(B,)` bool each.

    Farkas: `λ ≥ 0` and `hᵀλ + bᵀν < 0` leave no feasible z with `‖z‖₁ < |hᵀλ + bᵀν| / ‖Gᵀλ + Aᵀν‖_∞`; where that is
    `1/√ε` times the natural length `max|h, b| / max|G, A|` there is none for all that can be computed. And in the same
    way a direction z with `pᵀz < 0` that `Qz = 0`, `Gz ≤ 0`, `Az = 0` hold for, beside the multipliers' natural size.
    """
    far = torch.finfo(of.p.dtype).eps ** -0.5
    curvature, matrix = of.sizes[:, 0], of.sizes[:, 1:].amax(1)
    slope = largest(of.p)
    infeasible = (at.supply < 0) & (-at.supply * matrix >= far * largest(of.h, of.b) * largest(at.pulled))
    rising = torch.maximum(largest(at.Gz.clamp(min=0.0)), largest(at.Az)) * slope
    bend = largest(at.Qz) * slope / torch.where(curvature > 0, curvature, 1.0)
    rise = rising / torch.where(matrix > 0, matrix, 1.0)
    unbounded = (at.linear < 0) & (-at.linear >= far * torch.maximum(rise, bend))
    return infeasible, unbounded
