"""Equations without a root: the right answer is to say so.

In those tagged "asymptotic" F tends to zero as z runs off to infinity, so that any tolerance on `|F|` alone is met
somewhere, by a point that solves nothing.
"""

from typing import Any

from . import mgh
from ._arrays import counting
from ._problem import Array, Function, Point, Problem
from .large import bratu_problem


def square_plus_one(z: Array, xp: Any) -> Array:
    """`x² + 1`: Newton's method wanders for ever."""
    return z**2 + 1


def near_miss(z: Array, xp: Any) -> Array:
    """`x² + 1e-6`: above the tolerance asked for, below many a default."""
    return z**2 + 1e-6


def exp_plus_one(z: Array, xp: Any) -> Array:
    """`exp(x) + 1`: the residual falls to 1 for ever."""
    return xp.exp(z) + 1


def decay(z: Array, xp: Any) -> Array:
    """`exp(−x)`: each Newton step is 1 and divides the residual by e."""
    return xp.exp(-z)


def cauchy(z: Array, xp: Any) -> Array:
    """`1 / (1 + x²)`."""
    return 1 / (1 + z**2)


def decay_along_a_line(z: Array, xp: Any) -> Array:
    """`exp(−x − y)` and `y − x`."""
    x, y = z[..., 0], z[..., 1]
    return xp.stack([xp.exp(-x - y), y - x], -1)


def imaginary_circle(z: Array, xp: Any) -> Array:
    """`x² + y² + 1` and `y − x`."""
    x, y = z[..., 0], z[..., 1]
    return xp.stack([x**2 + y**2 + 1, y - x], -1)


def circles_apart(z: Array, xp: Any) -> Array:
    """Two unit circles, three apart."""
    x, y = z[..., 0], z[..., 1]
    return xp.stack([x**2 + y**2 - 1, (x - 3) ** 2 + y**2 - 1], -1)


def one_bad_equation(z: Array, xp: Any) -> Array:
    """`x_k − x_(k+1)` for k < n, which is easy, and `Σ x² + 1`."""
    return xp.concatenate([z[..., :-1] - z[..., 1:], (z**2).sum(-1)[..., None] + 1], -1)


def shifted_squares(z: Array, xp: Any) -> Array:
    """`(x_k − k)² + 0.1`."""
    return (z - counting(z, xp)) ** 2 + 0.1


def raised_kink(z: Array, xp: Any) -> Array:
    """`|x| + 0.1`: the minimum is no stationary point."""
    return xp.abs(z) + 0.1


def jump(z: Array, xp: Any) -> Array:
    """`x − 0.3 ± ½`, with the sign of `x − 0.3`: it changes sign without a root."""
    half = xp.ones_like(z) / 2
    return z - 0.3 + xp.where(z < 0.3, -half, half)


def step(z: Array, xp: Any) -> Array:
    """`±1`, with the sign of `x − 0.3`: it changes sign too, and its Jacobian is zero."""
    one = xp.ones_like(z)
    return 0 * z + xp.where(z < 0.3, -one, one)


def _rootless(name: str, fn: Function, start: Point, *traits: str) -> Problem:
    return Problem(name, start, fn, has_root=False, tags=("rootless", *traits))


ROOTLESS: tuple[Problem, ...] = (
    _rootless("square-plus-one", square_plus_one, (2.0,)),
    _rootless("near-miss", near_miss, (1.0,)),
    _rootless("exp-plus-one", exp_plus_one, (0.0,)),
    _rootless("decay", decay, (0.0,), "asymptotic"),
    _rootless("cauchy", cauchy, (1.0,), "asymptotic"),
    _rootless("decay-along-a-line", decay_along_a_line, (0.0, 1.0), "asymptotic"),
    _rootless("imaginary-circle", imaginary_circle, (1.0, 2.0)),
    _rootless("circles-apart", circles_apart, (1.0, 1.0)),
    _rootless("one-bad-equation", one_bad_equation, (1.0,) * 10),
    _rootless("shifted-squares", shifted_squares, (0.0,) * 10),
    _rootless("raised-kink", raised_kink, (1.0,)),
    _rootless("jump", jump, (2.0,)),
    _rootless("step", step, (0.0,)),
    _rootless("chebyquad-8", mgh.chebyquad, tuple(k / 9 for k in range(1, 9))),
    bratu_problem(7.5),
)
