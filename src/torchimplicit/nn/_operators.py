"""Monotone linear operators: a dense matrix, and a circular convolution that the Fourier transform takes apart."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ..linear import MonotoneOperator, Resolvent

_POWER_STEPS = 6
_SMALL = 256
"""Pixels up to which a product with the matrix of the Fourier transform takes less time than FFT."""


@dataclass(frozen=True, eq=False, repr=False)
class DenseMap:
    """A matrix `V`, on the last dim: a resolvent, say."""

    matrix: Tensor

    def mv(self, p: Tensor) -> Tensor:
        """`V p`."""
        return p @ self.matrix.mT

    def rmv(self, u: Tensor) -> Tensor:
        """`Vᵀ u`."""
        return u @ self.matrix


@dataclass(frozen=True, eq=False, repr=False)
class DenseOperator:
    """`W`, `(n, n)`, on the last dim.

    Attributes:
        weight: W.
        margin: m, with `I − W ⪰ m I` in the inner product `Σ metric·p·q`.
        metric: `(n,)`, positive; None is 1.
    """

    weight: Tensor
    margin: float
    metric: Tensor | None = None
    _resolvents: dict[float, DenseMap] = field(init=False, default_factory=dict, repr=False)

    @property
    def unknowns(self) -> int:
        """n."""
        return self.weight.shape[0]

    def mv(self, p: Tensor) -> Tensor:
        """`W p`."""
        return p @ self.weight.mT

    def rmv(self, u: Tensor) -> Tensor:
        """`Wᵀ u`."""
        return u @ self.weight

    @torch.no_grad()
    def resolvent(self, step_size: float) -> DenseMap:
        """By one inversion, kept for the backward pass."""
        if step_size not in self._resolvents:
            matrix = self._identity.add(self._shifted, alpha=step_size)
            self._resolvents[step_size] = DenseMap(torch.linalg.inv(matrix))
        return self._resolvents[step_size]

    def norm_estimate(self) -> float:
        """By a few steps of the power method; below the norm itself."""
        return self._estimate

    def norm_bound(self) -> float:
        """The norm itself, but for rounding."""
        return self._norm

    @cached_property
    def _estimate(self) -> float:
        return power_norm(DenseMap(self._weighted), self._weighted.new_ones(1, self.weight.shape[0]))

    @cached_property
    def _norm(self) -> float:
        return float(torch.linalg.matrix_norm(self._weighted, 2))

    @cached_property
    def _identity(self) -> Tensor:
        return torch.eye(self.weight.shape[0], dtype=self.weight.dtype, device=self.weight.device)

    @cached_property
    def _shifted(self) -> Tensor:
        return self._identity - self.weight

    @cached_property
    def _weighted(self) -> Tensor:
        """`I − W` in coordinates in which the metric is 1: `Λ^½ (I − W) Λ^−½`."""
        if self.metric is None:
            return self._shifted
        root = self.metric.sqrt()
        return root[:, None] * self._shifted / root

    def dense(self) -> Tensor:
        """`W`."""
        return self.weight


def power_norm(operator: Resolvent, start: Tensor) -> float:
    """About the two-norm of an operator: `‖A v‖/‖v‖` after a few steps of the power method on `Aᵀ A`."""
    steps = torch.linspace(0.0, 40.0, start.numel(), dtype=torch.float64).to(start).reshape(start.shape)
    v = start + 0.9 * torch.sin(steps * steps)  # no pattern that an operator might annihilate
    image = operator.mv(v)
    for _ in range(_POWER_STEPS):
        v = operator.rmv(image)
        v = v / torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        image = operator.mv(v)
    return float(torch.linalg.vector_norm(image))


def spectrum(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The matrices `(H·(W//2 + 1), out, in)`, one for each frequency, of a circular correlation on `size`.

    `kernel` is `(out, in, k, l)`, k and l odd, and centred, as torch's convolutions with circular padding have it.
    Frequencies that are conjugates of these are left out.
    """
    k, l = kernel.shape[-2:]  # noqa: E741
    height, width = size
    if k > height or l > width:
        raise ValueError(
            f"a circular convolution of {k} x {l} needs images of that size at least, not {height} x {width}."
        )
    padded = torch.nn.functional.pad(kernel, (0, width - l, 0, height - k))
    centred = padded.roll((-(k // 2), -(l // 2)), (-2, -1))
    return torch.fft.rfft2(centred).conj().flatten(2).permute(2, 0, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Waves:
    """The Fourier transform of real images of one size: by FFT, or where they are small by a matrix product.

    Attributes:
        size: of the images.
        forth: `(H·W, 2F)`, images to real and imaginary parts of their F frequencies; None where FFT is faster.
        back: `(2F, H·W)`.
    """

    size: tuple[int, int]
    forth: Tensor | None = None
    back: Tensor | None = None

    @classmethod
    def of(cls, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Self:
        """For images of this size and dtype."""
        pixels = size[0] * size[1]
        if pixels > _SMALL:
            return cls(size)
        units = torch.eye(pixels, dtype=torch.float64).reshape(pixels, *size)
        waves = torch.view_as_real(torch.fft.rfft2(units)).reshape(pixels, -1, 2).transpose(1, 2).reshape(pixels, -1)
        half = waves.shape[1] // 2
        basis = torch.eye(2 * half, dtype=torch.float64).reshape(2 * half, 2, half)
        images = torch.fft.irfft2(torch.complex(basis[:, 0], basis[:, 1]).unflatten(1, (size[0], -1)), s=size)
        return cls(size, waves.to(device, dtype), images.reshape(2 * half, pixels).to(device, dtype))

    def prepared(self, matrices: Tensor) -> Tensor:
        """Matrices `(F, C, C)` as `through` needs them: transposed, and where the transform is real, in real form."""
        right = matrices.mT
        if self.forth is None:
            return right
        real, imaginary = right.real, right.imag
        return torch.cat((torch.cat((real, imaginary), 2), torch.cat((-imaginary, real), 2)), 1)

    def through(self, p: Tensor, right: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, or flat ones, times a matrix at each frequency."""
        if self.forth is None or self.back is None:
            images = p.reshape(-1, right.shape[1], *self.size)
            waves = torch.fft.rfft2(images).flatten(2).permute(2, 0, 1)
            turned = torch.bmm(waves, right).permute(1, 2, 0).unflatten(2, (self.size[0], -1))
            out = torch.fft.irfft2(turned, s=self.size)
        else:
            pixels, (frequencies, rows, columns) = self.forth.shape[0], right.shape
            waves = (p.reshape(-1, pixels) @ self.forth).reshape(-1, rows // 2, 2, frequencies)
            turned = torch.bmm(waves.permute(3, 0, 2, 1).flatten(2), right).unflatten(2, (2, columns // 2))
            out = turned.permute(1, 3, 2, 0).reshape(-1, 2 * frequencies) @ self.back
        return out.reshape(p.shape) if right.shape[1] == right.shape[2] else out.reshape(len(p), -1)


@dataclass(frozen=True, eq=False, repr=False)
class CircularMap:
    """Products with one matrix per frequency."""

    waves: Waves
    right: Tensor

    def mv(self, p: Tensor) -> Tensor:
        """Circular correlation."""
        return self.waves.through(p, self.right)

    def rmv(self, u: Tensor) -> Tensor:
        """Its transpose."""
        return self.waves.through(u, self.right.mH)


@dataclass(frozen=True, eq=False, repr=False)
class CircularOperator:
    """`W`, a convolution `C → C` with periodic padding, by one complex matrix per frequency.

    Attributes:
        matrices: W at each frequency, `(F, C, C)`, as `spectrum` gives them.
        size: of the images.
        margin: m.
    """

    matrices: Tensor
    size: tuple[int, int]
    margin: float
    _map: CircularMap = field(init=False, repr=False)
    _resolvents: dict[float, CircularMap] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Prepare the products here and now: where the weight's graph is wanted, it is being recorded."""
        waves = Waves.of(self.size, self.matrices.real.dtype, self.matrices.device)
        object.__setattr__(self, "_map", CircularMap(waves, waves.prepared(self.matrices)))

    @property
    def unknowns(self) -> int:
        """n."""
        return self.matrices.shape[1] * self.size[0] * self.size[1]

    def mv(self, p: Tensor) -> Tensor:
        """`W p`."""
        return self._map.mv(p)

    def rmv(self, u: Tensor) -> Tensor:
        """`Wᵀ u`."""
        return self._map.rmv(u)

    @torch.no_grad()
    def resolvent(self, step_size: float) -> CircularMap:
        """Convolutions commute with shifts, and so do their inverses: one small inverse for each frequency."""
        if step_size not in self._resolvents:
            inverse = torch.linalg.inv(self._identity + step_size * (self._identity - self.matrices))
            waves = self._map.waves
            self._resolvents[step_size] = CircularMap(waves, waves.prepared(inverse))
        return self._resolvents[step_size]

    def norm_estimate(self) -> float:
        """By a few steps of the power method on one image; below the norm itself."""
        return self._estimate

    def norm_bound(self) -> float:
        """The norm itself: that of the worst frequency."""
        return self._norm

    @cached_property
    def _estimate(self) -> float:
        shape = (1, self.matrices.shape[1], *self.size)
        start = torch.ones(shape, dtype=self.matrices.real.dtype, device=self.matrices.device)
        return power_norm(Shifted(self), start)

    @cached_property
    def _norm(self) -> float:
        return float(torch.linalg.matrix_norm(self._identity - self.matrices, 2).max())

    @property
    def _identity(self) -> Tensor:
        return torch.eye(self.matrices.shape[1], dtype=self.matrices.dtype, device=self.matrices.device)

    def dense(self) -> Tensor:
        """`W`, `(n, n)`."""
        return self.mv(torch.eye(self.unknowns, dtype=self.matrices.real.dtype, device=self.matrices.device)).mT


@dataclass(frozen=True, eq=False, repr=False)
class Shifted:
    """`I − W`."""

    operator: MonotoneOperator

    def mv(self, p: Tensor) -> Tensor:
        """`p − W p`."""
        return p - self.operator.mv(p)

    def rmv(self, u: Tensor) -> Tensor:
        """`u − Wᵀ u`."""
        return u - self.operator.rmv(u)
