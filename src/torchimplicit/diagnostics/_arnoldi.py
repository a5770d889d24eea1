"""The dominant eigenvalue of a batch of matrices known by their products: Arnoldi's method with thick restarts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two

_LOOK_EVERY = 5
"""Products between two looks at the Ritz pairs, whose eigenproblems cost as much as several cheap products."""


@dataclass(frozen=True)
class Dominant:
    """Per sample, `(B,)`.

    Attributes:
        value: the Ritz value of the largest modulus, complex.
        residual: `‖M y − θ y‖` of its Ritz vector of norm 1.
        scale: the largest `‖M v‖` that was seen of vectors v of norm 1.
        converged: whether the residual is within the tolerance.
        products: with M, of the whole batch.
    """

    value: Tensor
    residual: Tensor
    scale: Tensor
    converged: Tensor
    products: int


def dominant_eigenvalue(
    multiply: Callable[[Tensor], Tensor], start: Tensor, rtol: float, basis: int, max_products: int
) -> Dominant:
    """The eigenvalue of the largest modulus of each sample's real matrix M.

    Arnoldi 1951, restarted with a fifth of the basis: the Ritz vectors of the largest Ritz values (Stewart 2001, whose
    Krylov–Schur method this is but for three things. The products are kept beside the basis, so that no relation
    between the two need hold exactly; complex pairs are kept by their real and imaginary parts, in real arithmetic; a
    pair that the cut divides leaves a direction that is merely not the best.)

    Args:
        multiply: `M p`, `(B, n)` to `(B, n)`.
        start: `(B, n)`, not zero.
        rtol: a pair has converged when its residual is below `rtol·|θ|`, or rounding beside `‖M‖`.
        basis: vectors kept at most.
        max_products: at most.
    """
    batch, n = start.shape
    keep, basis = max(basis // 5, 2), min(basis, n)
    epsilon = torch.finfo(start.dtype).eps
    V = start.new_zeros(batch, basis, n)  # rows: an orthonormal basis of each sample, zero where that is complete
    W = torch.zeros_like(V)  # its products
    v = start / two(start)[:, None]
    size = products = 0
    scale = start.new_zeros(batch)
    while True:
        V[:, size] = v
        W[:, size] = multiply(v)
        size, products = size + 1, products + 1
        scale = torch.maximum(scale, two(W[:, size - 1]))
        v, alive = _orthonormal(V[:, :size], W[:, size - 1], epsilon)
        full = size == basis
        last = products == max_products or not bool(alive.any())
        if not (full or last or products % _LOOK_EVERY == 0):
            continue
        H = V[:, :size] @ W[:, :size].mT  # Hᵢⱼ = vᵢ·M vⱼ
        values, vectors = torch.linalg.eig(H)
        order = values.abs().argsort(dim=1, descending=True, stable=True)
        values = values.gather(1, order)
        vectors = vectors.gather(2, order[:, None].expand(vectors.shape))
        value, y = values[:, 0], vectors[:, None, :, 0]
        image, vector = (torch.complex(y.real @ X[:, :size], y.imag @ X[:, :size]) for X in (W, V))
        residual = two(torch.view_as_real(image - value[:, None, None] * vector).flatten(1))
        converged = residual <= rtol * value.abs() + 10 * epsilon * scale
        if last or bool(converged.all()):
            return Dominant(value, residual, scale, converged, products)
        if full and n > basis:
            # The second of a conjugate pair, which LAPACK puts next to the first, stands for the imaginary part.
            parts = torch.where((values.imag < 0)[:, None], vectors.imag, vectors.real)[:, :, :keep]
            Q = torch.linalg.qr(parts).Q.mT
            V[:, :keep], W[:, :keep] = Q @ V, Q @ W
            V[:, keep:], W[:, keep:] = 0.0, 0.0
            size = keep


def _orthonormal(V: Tensor, w: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The part of w, `(B, n)`, orthogonal to the rows of V, with norm 1 or 0; and where there is any, `(B,)`."""
    norm = two(w)
    for _ in range(2):  # "twice is enough" (Giraud, Langou & Rozložník 2005)
        w = w - ((V @ w[:, :, None]).mT @ V)[:, 0]
    left = two(w)
    alive = left > 10 * epsilon * norm
    return torch.where(alive[:, None], w / torch.where(alive, left, 1.0)[:, None], 0.0), alive
