"""What the test functions need beyond the operations that torch, NumPy and JAX share."""

from typing import Any

import numpy as np
import torch

from ._problem import Array


def constant(values: Any, z: Array, xp: Any) -> Array:
    """Turn numbers into an array of the kind, dtype and device of `z`."""
    if isinstance(z, torch.Tensor):
        return torch.asarray(values, dtype=z.dtype, device=z.device)
    return xp.asarray(values, dtype=z.dtype)


def counting(z: Array, xp: Any) -> Array:
    """Return 1, 2, …, n in the place of the n unknowns."""
    return constant(np.arange(1.0, z.shape[-1] + 1), z, xp)


def shifted(z: Array, offset: int, xp: Any) -> Array:
    """Return `z_(k + offset)` in the place of `z_k`, zero where there is none."""
    nothing = xp.zeros_like(z[..., : abs(offset)])
    if offset < 0:
        return xp.concatenate([nothing, z[..., :offset]], -1)
    return xp.concatenate([z[..., offset:], nothing], -1)
