"""The 23 classical systems of nonlinear equations of Burkardt's collection `test_nonlin`, in its order.

Numbers 1 to 14 are those of `mgh.py`, with ten unknowns where their number is free. Burkardt poses Chebyquad on
[−1, 1] and here, as in the benchmarks of NonlinearSolve.jl, it has two unknowns. Two published ports of the collection
are not followed where they leave its sources: one in Julia (SciML's NonlinearProblemLibrary) has shifted indices in
Watson's function and in Chandrasekhar's nodes and counts the diagonal of the integral equation twice; Burkardt's own
Watson ends in `x2 − x2² − 1` where Moré, Garbow & Hillstrom have `x2 − x1² − 1`, and here it is theirs.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from . import mgh
from ._arrays import constant
from ._problem import Array, Function, Point, Problem


def _matrix_square_root(target: np.ndarray, z: Array, xp: Any) -> Array:
    side = len(target)
    X = z.reshape((*z.shape[:-1], side, side))
    return (X @ X - constant(target, z, xp)).reshape(z.shape)


def hammarling_2x2(z: Array, xp: Any) -> Array:
    """Set `X² − A` to zero, row by row, for `A = [[1e-4, 1], [0, 1e-4]]`."""
    return _matrix_square_root(np.array([[1e-4, 1], [0, 1e-4]]), z, xp)


def hammarling_3x3(z: Array, xp: Any) -> Array:
    """Set `X² − A` to zero for the same A with a third diagonal element 1e-4."""
    return _matrix_square_root(np.array([[1e-4, 1, 0], [0, 1e-4, 0], [0, 0, 1e-4]]), z, xp)


def dennis_schnabel(z: Array, xp: Any) -> Array:
    """A line and a circle."""
    return xp.stack([z.sum(-1) - 3, (z**2).sum(-1) - 9], -1)


def _flat_bell(x: Array, xp: Any) -> Array:
    """`(1 − exp(−x²)) / x`, continued by 0 at x = 0, without a NaN in its derivative there."""
    safe = xp.where(x == 0, xp.ones_like(x), x)
    return xp.where(x == 0, x, -xp.expm1(-(safe**2)) / safe)


def sample_18(z: Array, xp: Any) -> Array:
    """`y² (1 − exp(−x²)) / x` and `x (1 − exp(−y²)) / y`: zero along both axes."""
    x, y = z[..., 0], z[..., 1]
    return xp.stack([y**2 * _flat_bell(x, xp), x * _flat_bell(y, xp)], -1)


def sample_19(z: Array, xp: Any) -> Array:
    """`x (x² + y²)` and `y (x² + y²)`: the Jacobian vanishes at the root."""
    return z * (z**2).sum(-1)[..., None]


def scalar_20(z: Array, xp: Any) -> Array:
    """`x (x − 5)²`: a simple root and a double one."""
    return z * (z - 5) ** 2


def freudenstein_roth(z: Array, xp: Any) -> Array:
    """The norm has a local minimum above zero near (11.4, −0.9), on the way from the start."""
    x, y = z[..., 0], z[..., 1]
    return xp.stack([x - y**3 + 5 * y**2 - 2 * y - 13, x + y**3 + y**2 - 14 * y - 29], -1)


def boggs(z: Array, xp: Any) -> Array:
    """Three roots close to each other."""
    x, y = z[..., 0], z[..., 1]
    return xp.stack([x**2 - y + 1, x - xp.cos(0.5 * math.pi * y)], -1)


@lru_cache(maxsize=8)
def _chandrasekhar_kernel(n: int) -> np.ndarray:
    mu = (np.arange(1.0, n + 1) - 0.5) / n
    return mu[:, None] / (mu[:, None] + mu) / (2 * n)


def chandrasekhar(z: Array, xp: Any, c: float = 0.9) -> Array:
    """`H_i − [1 − c/(2n) Σ_j μ_i H_j / (μ_i + μ_j)]⁻¹` with midpoints `μ_i = (i − ½)/n`; singular as c → 1."""
    kernel = constant(_chandrasekhar_kernel(z.shape[-1]), z, xp)
    return z - 1 / (1 - c * (z @ kernel.T))


def _problem(
    number: int, name: str, fn: Function, start: Iterable[float], roots: Iterable[Point] = (), *traits: str
) -> Problem:
    at = tuple(float(x) for x in start)
    return Problem(f"classical-{number:02}-{name}", at, fn, tuple(roots), tags=("classical", *traits))


CLASSICAL: tuple[Problem, ...] = (
    _problem(1, "rosenbrock", mgh.rosenbrock, (-1.2, *(1.0,) * 9), [(1.0,) * 10]),
    _problem(2, "powell-singular", *mgh.SYSTEMS["powell-singular"], "singular root"),
    _problem(3, "powell-badly-scaled", *mgh.SYSTEMS["powell-badly-scaled"]),
    _problem(4, "wood", *mgh.SYSTEMS["wood"]),
    _problem(5, "helical-valley", *mgh.SYSTEMS["helical-valley"]),
    _problem(6, "watson", *mgh.SYSTEMS["watson"]),
    _problem(7, "chebyquad", mgh.chebyshev_means, (-1 / 3, 1 / 3), [(-math.sqrt(1 / 3), math.sqrt(1 / 3))]),
    _problem(8, "brown-almost-linear", *mgh.SYSTEMS["brown-almost-linear"]),
    _problem(9, "discrete-boundary-value", *mgh.SYSTEMS["discrete-boundary-value"]),
    _problem(10, "discrete-integral-equation", *mgh.SYSTEMS["discrete-integral-equation"]),
    _problem(11, "trigonometric", *mgh.SYSTEMS["trigonometric"]),
    _problem(12, "variably-dimensioned", *mgh.SYSTEMS["variably-dimensioned"]),
    _problem(13, "broyden-tridiagonal", *mgh.SYSTEMS["broyden-tridiagonal"]),
    _problem(14, "broyden-banded", *mgh.SYSTEMS["broyden-banded"]),
    _problem(15, "hammarling-2x2", hammarling_2x2, np.eye(2).flat, [(0.01, 50.0, 0.0, 0.01)]),
    _problem(16, "hammarling-3x3", hammarling_3x3, np.eye(3).flat, [(0.01, 50.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.01)]),
    _problem(17, "dennis-schnabel", dennis_schnabel, (1.0, 5.0), [(0.0, 3.0), (3.0, 0.0)]),
    _problem(18, "sample-18", sample_18, (2.0, 2.0), [(0.0, 0.0)], "singular root"),
    _problem(19, "sample-19", sample_19, (3.0, 3.0), [(0.0, 0.0)], "singular root"),
    _problem(20, "scalar", scalar_20, (1.0,), [(0.0,), (5.0,)]),
    _problem(21, "freudenstein-roth", freudenstein_roth, (0.5, -2.0), [(5.0, 4.0)]),
    _problem(22, "boggs", boggs, (1.0, 0.0), [(0.0, 1.0), (-1.0, 2.0), (-math.sqrt(0.5), 1.5)]),
    _problem(23, "chandrasekhar", chandrasekhar, (1.0,) * 10),
)
