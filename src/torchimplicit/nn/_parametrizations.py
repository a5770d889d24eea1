"""Parametrisations of weights: whatever the free parameters are, the weight satisfies the layer's condition."""

import torch
from torch import Tensor, nn


class MonotoneMatrix(nn.Module):
    """`W = (1 − m) I − AᵀA + B − Bᵀ`: all matrices with `I − W ⪰ m I`, and no others (Winston & Kolter 2020).

    Args:
        margin: m > 0.
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, A: Tensor, B: Tensor) -> Tensor:
        """`(n, n)`, `(n, n)` to `(n, n)`."""
        identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
        return (1.0 - self.margin) * identity - A.mT @ A + B - B.mT

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The A and B of a weight, so that one can be assigned.

        Raises:
            ValueError: it is not monotone by the margin.
        """
        identity = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
        gram = (1.0 - self.margin) * identity - 0.5 * (weight + weight.mT)
        values, vectors = torch.linalg.eigh(gram)
        if float(values.min()) < -64 * torch.finfo(weight.dtype).eps * float(1 + values.abs().max()):
            raise ValueError(
                f"MonotoneMatrix: I − W of this weight is monotone by {self.margin + float(values.min()):.3g} only, "
                f"not by the margin {self.margin}; give another weight or a smaller margin."
            )
        return values.clamp_min(0.0).sqrt()[:, None] * vectors.mT, 0.25 * (weight - weight.mT)


