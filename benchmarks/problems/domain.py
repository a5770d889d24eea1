"""Equations whose function is not finite everywhere: at the start, or where a full Newton step leads from there.

All of them have a root.
"""

import math
from typing import Any

from ._problem import Array, Problem


def logarithm(z: Array, xp: Any) -> Array:
    """`log x`: NaN for x < 0."""
    return xp.log(z)


def root_two(z: Array, xp: Any) -> Array:
    """`√x − 2`: NaN for x < 0."""
    return xp.sqrt(z) - 2


def root_tenth(z: Array, xp: Any) -> Array:
    """`√x − 0.1`: from x = 4 the first Newton step leads to x < 0."""
    return xp.sqrt(z) - 0.1


def exponential(z: Array, xp: Any) -> Array:
    """`exp(x) − 1`: infinite for x > 709.8."""
    return xp.exp(z) - 1


def gaussian(z: Array, xp: Any) -> Array:
    """`exp(x²) − 2`: infinite for |x| > 26.6."""
    return xp.exp(z**2) - 2


def reciprocal(z: Array, xp: Any) -> Array:
    """`1/x − 3`: infinite at 0; Newton's method converges from 0 < x < 2/3 only."""
    return 1 / z - 3


def curve_and_logarithm(z: Array, xp: Any) -> Array:
    """`log x + y − 1` and `√y − x`: NaN outside the first quadrant."""
    x, y = z[..., 0], z[..., 1]
    return xp.stack([xp.log(x) + y - 1, xp.sqrt(y) - x], -1)


def arctangent(z: Array, xp: Any) -> Array:
    """`arctan x`: Newton's method overflows from |x| > 1.3918."""
    return xp.arctan(z)


_BELL = math.sqrt(math.log(2))

DOMAIN: tuple[Problem, ...] = (
    Problem("log-of-negative", (-1.0,), logarithm, ((1.0,),), tags=("domain", "not finite at the start")),
    Problem("sqrt-of-negative", (-1.0,), root_two, ((4.0,),), tags=("domain", "not finite at the start")),
    Problem("exp-overflow", (800.0,), exponential, ((0.0,),), tags=("domain", "not finite at the start")),
    Problem(
        "exp-square-overflow", (30.0,), gaussian, ((_BELL,), (-_BELL,)), tags=("domain", "not finite at the start")
    ),
    Problem("pole", (0.0,), reciprocal, ((1 / 3,),), tags=("domain", "not finite at the start")),
    Problem(
        "half-outside", (-1.0, 4.0), curve_and_logarithm, ((1.0, 1.0),), tags=("domain", "not finite at the start")
    ),
    Problem("log-overshoot", (3.0,), logarithm, ((1.0,),), tags=("domain",)),
    Problem("sqrt-overshoot", (4.0,), root_tenth, ((0.01,),), tags=("domain",)),
    Problem("reciprocal-overshoot", (1.0,), reciprocal, ((1 / 3,),), tags=("domain",)),
    Problem("arctan-overshoot", (10.0,), arctangent, ((0.0,),), tags=("domain",)),
)
