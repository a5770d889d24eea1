"""Dense QR of a batch of matrices, and least squares by singular values for those that are singular."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._dense import DenseSolver, condition_limit, equilibrate
from ._probe import kept_signs


@dataclass(frozen=True, eq=False, repr=False)
class QR(DenseSolver):
    """`x` of least norm among those of least `‖b − A x‖`, for square matrices of any rank.

    A sample whose condition number, its rows scaled to unit size, is estimated at no more than `1/(10 √n ε)`
    (`LU`'s estimate and limit, ten times that for `verify=False`) is solved by Householder's QR (1958) and CONVERGED.
    For every other one the singular value decomposition of its unscaled matrix is taken (Golub & Kahan 1965), and
    singular values of no more than `n ε` times the largest count as zero. If it has a solution, that is if
    `‖b − A x‖ ≤ max(rtol, 10 n ε)·‖b‖`, the sample is CONVERGED, else STALLED: no step can lower that residual, but
    the value is the best there is, and is returned. So Newton's step through a singular Jacobian is the Gauss–Newton
    step of least norm, while an adjoint system without a solution still contributes zero. No sample is SINGULAR.

    Differences to LAPACK's `gelsd` (torch.linalg.lstsq, which has it on the CPU alone): only the samples that need it
    pay for singular values, and one that is not finite is NONFINITE and disturbs nobody.

    Cost O(B n³): about twice that of `LU`, and some fifteen times for the samples that are singular.
    """

    def _factorise(
        self, matrix: Tensor, b: Tensor, rtol: float | Tensor, verify: bool
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Solution, status and relative residual; no LU factors."""
        scaled, scaling, finite = equilibrate(matrix, b)
        value, condition = _householder(scaled, torch.stack((b * scaling, kept_signs(b)), dim=2))
        regular = (condition < condition_limit(b, verify)) & value.isfinite().all(dim=1)
        value = torch.where(regular[:, None], value, 0.0)
        left = (finite & ~regular).nonzero()[:, 0]
        if left.numel():
            value = value.index_copy(0, left, _least_squares(matrix.index_select(0, left), b.index_select(0, left)))
        residual = two(b - torch.bmm(matrix, value[:, :, None])[:, :, 0]) / two(b)
        rounding = 10 * b.shape[1] * torch.finfo(b.dtype).eps
        within = residual <= (rtol.clamp_min(rounding) if isinstance(rtol, Tensor) else max(rtol, rounding))
        status = torch.where(regular | within, int(Status.CONVERGED), int(Status.STALLED))
        finite &= value.isfinite().all(dim=1)
        status = torch.where(finite, status, int(Status.NONFINITE))
        value = torch.where(finite[:, None], value, 0.0)
        return value, status, torch.where(finite, residual, torch.inf), None


def _householder(matrix: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """`A⁻¹` of the first column of `both`, and an estimate of the condition number from the second."""
    reflectors, scales = torch.geqrf(matrix)
    triangle = reflectors.triu()
    both = torch.linalg.solve_triangular(triangle, torch.ormqr(reflectors, scales, both, transpose=True), upper=True)
    stretched = both[:, :, 1]
    first = two(stretched)
    # ‖A⁻ᵀ y‖ = ‖R⁻ᵀ y‖, as Q is orthogonal.
    again = torch.linalg.solve_triangular(triangle.mT, (stretched / first[:, None])[:, :, None], upper=False)
    return both[:, :, 0], torch.maximum(first, two(again[:, :, 0])) * two(matrix.flatten(1))


def _least_squares(matrix: Tensor, b: Tensor) -> Tensor:
    """`x` of least norm among those of least `‖b − A x‖`."""
    # A power of two, so that the scaling rounds nothing and no singular value overflows.
    exponent = torch.frexp(matrix.abs().amax(dim=(1, 2))).exponent - 1
    scale = torch.ldexp(torch.ones_like(b[:, 0]), exponent)[:, None]
    u, values, v = torch.linalg.svd(matrix / scale[:, :, None], full_matrices=False)
    smallest = b.shape[1] * torch.finfo(b.dtype).eps * values[:, :1]
    inverse = torch.where(values > smallest, values.reciprocal(), 0.0)
    coefficients = torch.bmm(b[:, None], u)[:, 0] * inverse
    return torch.bmm(coefficients[:, None], v)[:, 0] / scale
