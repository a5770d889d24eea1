"""The functions of the test problems are those of the papers: against loops, published solutions, values by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from torch import Tensor

from benchmarks.problems import PROBLEMS, mgh
from benchmarks.problems.classical import chandrasekhar

# What MINPACK's test program prints (ANL-80-74); seven digits are enough to tell one formula from another.
PUBLISHED: dict[str, tuple[Callable[..., Tensor], list[float]]] = {
    "watson, n = 6": (
        mgh.watson,
        [
            -0.01572508640134,
            1.012434869369118,
            -0.232991625956797,
            1.260430087800365,
            -1.513728922723441,
            0.992996432431856,
        ],
    ),
    "watson, n = 9": (
        mgh.watson,
        [
            *(-0.1530703652147214e-04, 0.9997897039319488, 0.1476396369354227e-01, 0.1463423282995085),
            *(1.000821103004075, -2.617731140517609, 4.104403164477184, -3.143612278555425, 1.052626408009917),
        ],
    ),
    "chebyquad, n = 5": (mgh.chebyquad, [0.0837512565, 0.312729295222, 0.5, 0.687270704776, 0.916248743501]),
    "chebyquad, n = 7": (
        mgh.chebyquad,
        [0.0580691497791, 0.235171611567, 0.338044095800, 0.5, 0.661955906351, 0.764828386804, 0.941930850551],
    ),
    "chebyquad, n = 9": (
        mgh.chebyquad,
        [
            *(0.04420534615691, 0.1994906721905, 0.2356191086781, 0.4160469078466, 0.5),
            *(0.5839530926716, 0.7643808911925, 0.8005093278090, 0.9557946538315),
        ],
    ),
    "discrete boundary value": (
        mgh.discrete_boundary_value,
        [
            *(-0.04316498251876, -0.08157715653539, -0.1144857143805, -0.1409735768626, -0.1599086961820),
            *(-0.1698772023128, -0.1690899837812, -0.1552495352218, -0.1253558916789, -0.07541653368589),
        ],
    ),
    "discrete integral equation": (
        mgh.discrete_integral_equation,
        [
            *(-0.04316498251876, -0.08157715653539, -0.1144857143805, -0.1409735768626, -0.1599086961820),
            *(-0.1698772023128, -0.1690899837812, -0.1552495352218, -0.1253558916789, -0.07541653368589),
        ],
    ),
    "discrete integral equation, n = 1": (mgh.discrete_integral_equation, [-0.1528138835626]),
    "broyden tridiagonal": (
        mgh.broyden_tridiagonal,
        [
            *(-0.5707221320, -0.6818069500, -0.7022100760, -0.7055106299, -0.7049061557),
            *(-0.7014966070, -0.6918893224, -0.6657965144, -0.5960351091, -0.4164122575),
        ],
    ),
    "broyden banded": (
        mgh.broyden_banded,
        [
            *(-0.4283028634882, -0.4765964236397, -0.5196524642777, -0.5580993248352, -0.5925061568132),
            *(-0.6245036817963, -0.6232394720688, -0.6213938417874, -0.6204535965224, -0.5864692707288),
        ],
    ),
    "wood, the other root": (mgh.wood, [-0.9679740249362, 0.9471391408152, -0.9695163103330, 0.9512476657950]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_solutions_are_roots(name: str) -> None:
    fn, solution = PUBLISHED[name]
    assert fn(torch.tensor(solution, dtype=torch.float64), torch).abs().max() <= 2e-6


def watson_by_loops(x: list[float]) -> list[float]:
    """`Σ_i f_i ∂f_i/∂x_k` of `f_i = Σ_(j≥2) (j − 1) x_j t_i^(j−2) − (Σ_j x_j t_i^(j−1))² − 1` and the two ends."""
    n = len(x)
    gradient = [0.0] * n
    for i in range(1, 30):
        t = i / 29
        p = sum(x[j - 1] * t ** (j - 1) for j in range(1, n + 1))
        f = sum((j - 1) * x[j - 1] * t ** (j - 2) for j in range(2, n + 1)) - p**2 - 1
        for k in range(1, n + 1):
            slope = (k - 1) * t ** (k - 2) if k > 1 else 0.0
            gradient[k - 1] += f * (slope - 2 * p * t ** (k - 1))
    f31 = x[1] - x[0] ** 2 - 1
    gradient[0] += x[0] + f31 * (-2 * x[0])
    gradient[1] += f31
    return gradient


def chebyquad_by_loops(x: list[float]) -> list[float]:
    """`(1/n) Σ_j T_i(x_j) − ∫_0^1 T_i`, with `T_i(x) = cos(i arccos(2x − 1))`, which holds inside [0, 1] only."""
    n = len(x)
    values = []
    for i in range(1, n + 1):
        mean = sum(float(np.cos(i * np.arccos(2 * xj - 1))) for xj in x) / n
        integral = -1 / (i**2 - 1) if i % 2 == 0 else 0.0
        values.append(mean - integral)
    return values


def integral_by_loops(x: list[float]) -> list[float]:
    n = len(x)
    h = 1 / (n + 1)
    values = []
    for i in range(1, n + 1):
        ti = i * h
        left = sum(j * h * (x[j - 1] + j * h + 1) ** 3 for j in range(1, i + 1))
        right = sum((1 - j * h) * (x[j - 1] + j * h + 1) ** 3 for j in range(i + 1, n + 1))
        values.append(x[i - 1] + h * ((1 - ti) * left + ti * right) / 2)
    return values


def boundary_by_loops(x: list[float]) -> list[float]:
    n = len(x)
    h = 1 / (n + 1)
    padded = [0.0, *x, 0.0]
    return [
        2 * padded[i] - padded[i - 1] - padded[i + 1] + h**2 * (padded[i] + i * h + 1) ** 3 / 2 for i in range(1, n + 1)
    ]


def banded_by_loops(x: list[float]) -> list[float]:
    n = len(x)
    values = []
    for i in range(1, n + 1):
        band = [j for j in range(max(1, i - 5), min(n, i + 1) + 1) if j != i]
        values.append(x[i - 1] * (2 + 5 * x[i - 1] ** 2) + 1 - sum(x[j - 1] * (1 + x[j - 1]) for j in band))
    return values


def trigonometric_by_loops(x: list[float]) -> list[float]:
    n = len(x)
    return [
        float(n - sum(np.cos(xj) for xj in x) + i * (1 - np.cos(x[i - 1])) - np.sin(x[i - 1])) for i in range(1, n + 1)
    ]


def tridiagonal_by_loops(x: list[float]) -> list[float]:
    padded = [0.0, *x, 0.0]
    return [(3 - 2 * padded[i]) * padded[i] - padded[i - 1] - 2 * padded[i + 1] + 1 for i in range(1, len(x) + 1)]


def variable_by_loops(x: list[float]) -> list[float]:
    """Half the gradient of `Σ (x_i − 1)² + s² + s⁴` with `s = Σ_j j (x_j − 1)`."""
    s = sum(j * (x[j - 1] - 1) for j in range(1, len(x) + 1))
    return [x[i - 1] - 1 + i * s + 2 * i * s**3 for i in range(1, len(x) + 1)]


def brown_by_loops(x: list[float]) -> list[float]:
    product = 1.0
    for xj in x:
        product *= xj
    return [*(x[i] + sum(x) - (len(x) + 1) for i in range(len(x) - 1)), product - 1]


def chandrasekhar_by_loops(x: list[float]) -> list[float]:
    """With c = 0.9 and midpoints (i − ½)/n as nodes."""
    n = len(x)
    nodes = [(i - 0.5) / n for i in range(1, n + 1)]
    values = []
    for i in range(n):
        integral = sum(nodes[i] * x[j] / (nodes[i] + nodes[j]) for j in range(n))
        values.append(x[i] - 1 / (1 - 0.9 / (2 * n) * integral))
    return values


@pytest.mark.parametrize("n", [2, 6, 9])
@pytest.mark.parametrize(
    "fn, by_loops",
    [
        (mgh.watson, watson_by_loops),
        (mgh.chebyquad, chebyquad_by_loops),
        (mgh.discrete_integral_equation, integral_by_loops),
        (mgh.discrete_boundary_value, boundary_by_loops),
        (mgh.broyden_banded, banded_by_loops),
        (mgh.trigonometric, trigonometric_by_loops),
        (mgh.broyden_tridiagonal, tridiagonal_by_loops),
        (mgh.variably_dimensioned, variable_by_loops),
        (mgh.brown_almost_linear, brown_by_loops),
        (chandrasekhar, chandrasekhar_by_loops),
    ],
    ids=lambda fn: fn.__name__,
)
def test_the_function_is_the_papers(fn: Callable[..., Tensor], by_loops: Callable[..., list[float]], n: int) -> None:
    for _ in range(3):
        z = torch.rand(n, dtype=torch.float64)
        torch.testing.assert_close(
            fn(z, torch), torch.tensor(by_loops(z.tolist()), dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "name, value",
    [
        ("classical-01-rosenbrock", [2.2, -4.4, *[0.0] * 8]),
        ("classical-02-powell-singular", [-7.0, -(5**0.5), 1.0, 4 * 10**0.5]),
        ("classical-03-powell-badly-scaled", [-1.0, np.exp(-1) - 0.0001]),
        ("classical-05-helical-valley", [-50.0, 0.0, 0.0]),
        ("classical-15-hammarling-2x2", [0.9999, -1.0, 0.0, 0.9999]),
        ("classical-16-hammarling-3x3", [0.9999, -1.0, 0.0, 0.0, 0.9999, 0.0, 0.0, 0.0, 0.9999]),
        ("classical-17-dennis-schnabel", [3.0, 17.0]),
        ("classical-18-sample-18", [2 * (1 - np.exp(-4)), 1 - np.exp(-4)]),
        ("classical-19-sample-19", [54.0, 54.0]),
        ("classical-20-scalar", [16.0]),
        ("classical-21-freudenstein-roth", [19.5, -4.5]),
        ("classical-22-boggs", [2.0, 0.0]),
        ("bratu-3", [-3.0] * 1024),
    ],
)
def test_the_residual_at_the_start_by_hand(name: str, value: list[float]) -> None:
    problem = PROBLEMS[name]
    value_at_start = problem.fn(torch.tensor(problem.start, dtype=torch.float64), torch)
    assert value_at_start.tolist() == pytest.approx(value, abs=1e-14)


def test_woods_equations_are_its_gradient() -> None:
    def wood(z: Tensor) -> Tensor:
        a, b, c, d = z
        squares = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
        return squares + 10.1 * ((b - 1) ** 2 + (d - 1) ** 2) + 19.8 * (b - 1) * (d - 1)

    z = torch.randn(4, dtype=torch.float64)
    halved = torch.tensor([0.5, 1.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(mgh.wood(z, torch), halved * torch.func.grad(wood)(z))


@pytest.mark.parametrize("x1, x2", [(0.7, -0.4), (-0.7, 0.4), (-0.7, -0.4), (0.0, 2.0), (0.0, -2.0)])
def test_the_helical_valleys_angle_is_the_papers(x1: float, x2: float) -> None:
    quarter = np.arctan(x2 / x1) / (2 * np.pi) if x1 else 0.25 * np.sign(x2)
    theta = quarter + (0.5 if x1 < 0 else 0.0)
    value = mgh.helical_valley(torch.tensor([x1, x2, 0.3], dtype=torch.float64), torch)
    assert float(value[0]) == pytest.approx(10 * (0.3 - 10 * theta))


def test_chebyquad_of_eight_points_has_no_root() -> None:
    """The paper's minimum of the sum of squares is 3.51687e-3; of nine points it is zero."""
    least = least_squares(lambda z: mgh.chebyquad(z, np), [k / 9 for k in range(1, 9)], xtol=1e-12)
    assert 2 * least.cost == pytest.approx(3.51687e-3, rel=1e-5)
