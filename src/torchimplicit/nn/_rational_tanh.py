"""tanh as a quotient of polynomials, for compiled loops: Inductor's own takes longer than the product beside it."""

import torch
from torch import Tensor

_NUMERATOR = (1.0, 0.13446800410747528, 0.003574318950995803, 2.1939216821920127e-05, 1.5292592081550538e-08)
_DENOMINATOR = (1.0, 0.4678013026714325, 0.026174824684858322, 0.00034157276968471706, 8.547747256670846e-07)
_END, _ONE = 8.0, 9.0109
"""Beyond the first it is 1 but for one rounding unit of float32, beyond the second 1 to rounding."""
ERROR = 4.0
"""Relative error of `tanh` in float32 at most, in rounding units (`ε = 2⁻²³`); measured: 3.1, root mean square 0.5."""


def tanh(p: Tensor) -> Tensor:
    """tanh(p): torch's own, but for float32, where it is `p P(p²)/Q(p²)` with both of degree four.

    The coefficients make the largest relative error on [−8, 8] least (0.06 rounding units before rounding; found by
    Lawson's iteration on the linearised problem), with `P(0) = Q(0) = 1`: small numbers are exact.
    """
    if p.dtype != torch.float32:
        return torch.tanh(p)
    saturated, sign = p.abs() > _ONE, p.sign()
    p = p.clamp(-_END, _END)
    s = p * p
    numerator: float | Tensor = _NUMERATOR[-1]
    for a in _NUMERATOR[-2::-1]:
        numerator = numerator * s + a
    denominator: float | Tensor = _DENOMINATOR[-1]
    for b in _DENOMINATOR[-2::-1]:
        denominator = denominator * s + b
    # A slope of 1 − tanh² that is not zero there would be a gradient where there is none.
    return torch.where(saturated, sign, p * numerator / denominator)
