"""The 14 systems of Moré, Garbow & Hillstrom (1981), each from one, ten and a hundred times its standard start.

The functions are those of "Testing unconstrained optimization software", ACM TOMS 7(1), 17-41, with its numbers in
brackets; which of them make systems of equations, and from where, is as in the test program of MINPACK by the same
authors. Wood's and Watson's functions are sums of more squares than there are unknowns; there the equations are that
the gradient vanishes. The starts are `c x0` for c = 1, 10, 100. Watson's x0 is zero, and
its other starts are (c, …, c), which is that program's rule.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np

from ._arrays import constant, counting, shifted
from ._problem import Array, Function, Point, Problem

MULTIPLES = (1, 10, 100)


def rosenbrock(z: Array, xp: Any) -> Array:
    """[1] `1 − x1`, `10 (x_k − x_(k−1)²)`; for n > 2 a chain, as in Burkardt's collection."""
    return xp.concatenate([1 - z[..., :1], 10 * (z[..., 1:] - z[..., :-1] ** 2)], -1)


def powell_singular(z: Array, xp: Any) -> Array:
    """[13] The Jacobian has rank 2 at the root, the origin."""
    a, b, c, d = (z[..., k] for k in range(4))
    return xp.stack([a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2], -1)


def powell_badly_scaled(z: Array, xp: Any) -> Array:
    """[3] The unknowns differ by six orders of magnitude at the root."""
    a, b = z[..., 0], z[..., 1]
    return xp.stack([1e4 * a * b - 1, xp.exp(-a) + xp.exp(-b) - 1.0001], -1)


def wood(z: Array, xp: Any) -> Array:
    """[14] The gradient of Wood's function, its first and third component halved; not only the minimum is a root."""
    a, b, c, d = (z[..., k] for k in range(4))
    first, second = b - a**2, d - c**2
    return xp.stack(
        [
            -200 * a * first - (1 - a),
            200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * second - (1 - c),
            180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
        ],
        -1,
    )


def helical_valley(z: Array, xp: Any) -> Array:
    """[7] `10 (x3 − 10 θ)`, `10 (r − 1)`, `x3` in the cylinder coordinates of (x1, x2).

    The paper's θ is `arctan(x2 / x1) / 2π`, plus 1/2 where x1 < 0: in turns, from −1/4 to 3/4, cut along the negative
    x2-axis. That is a quarter turn less the angle measured from the x2-axis, which needs no case distinction.
    """
    a, b, c = (z[..., k] for k in range(3))
    theta = 0.25 - xp.arctan2(a, b) / (2 * math.pi)
    return xp.stack([10 * (c - 10 * theta), 10 * (xp.sqrt(a**2 + b**2) - 1), c], -1)


@lru_cache(maxsize=8)
def _watson_powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    t = np.arange(1.0, 30.0)[:, None] / 29
    degree = np.arange(n)
    return t**degree, degree * t ** np.maximum(degree - 1, 0)


def watson(z: Array, xp: Any) -> Array:
    """[20] Half the gradient of `Σ f_i²`, `Jᵀ f`, over 31 terms.

    With `p(t) = Σ_j x_j t^(j−1)` and `t_i = i/29`:
    `f_i = p'(t_i) − p(t_i)² − 1` for i ≤ 29, `f_30 = x1`, `f_31 = x2 − x1² − 1`.
    """
    powers, slopes = (constant(matrix, z, xp) for matrix in _watson_powers(z.shape[-1]))  # (29, n): t^(j-1), its d/dt
    p = z @ powers.T
    f = z @ slopes.T - p**2 - 1
    a, b = z[..., 0], z[..., 1]
    last = b - a**2 - 1
    ends = xp.concatenate([xp.stack([a - 2 * a * last, last], -1), xp.zeros_like(z[..., 2:])], -1)
    return f @ slopes - 2 * (p * f) @ powers + ends


def chebyshev_means(y: Array, xp: Any) -> Array:
    """`mean_j T_i(y_j) − ½ ∫_(−1)^1 T_i` for i = 1, …, n; the integral is 0 for odd i, −2/(i² − 1) for even i."""
    n = y.shape[-1]
    before, current = xp.ones_like(y), y
    equations = []
    for i in range(1, n + 1):
        equations.append(current.sum(-1) / n + (1 / (i**2 - 1) if i % 2 == 0 else 0))
        before, current = current, 2 * y * current - before
    return xp.stack(equations, -1)


def chebyquad(z: Array, xp: Any) -> Array:
    """[35] Equal-weight quadrature on [0, 1]; there is a root for n ≤ 7 and n = 9, none for n = 8."""
    return chebyshev_means(2 * z - 1, xp)


def brown_almost_linear(z: Array, xp: Any) -> Array:
    """[27] `x_k + Σ x − (n + 1)` for k < n, and `Π x − 1`."""
    linear = z[..., :-1] + z.sum(-1)[..., None] - (z.shape[-1] + 1)
    return xp.concatenate([linear, (xp.prod(z, -1) - 1)[..., None]], -1)