class MonotoneKernel(nn.Module):
    """The same for convolutions with periodic padding: A and B are kernels, W is one of twice their reach.

    The free parameter is `(2, C, C, k, k)`, A and B one after the other, and the weight `(C, C, 2k − 1, 2k − 1)`.
    It cannot be assigned: to find an A for a given weight is a problem of its own.

    Args:
        margin: m > 0.
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, pair: Tensor) -> Tensor:
        """`(2, C, C, k, k)` to `(C, C, 2k − 1, 2k − 1)`."""
        A, B = pair
        return identity_kernel(A, 1.0 - self.margin) - gram_kernel(A, A) + _wide(skew_kernel(B), A.shape[-1] // 2)


class MonotoneTierKernel(nn.Module):
    """The kernel of `(1 − m) I − AᵀA − KᵀK + B − Bᵀ`, with room for a coupling through K to the next tier.

    Args:
        margin: m > 0.
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, A: Tensor, B: Tensor, K: Tensor | None) -> Tensor:
        """`(C, C, k, k)`, `(C, C, k, k)`, `(C', C, k, k)` or None to `(C, C, 2k − 1, 2k − 1)`."""
        kernel = identity_kernel(A, 1.0 - self.margin) - gram_kernel(A, A) + _wide(skew_kernel(B), A.shape[-1] // 2)
        return kernel if K is None else kernel - gram_kernel(K, K)


def gram_kernel(A: Tensor, B: Tensor) -> Tensor:
    """The kernel `(in, in', 2k − 1, 2k − 1)` of `Aᵀ B`, for correlations `(out, in, k, k)` and `(out, in', k, k)`."""
    reach = A.shape[-1] - 1
    return nn.functional.conv2d(B.transpose(0, 1), A.transpose(0, 1), padding=reach).transpose(0, 1)


def skew_kernel(B: Tensor) -> Tensor:
    """The kernel of `B − Bᵀ`."""
    return B - B.transpose(0, 1).flip(2, 3)


def identity_kernel(A: Tensor, factor: float) -> Tensor:
    """`factor · I` as a kernel of the size of `AᵀA`."""
    size = 2 * A.shape[-1] - 1
    kernel = A.new_zeros(A.shape[1], A.shape[1], size, size)
    kernel[:, :, size // 2, size // 2] = factor * torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    return kernel


def _wide(kernel: Tensor, by: int) -> Tensor:
    return nn.functional.pad(kernel, (by, by, by, by))


def conv_norm_bound(kernel: Tensor) -> Tensor:
    """An upper bound of the two-norm of a convolution `(out, in, k, l)`, for images of every size.

    The smaller of two, differentiable both: the sum over the taps of the norms of their matrices; and `√(k l)` times
    the least norm of the four matrices into which the kernel can be unfolded (Singla & Feizi, ICLR 2021). They
    hold for circular padding, and for zeros and strides, which only leave parts of a larger circular one out.
    """
    out, inn, k, l = kernel.shape  # noqa: E741
    taps = torch.linalg.matrix_norm(kernel.permute(2, 3, 0, 1), 2).sum()
    unfolded = (
        kernel.permute(0, 2, 1, 3).reshape(out * k, inn * l),
        kernel.permute(0, 3, 1, 2).reshape(out * l, inn * k),
        kernel.reshape(out, -1),
        kernel.transpose(0, 1).reshape(inn, -1),
    )
    norms = torch.stack([torch.linalg.matrix_norm(matrix, 2) for matrix in unfolded])
    return torch.minimum(taps, (k * l) ** 0.5 * norms.min())


class SpectralBall(nn.Module):
    """`W = V min(1, κ/‖V‖₂)`: as V is where its norm allows it, scaled down to `‖W‖₂ = κ` elsewhere.

    The norm is computed exactly, by a singular value decomposition. (A power iteration, as in `spectral_norm`, is below
    the norm and behind the training.)

    Args:
        radius: κ.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, V: Tensor) -> Tensor:
        """`(n, m)` to `(n, m)`."""
        return _within(V, torch.linalg.matrix_norm(V, 2), self.radius)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight, which is scaled where it must be."""
        return weight


class SpectralKernel(SpectralBall):
    """The same for the kernel of a convolution `(out, in, k, l)` and its `conv_norm_bound`."""

    def forward(self, V: Tensor) -> Tensor:
        """`(out, in, k, l)` to `(out, in, k, l)`."""
        return _within(V, conv_norm_bound(V), self.radius)


def _within(V: Tensor, norm: Tensor, radius: float) -> Tensor:
    # What is below the radius by rounding only is above it after rounding.
    least = torch.finfo(V.dtype).tiny
    return torch.where(norm > radius, V * (radius * (1 - 8 * torch.finfo(V.dtype).eps) / norm.clamp_min(least)), V)


class InfinityBall(nn.Module):
    """The nearest weight with `‖W‖_∞ ≤ κ`: each row is projected onto the ℓ1-ball (Duchi et al. 2008), differentiably.

    A row v with `‖v‖₁ > κ` becomes `sign(v) max(|v| − θ, 0)` with the θ that makes its sum κ; other rows stay. A row is
    all that reaches one output: of a kernel `(out, in, k, l)`, `in·k·l` weights.

    Args:
        radius: κ.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, V: Tensor) -> Tensor:
        """`(n, ...)` to `(n, ...)`."""
        size = V.flatten(1).abs()
        radius = self.radius * (1 - 8 * torch.finfo(V.dtype).eps)
        ordered = size.sort(dim=1, descending=True).values
        excess = ordered.cumsum(1) - radius
        count = torch.arange(1, size.shape[1] + 1, dtype=V.dtype, device=V.device)
        last = (ordered * count > excess).sum(1, keepdim=True) - 1  # of the entries that stay
        threshold = excess.gather(1, last) / (last + 1)
        shrunk = (size - threshold).clamp_min(0.0).reshape(V.shape) * V.sign()
        outside = (size.sum(1) > self.radius).reshape(-1, *(1 for _ in V.shape[1:]))
        return torch.where(outside, shrunk, V)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight, which is projected where it must be."""
        return weight


class NonEuclidean(nn.Module):
    """`W = γ I + D⁻¹ A D − diag(|A| 1)`, D = diag(exp d): `μ_{∞,D}(W) ≤ γ` (Jafarpour et al. 2021).

    Args:
        measure: γ < 1.
    """

    def __init__(self, measure: float) -> None:
        super().__init__()
        self.measure = measure

    def forward(self, A: Tensor, d: Tensor) -> Tensor:
        """`(n, n)`, `(n,)` to `(n, n)`."""
        similar = A * (d - d[:, None]).exp()
        return similar + torch.diag_embed(self.measure - A.abs().sum(1))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The A that makes a weight, with D = I.

        Raises:
            ValueError: its measure exceeds γ.
        """
        diagonal = weight.diagonal()
        rest = weight - torch.diag_embed(diagonal)
        excess = diagonal - self.measure + rest.abs().sum(1)
        if float(excess.max()) > 64 * torch.finfo(weight.dtype).eps * float(1 + weight.abs().sum(1).max()):
            raise ValueError(
                f"NonEuclidean: the measure of this weight is {self.measure + float(excess.max()):.3g}, above "
                f"{self.measure}; give another weight or a larger measure."
            )
        return rest + torch.diag_embed(0.5 * excess.clamp_max(0.0)), torch.zeros_like(diagonal)


class NonNegative(nn.Module):
    """`W = log(1 + exp V)`, non-negative."""

    def forward(self, V: Tensor) -> Tensor:
        """Shaped like V."""
        return nn.functional.softplus(V)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The V of a weight; what is zero becomes the least number that can be.

        Raises:
            ValueError: an entry is negative.
        """
        if bool((weight < 0).any()):
            raise ValueError(f"NonNegative: the weight has an entry {float(weight.min()):.3g}; none may be negative.")
        positive = weight.clamp_min(torch.finfo(weight.dtype).tiny)
        return positive + torch.log(-torch.expm1(-positive))
