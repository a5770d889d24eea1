"""Checks of what the layers with certificates are given."""

import math
from typing import Any

from torch import Tensor

from .._options import nearest

OPTIONS = ("solver", "adjoint", "max_steps", "on_failure", "init", "device", "dtype")


def require_size(layer: str, odd: bool = False, **sizes: int) -> None:
    """Every size is an integer, 1 or more, and odd if it must be."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or (odd and size % 2 == 0):
            raise ValueError(f"{layer}: {name}={size!r} is not valid; give an {'odd ' if odd else ''}integer >= 1.")


def require_margin(layer: str, margin: Any) -> None:
    """A margin is a number in (0, 1]."""
    require_between(layer, 0.0, 1.0, closed=True, margin=margin)


def require_between(layer: str, low: float, high: float, closed: bool = False, **numbers: Any) -> None:
    """Every number lies in (low, high), or (low, high] if closed."""
    for name, number in numbers.items():
        ok = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not ok or not (low < number < high or (closed and number == high)):
            raise ValueError(
                f"{layer}: {name}={number!r} is not valid; give a number in ({low}, {high}{']' if closed else ')'}."
            )


def require_last(layer: str, x: Tensor, features: int) -> None:
    """The last dim of x has the right size."""
    if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[-1] != features:
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{layer}: the input must be (..., {features}), but it is {what}.")


def require_norm(layer: str, norm: Any) -> None:
    """A norm is one of two."""
    if norm not in ("2", "inf"):
        raise ValueError(f"{layer}: norm={norm!r} is not known; {nearest(str(norm), ('2', 'inf'))}")


def require_images(layer: str, x: Tensor, channels: int) -> None:
    """x is a batch of images with the right number of channels."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != channels:
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{layer}: the input must be (B, {channels}, H, W), but it is {what}.")