def discrete_boundary_value(z: Array, xp: Any) -> Array:
    """[28] `−x″ + ½ (x + t + 1)³ = 0` by central differences, times h²."""
    h = 1 / (z.shape[-1] + 1)
    t = h * counting(z, xp)
    return 2 * z - shifted(z, -1, xp) - shifted(z, 1, xp) + h**2 * (z + t + 1) ** 3 / 2


def discrete_integral_equation(z: Array, xp: Any) -> Array:
    """[29] `x_k + h/2 [(1 − t_k) Σ_(j≤k) t_j c_j + t_k Σ_(j>k) (1 − t_j) c_j]` with `c_j = (x_j + t_j + 1)³`."""
    h = 1 / (z.shape[-1] + 1)
    t = h * counting(z, xp)
    c = (z + t + 1) ** 3
    up_to_here = xp.cumsum(t * c, -1)
    falling = xp.cumsum((1 - t) * c, -1)
    return z + h / 2 * ((1 - t) * up_to_here + t * (falling[..., -1:] - falling))


def trigonometric(z: Array, xp: Any) -> Array:
    """[26] `n − Σ_j cos x_j + k (1 − cos x_k) − sin x_k`."""
    cosine = xp.cos(z)
    return z.shape[-1] - cosine.sum(-1)[..., None] + counting(z, xp) * (1 - cosine) - xp.sin(z)


def variably_dimensioned(z: Array, xp: Any) -> Array:
    """[25] `x_k − 1 + k s (1 + 2 s²)` with `s = Σ_j j (x_j − 1)`."""
    k = counting(z, xp)
    s = (k * (z - 1)).sum(-1)[..., None]
    return z - 1 + k * s * (1 + 2 * s**2)


def broyden_tridiagonal(z: Array, xp: Any) -> Array:
    """[30] `(3 − 2 x_k) x_k − x_(k−1) − 2 x_(k+1) + 1`."""
    return (3 - 2 * z) * z - shifted(z, -1, xp) - 2 * shifted(z, 1, xp) + 1


def broyden_banded(z: Array, xp: Any) -> Array:
    """[31] `x_k (2 + 5 x_k²) + 1 − Σ_j x_j (1 + x_j)` over the five unknowns before x_k and the one after it."""
    neighbours = z * (1 + z)
    band = sum(shifted(neighbours, offset, xp) for offset in (-5, -4, -3, -2, -1, 1))
    return z * (2 + 5 * z**2) + 1 - band


def grid_start(n: int) -> Point:
    """`t (t − 1)` at the inner points of a grid on [0, 1], where [28] and [29] start."""
    return tuple(k / (n + 1) * (k / (n + 1) - 1) for k in range(1, n + 1))


POWELL_SMALL, POWELL_LARGE = 1.0981593296998177e-05, 9.106146739865671

_TEN_ONES = (1.0,) * 10

SYSTEMS: dict[str, tuple[Function, Point, tuple[Point, ...]]] = {
    "rosenbrock": (rosenbrock, (-1.2, 1.0), ((1.0, 1.0),)),
    "powell-singular": (powell_singular, (3.0, -1.0, 0.0, 1.0), ((0.0,) * 4,)),
    "powell-badly-scaled": (powell_badly_scaled, (0.0, 1.0), ((POWELL_SMALL, POWELL_LARGE),)),
    "wood": (wood, (-3.0, -1.0, -3.0, -1.0), ((1.0,) * 4,)),
    "helical-valley": (helical_valley, (-1.0, 0.0, 0.0), ((1.0, 0.0, 0.0),)),
    "watson": (watson, (0.0,) * 6, ()),
    "chebyquad": (chebyquad, tuple(k / 8 for k in range(1, 8)), ()),
    "brown-almost-linear": (brown_almost_linear, (0.5,) * 10, (_TEN_ONES,)),
    "discrete-boundary-value": (discrete_boundary_value, grid_start(10), ()),
    "discrete-integral-equation": (discrete_integral_equation, grid_start(10), ()),
    "trigonometric": (trigonometric, (0.1,) * 10, ((0.0,) * 10,)),
    "variably-dimensioned": (variably_dimensioned, tuple(1 - k / 10 for k in range(1, 11)), (_TEN_ONES,)),
    "broyden-tridiagonal": (broyden_tridiagonal, (-1.0,) * 10, ()),
    "broyden-banded": (broyden_banded, (-1.0,) * 10, ()),
}
"""Name, function, standard start, known roots."""


def _far(start: Point, multiple: int) -> Point:
    if multiple > 1 and not any(start):
        return (float(multiple),) * len(start)
    return tuple(multiple * x for x in start)


MGH: tuple[Problem, ...] = tuple(
    Problem(f"mgh-{name}-x{multiple}", _far(start, multiple), fn, roots, tags=("mgh", f"mgh-x{multiple}"))
    for multiple in MULTIPLES
    for name, (fn, start, roots) in SYSTEMS.items()
)
