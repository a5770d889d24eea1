"""Norms over the unknowns of one sample: `(B, n)` to `(B,)`."""

from collections.abc import Callable

import torch
from torch import Tensor

Norm = str | Callable[[Tensor], Tensor]
"""`"rms"` (a tolerance then means the same at any width), `"two"`, `"max"`, or a callable `(B, n) -> (B,)`."""


def two(x: Tensor) -> Tensor:
    """`(Σᵢ xᵢ²)^½` of each row."""
    return torch.linalg.vector_norm(x, dim=1)


def rms(x: Tensor) -> Tensor:
    """`(Σᵢ xᵢ² / n)^½` of each row."""
    return torch.linalg.vector_norm(x, dim=1) / max(x.shape[1], 1) ** 0.5


def largest(x: Tensor) -> Tensor:
    """`maxᵢ |xᵢ|` of each row."""
    return torch.linalg.vector_norm(x, ord=float("inf"), dim=1) if x.shape[1] else x.new_zeros(x.shape[0])


NORMS: dict[str, Callable[[Tensor], Tensor]] = {"rms": rms, "two": two, "max": largest}


def norm_function(norm: Norm) -> Callable[[Tensor], Tensor]:
    """The function behind a solver's `norm` option."""
    return norm if callable(norm) else NORMS[norm]
