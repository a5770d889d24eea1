"""The linear system of a quadratic program's KKT conditions: whole, condensed, and condensed with refinement."""

from __future__ import annotations

import torch
from torch import Tensor

from ._qp_program import Program, largest, mv


class Whole:
    """Newton's matrix for the KKT conditions, `[[Q, Gᵀ, Aᵀ], [λ∘G, −s, 0], [A, 0, 0]]`, middle rows over `max(λ, s)`.

    Twice the unknowns of `Q + Gᵀ(λ/s)G`, and none of its entries grows as slacks go to zero: that one loses half of the
    digits of the multipliers near the end.
    """

    def __init__(self, of: Program, s: Tensor, lam: Tensor) -> None:
        batch, n = of.p.shape
        m, k = of.h.shape[1], of.b.shape[1]
        self.of, self.parts = of, [n, m, k]
        self.scale = torch.maximum(lam, s)
        matrix = of.p.new_zeros(batch, n + m + k, n + m + k)
        matrix[:, :n, :n] = of.Q
        matrix[:, :n, n : n + m] = of.G.mT
        matrix[:, :n, n + m :] = of.A.mT
        matrix[:, n : n + m, :n] = of.G * (lam / self.scale).unsqueeze(-1)
        matrix[:, n + m :, :n] = of.A
        matrix.diagonal(dim1=1, dim2=2)[:, n : n + m] = -s / self.scale
        self.matrix = matrix
        # Where Q is singular, or rows of A depend on each other, this chooses one of many solutions.
        shift = 8 * torch.finfo(matrix.dtype).eps * torch.maximum(of.sizes.amax(1), largest(s / self.scale))
        shifted = matrix.clone()
        diagonal = shifted.diagonal(dim1=1, dim2=2)
        diagonal[:, :n] += shift[:, None]
        diagonal[:, n + m :] -= shift[:, None]
        self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(shifted)

    def solve(self, dual: Tensor, complementarity: Tensor, equality: Tensor) -> tuple[Tensor, ...]:
        """`(Δz, Δλ, Δν)` for the right-hand sides of the three groups of rows, refined once; and `GΔz`."""
        right = torch.cat([dual, complementarity / self.scale, equality], dim=1).unsqueeze(-1)
        found = torch.linalg.lu_solve(self.factors, self.pivots, right)
        rest = torch.baddbmm(right, self.matrix, found, alpha=-1)
        found = found + torch.linalg.lu_solve(self.factors, self.pivots, rest)
        z, multipliers, nu = found.squeeze(-1).split(self.parts, dim=1)
        return z, multipliers, nu, mv(self.of.G, z)


class Condensed:
    """The same system without `Δλ`, `[[Q + GᵀDG, Aᵀ], [A, 0]]` with `D = λ/s`: half the size, for far from the end.

    Without A it is positive definite, and Cholesky's factors take half of the time of LU's; those are kept for the
    samples in which rounding says that it is not.
    """

    def __init__(self, of: Program, s: Tensor, lam: Tensor) -> None:
        n, k = of.p.shape[1], of.b.shape[1]
        self.of, self.s, self.weight, self.n = of, s, lam / s, n
        matrix = torch.baddbmm(of.Q, of.G.mT, of.G * self.weight.unsqueeze(-1))
        # The largest entry of a positive semidefinite matrix is on its diagonal.
        largest_entry = torch.maximum(matrix.diagonal(dim1=1, dim2=2).amax(1), of.sizes[:, 2])
        shift = 8 * torch.finfo(matrix.dtype).eps * largest_entry.unsqueeze(-1)
        matrix.diagonal(dim1=1, dim2=2).add_(shift)
        if k:
            whole = matrix.new_zeros(matrix.shape[0], n + k, n + k)
            whole[:, :n, :n] = matrix
            whole[:, n:, :n] = of.A
            whole[:, :n, n:] = of.A.mT
            whole.diagonal(dim1=1, dim2=2)[:, n:] = -shift
            self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(whole)
        else:
            self.root, info = torch.linalg.cholesky_ex(matrix)
            self.indefinite = info.nonzero()[:, 0]
            if self.indefinite.numel():
                self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(matrix.index_select(0, self.indefinite))

    def solve(self, dual: Tensor, complementarity: Tensor, equality: Tensor) -> tuple[Tensor, ...]:
        """As that of `Whole`, not refined."""
        rest = complementarity / self.s
        found = self._solve(torch.cat([dual + mv(self.of.G.mT, rest), equality], dim=1).unsqueeze(-1)).squeeze(-1)
        z, nu = found[:, : self.n], found[:, self.n :]
        Gz = mv(self.of.G, z)
        return z, self.weight * Gz - rest, nu, Gz

    def _solve(self, right: Tensor) -> Tensor:
        if self.of.b.shape[1]:
            return torch.linalg.lu_solve(self.factors, self.pivots, right)
        half = torch.linalg.solve_triangular(self.root, right, upper=False)
        found = torch.linalg.solve_triangular(self.root.mT, half, upper=True)
        rows = self.indefinite
        if rows.numel():
            lu = torch.linalg.lu_solve(self.factors, self.pivots, right.index_select(0, rows))
            found = found.index_copy(0, rows, lu)
        return found


_REFINEMENTS = 2
"""After the first solve; each multiplies the error by about `√ε` times the condition of the program."""


def refined(of: Program, s: Tensor, lam: Tensor, right: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`Whole`'s system without its scale, solved where slacks may be zero: `(Δz, Δλ, Δν)` for `right`'s three groups.

    Condensed with slacks of `λ/w` at least, so that no entry of D is above w, and refined for the error that this makes
    (the method of multipliers). Rows that depend on each other do no harm if their right-hand sides agree. Whether that
    is the solution, `misfit` says. The factors are constants to autograd: the refinements bring the derivatives.
    """
    with torch.no_grad():
        one = of.p.new_ones(())
        curvature, slope = (torch.where(t > 0, t, one) for t in (of.sizes[:, 0], of.sizes[:, 1]))
        largest_ratio = torch.finfo(of.p.dtype).eps ** -0.5 * curvature / slope.square()
        raised = torch.maximum(s, lam / largest_ratio.unsqueeze(-1))
        factors = Condensed(of.detach(), torch.where(raised > 0, raised, one), lam)
    z, multipliers, nu, _ = factors.solve(*right)
    for _ in range(_REFINEMENTS):
        step = factors.solve(*misfit(of, s, lam, (z, multipliers, nu), right))
        z, multipliers, nu = z + step[0], multipliers + step[1], nu + step[2]
    return z, multipliers, nu


def misfit(
    of: Program, s: Tensor, lam: Tensor, found: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of the right-hand sides of `refined`."""
    z, multipliers, nu = found
    return (
        right[0] - mv(of.Q, z) - mv(of.G.mT, multipliers) - mv(of.A.mT, nu),
        right[1] - lam * mv(of.G, z) + s * multipliers,
        right[2] - mv(of.A, z),
    )
