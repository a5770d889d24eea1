"""Vectors without a pattern, that no matrix has reason to be hostile to.

They are the same for every sample, so that its answer does not depend on its place in the batch.
"""

import torch
from torch import Tensor


def waves(like: Tensor, number: int) -> Tensor:
    """Numbers from −1 to 1, `(B, n)`, which no sums and differences of few make zero; `number` says which."""
    n = like.shape[1]
    places = torch.arange(1 + number * n, 1 + (number + 1) * n, dtype=like.dtype, device=like.device)
    return torch.sin(places**2).expand_as(like)


def signs(like: Tensor) -> Tensor:
    """Unit vectors of signs, `(B, n)`: no singular vector is likely to be orthogonal to them."""
    return (waves(like, 0).sign() / like.shape[1] ** 0.5).expand_as(like)
