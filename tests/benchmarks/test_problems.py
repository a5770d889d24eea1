"""The test problems: starts of the literature, roots or none, and the same function for every library and batch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.problems import CLASSICAL, LARGE, LARGER, MGH, PROBLEMS, Problem, mgh
from benchmarks.problems.large import bratu

SMALL = [problem for problem in PROBLEMS.values() if problem.n <= 10]
ROOTLESS = [problem for problem in PROBLEMS.values() if not problem.has_root]


def start(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(problem.start, dtype=dtype)


def residual(problem: Problem, z: object) -> Tensor:
    return problem.fn(torch.as_tensor(z, dtype=torch.float64), torch)


def test_every_problem_is_listed_once_and_in_its_sets() -> None:
    assert len(PROBLEMS) == len(CLASSICAL) + len(LARGER) == 98
    assert [problem.name[10:12] for problem in CLASSICAL] == [f"{number:02}" for number in range(1, 24)]
    assert len(MGH) == 42
    assert {tag: sum(tag in p.tags for p in MGH) for tag in ("mgh-x1", "mgh-x10", "mgh-x100")} == {
        "mgh-x1": 14,
        "mgh-x10": 14,
        "mgh-x100": 14,
    }
    assert all(("rootless" in problem.tags) == (not problem.has_root) for problem in PROBLEMS.values())


def test_a_problem_refuses_a_root_of_another_size_or_that_it_denies() -> None:
    with pytest.raises(ValueError, match="2 unknowns has 2 numbers, not 1"):
        Problem("x", (0.0, 0.0), mgh.rosenbrock, ((1.0,),))
    with pytest.raises(ValueError, match="has_root=False"):
        Problem("x", (0.0,), mgh.rosenbrock, ((1.0,),), has_root=False)
    with pytest.raises(ValueError, match="lower case"):
        Problem("Big Name", (0.0,), mgh.rosenbrock)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS.values() if p.roots], ids=lambda p: p.name)
def test_known_roots_are_roots(problem: Problem) -> None:
    for root in problem.roots:
        assert residual(problem, root).abs().max() <= 1e-12


def test_starts_are_those_of_the_literature() -> None:
    starts = {problem.name: problem.start for problem in (*CLASSICAL, *MGH)}
    assert starts["classical-01-rosenbrock"] == (-1.2, *(1.0,) * 9)
    assert starts["classical-02-powell-singular"] == (3.0, -1.0, 0.0, 1.0)
    assert starts["classical-03-powell-badly-scaled"] == (0.0, 1.0)
    assert starts["classical-04-wood"] == (-3.0, -1.0, -3.0, -1.0)
    assert starts["classical-05-helical-valley"] == (-1.0, 0.0, 0.0)
    assert starts["classical-06-watson"] == (0.0,) * 6
    assert starts["classical-07-chebyquad"] == pytest.approx((-1 / 3, 1 / 3))
    assert starts["classical-08-brown-almost-linear"] == (0.5,) * 10
    for name in ("classical-09-discrete-boundary-value", "classical-10-discrete-integral-equation"):
        assert starts[name] == pytest.approx([i * (i - 11) / 121 for i in range(1, 11)])
    assert starts["classical-11-trigonometric"] == (0.1,) * 10
    assert starts["classical-12-variably-dimensioned"] == pytest.approx([0.1 * k for k in range(9, -1, -1)])
    assert starts["classical-13-broyden-tridiagonal"] == starts["classical-14-broyden-banded"] == (-1.0,) * 10
    assert starts["classical-15-hammarling-2x2"] == (1.0, 0.0, 0.0, 1.0)
    assert starts["classical-16-hammarling-3x3"] == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    assert starts["classical-17-dennis-schnabel"] == (1.0, 5.0)
    assert starts["classical-18-sample-18"] == (2.0, 2.0)
    assert starts["classical-19-sample-19"] == (3.0, 3.0)
    assert starts["classical-20-scalar"] == (1.0,)
    assert starts["classical-21-freudenstein-roth"] == (0.5, -2.0)
    assert starts["classical-22-boggs"] == (1.0, 0.0)
    assert starts["classical-23-chandrasekhar"] == (1.0,) * 10
    assert starts["mgh-rosenbrock-x1"] == (-1.2, 1.0)
    assert starts["mgh-chebyquad-x1"] == pytest.approx([j / 8 for j in range(1, 8)])


def test_far_starts_are_multiples_and_watsons_are_all_equal() -> None:
    starts = {problem.name: problem.start for problem in MGH}
    assert starts["mgh-wood-x10"] == (-30.0, -10.0, -30.0, -10.0)
    assert starts["mgh-rosenbrock-x100"] == pytest.approx((-120.0, 100.0))
    assert starts["mgh-watson-x1"] == (0.0,) * 6
    assert starts["mgh-watson-x10"] == (10.0,) * 6
    assert starts["mgh-watson-x100"] == (100.0,) * 6


# --- one formula for all libraries, dtypes and batches ----------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_torch_and_numpy_agree(problem: Problem) -> None:
    for z in (start(problem), start(problem) + 0.1 * torch.randn(problem.n, dtype=torch.float64)):
        with np.errstate(all="ignore"):
            value = problem.fn(z.numpy(), np)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, problem.fn(z, torch).numpy(), rtol=1e-12, atol=1e-13 * scale(value))


@pytest.fixture
def jax64() -> Iterator[Any]:
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


def test_torch_and_jax_agree(jax64: Any) -> None:
    once = {problem.fn: problem for problem in PROBLEMS.values()}
    for fn, problem in once.items():
        z = start(problem)
        value = np.asarray(jax64.jit(fn, static_argnums=1)(jax64.numpy.asarray(z.numpy()), jax64.numpy))
        expected = problem.fn(z, torch).numpy()
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-13 * scale(expected), err_msg=problem.name)


def scale(value: np.ndarray) -> float:
    return float(np.abs(value[np.isfinite(value)]).max(initial=1.0))


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_a_batch_is_its_rows(problem: Problem) -> None:
    rows = start(problem) + torch.tensor([0.0, 0.1, -0.2, 0.3], dtype=torch.float64)[:, None]
    single = torch.stack([problem.fn(row, torch) for row in rows])
    batch = problem.fn(rows.reshape(2, 2, -1), torch).reshape(4, -1)
    torch.testing.assert_close(batch, single, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
def test_the_dtype_is_that_of_the_unknowns(problem: Problem) -> None:
    assert problem.fn(start(problem, torch.float32), torch).dtype == torch.float32


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem", [p for p in SMALL if torch.isfinite(residual(p, p.start)).all()], ids=lambda p: p.name
)
def test_the_jacobian_at_the_start_is_that_of_finite_differences(problem: Problem) -> None:
    z = start(problem)
    jacobian = torch.func.jacrev(lambda z: problem.fn(z, torch))(z)
    steps = 1e-5 * z.abs().clamp_min(1.0)
    moved = torch.diag(steps)
    differences = ((problem.fn(z + moved, torch) - problem.fn(z - moved, torch)) / (2 * steps)[:, None]).T
    largest = max(1.0, float(jacobian.abs().max()))
    torch.testing.assert_close(jacobian / largest, differences / largest, rtol=0, atol=1e-8)


@pytest.mark.parametrize("problem", LARGE, ids=lambda p: p.name)
def test_derivatives_of_large_problems_are_those_of_finite_differences(problem: Problem) -> None:
    z = start(problem)
    direction = torch.randn(problem.n, dtype=torch.float64)
    _, forward = torch.func.jvp(lambda z: problem.fn(z, torch), (z,), (direction,))
    difference = (problem.fn(z + 1e-5 * direction, torch) - problem.fn(z - 1e-5 * direction, torch)) / 2e-5
    torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-6 * float(forward.abs().max()))


@pytest.mark.parametrize("at", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_the_holes_of_sample_18_have_no_nan_in_their_derivative(at: tuple[float, float]) -> None:
    fn = PROBLEMS["classical-18-sample-18"].fn
    z = torch.tensor(at, dtype=torch.float64)
    assert torch.func.jacrev(lambda z: fn(z, torch))(z).isfinite().all()
    near = fn(z + 1e-9, torch)
    torch.testing.assert_close(fn(z, torch), near, rtol=0, atol=1e-8)


# --- that there is a root, or none ------------------------------------------------------------------------------------


def newton(fn: Callable[[Tensor], Tensor], z: Tensor, steps: int = 40) -> Tensor:
    """Plain Newton steps until the residual is zero to rounding."""
    for _ in range(steps):
        value = fn(z)
        if value.abs().max() <= 1e-13:
            break
        z = z - torch.linalg.solve(torch.func.jacrev(fn)(z), value)
    return z


NEAR_CHEBYQUAD = [0.058, 0.235, 0.338, 0.5, 0.662, 0.765, 0.942]


@pytest.mark.parametrize(
    "problem",
    [p for p in (*CLASSICAL, *MGH, *LARGE) if not p.roots and "x10" not in p.name and "bratu" not in p.name],
    ids=lambda p: p.name,
)
def test_the_tolerance_of_the_table_can_be_reached(problem: Problem) -> None:
    # From Chebyquad's start plain Newton steps do not arrive.
    near = torch.tensor(NEAR_CHEBYQUAD).double() if "chebyquad" in problem.name else start(problem)
    z = newton(lambda z: problem.fn(z, torch), near, steps=15)
    assert residual(problem, z).abs().max() <= 1e-9


def test_bratus_equation_has_a_root_up_to_just_below_the_fold() -> None:
    """The root at λ = 6.8, from that of a smaller λ, is on the lower branch, below the fold."""
    u = torch.zeros(32**2, dtype=torch.float64)
    for strength in (5.0, 6.5, 6.8):
        u = newton(lambda u, strength=strength: bratu(u, torch, strength), u, steps=8)
    assert bratu(u, torch, 6.8).abs().max() <= 1e-8
    grid = u.reshape(32, 32)
    torch.testing.assert_close(grid, grid.T)
    assert 1.3 < float(u.max()) < 1.39  # the continuum's fold is at 1.39


@pytest.mark.parametrize("problem", [p for p in ROOTLESS if p.n <= 2], ids=lambda p: p.name)
def test_small_rootless_problems_stay_away_from_zero_on_a_grid(problem: Problem) -> None:
    line = torch.linspace(-5, 5, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(*[line] * problem.n).reshape(-1, problem.n)
    least = float(problem.fn(grid, torch).abs().amax(-1).min())
    assert least > (1e-8 if problem.name == "near-miss" else 1e-5)


def test_near_miss_is_a_miss_by_more_than_the_tolerance() -> None:
    assert float(residual(PROBLEMS["near-miss"], [0.0])) == pytest.approx(1e-6)


def test_asymptotic_problems_meet_any_tolerance_far_out() -> None:
    for problem in ROOTLESS:
        if "asymptotic" in problem.tags:
            assert residual(problem, [1e5] * problem.n).abs().max() < 1e-8


def test_starts_outside_the_domain_are_not_finite_and_their_roots_are_inside() -> None:
    outside = [p for p in PROBLEMS.values() if "not finite at the start" in p.tags]
    assert len(outside) == 6
    for problem in outside:
        assert not residual(problem, problem.start).isfinite().all()
        assert problem.roots
