"""Vectors without a pattern, that no matrix has reason to be hostile to.

They are the same for every sample, so that its answer does not depend on its place in the batch.
"""

import torch
from torch import Tensor

_KEPT: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
_ROOM = 64


def waves(like: Tensor, number: int) -> Tensor:
    """Numbers from −1 to 1, `(B, n)`, which no sums and differences of few make zero; `number` says which."""
    n = like.shape[1]
    places = torch.arange(1 + number * n, 1 + (number + 1) * n, dtype=like.dtype, device=like.device)
    return torch.sin(places**2).expand_as(like)


def signs(like: Tensor) -> Tensor:
    """Unit vectors of signs, `(B, n)`: no singular vector is likely to be orthogonal to them."""
    return (waves(like, 0).sign() / like.shape[1] ** 0.5).expand_as(like)


def kept_signs(like: Tensor) -> Tensor:
    """`signs`, which take as long to make as a small batch to solve, from the last time they were asked for."""
    n, dtype, device = key = like.shape[1], like.dtype, like.device
    kept = _KEPT.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = signs(torch.empty(1, n, dtype=dtype, device=device))[0]
        if type(kept) is Tensor and len(_KEPT) < _ROOM:  # and not a fake one, which a trace makes
            _KEPT[key] = kept
    return kept.expand_as(like)
