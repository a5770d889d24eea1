"""The default solver: it escalates sample by sample, solves the classical problems, and claims nothing false."""

import math

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from benchmarks.problems import CLASSICAL, DOMAIN, ROOTLESS, Problem

DOUBLE = torch.float64
SOLVED = 1e-8


def _solve(problem: Problem, z0: Tensor, solver: ti.solvers.Method | None = None) -> tuple[ti.Solution, Tensor]:
    """The solution, and `max|F|` of each sample at the returned value."""
    with torch.no_grad():
        sol = ti.root(lambda z: problem.fn(z, torch), z0, solver=solver, batch_dims=z0.ndim - 1, on_failure="ignore")
        return sol, problem.fn(sol.value, torch).abs().amax(-1)


def _start(problem: Problem) -> Tensor:
    return torch.tensor(problem.start, dtype=DOUBLE)


def _perturbed(problem: Problem, size: float, samples: int = 16) -> Tensor:
    """Starts moved by up to `size`, relative to each entry, or by up to `size` where that is 0."""
    z0, generator = _start(problem), torch.Generator().manual_seed(0)
    noise = size * (2 * torch.rand(samples, problem.n, generator=generator, dtype=DOUBLE) - 1)
    return z0 + noise * torch.where(z0 == 0, 1.0, z0)


@pytest.mark.parametrize("problem", CLASSICAL, ids=lambda p: p.name)
def test_default_solves_every_classical_problem_from_its_standard_start(problem: Problem) -> None:
    sol, residual = _solve(problem, _start(problem))
    assert sol.converged
    assert residual <= SOLVED


@pytest.mark.parametrize("problem", CLASSICAL, ids=lambda p: p.name)
def test_default_solves_every_classical_problem_from_starts_nearby_as_one_batch(problem: Problem) -> None:
    for size, share in ((0.01, 1.0), (0.1, 0.95)):
        sol, residual = _solve(problem, _perturbed(problem, size))
        assert (residual <= SOLVED).double().mean() >= share
        assert not (sol.converged & (residual > 1e-4)).any()


@pytest.mark.parametrize("name", ["01-rosenbrock", "11-trigonometric", "15-hammarling-2x2", "21-freudenstein-roth"])
def test_hard_sample_ends_where_it_does_alone(name: str) -> None:
    """These go through several stages, some of their neighbours through fewer."""
    (problem,) = (p for p in CLASSICAL if p.name.endswith(name))
    z0 = _perturbed(problem, 0.1, samples=6)
    together, _ = _solve(problem, z0)
    for i in (0, 3, 5):
        alone, _ = _solve(problem, z0[i : i + 1])
        torch.testing.assert_close(together.value[i], alone.value[0], rtol=1e-12, atol=1e-12)
        assert together.status[i] == alone.status[0]
        assert together.steps[i] == alone.steps[0]


@pytest.mark.parametrize("problem", [p for p in ROOTLESS if p.n <= 10], ids=lambda p: p.name)
def test_default_reports_a_failure_where_there_is_no_root(problem: Problem) -> None:
    sol, _ = _solve(problem, _start(problem))
    assert not sol.converged
    assert sol.value.isfinite().all()


@pytest.mark.parametrize("problem", DOMAIN, ids=lambda p: p.name)
def test_default_gets_out_of_where_the_function_is_not_finite(problem: Problem) -> None:
    sol, residual = _solve(problem, _start(problem))
    assert sol.converged
    assert residual <= SOLVED


def test_a_contraction_is_solved_by_the_first_stage_alone() -> None:
    """As its first stage alone, evaluation for evaluation: the default costs nothing where nothing is hard."""
    torch.manual_seed(0)
    weight = 0.8 * torch.linalg.qr(torch.randn(20, 20, dtype=DOUBLE))[0]
    x = torch.randn(8, 20, dtype=DOUBLE)
    solutions = [
        ti.fixed_point(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), solver=solver, batch_dims=1)
        for solver in (None, ti.Anderson(adaptive=True, check_every=2))
    ]
    assert solutions[0].evaluations == solutions[1].evaluations
    assert torch.equal(solutions[0].value, solutions[1].value)


def test_only_the_samples_that_need_it_go_on_to_newton() -> None:
    """Slopes of J in each sample: 0.5 contracts, 3 does not, and neither does −5."""
    slope = torch.tensor([[0.5], [3.0], [-5.0]], dtype=DOUBLE)
    sol = ti.fixed_point(lambda z: slope * torch.sin(z) + 1, torch.zeros(3, 1, dtype=DOUBLE), batch_dims=1)
    assert sol.converged.all()
    torch.testing.assert_close(slope * torch.sin(sol.value) + 1, sol.value, rtol=1e-9, atol=1e-9)
    assert sol.steps[0] < 10


@pytest.mark.parametrize("gamma", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_symmetric_linear_maps_take_no_more_than_the_krylov_bound(gamma: float) -> None:
    """`ln(ε)/ln(q)` steps, `q = γ/(1 + √(1 − γ²))`: the Chebyshev bound of the best method that there is."""
    n, generator = 200, torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))
    matrix = (basis * torch.linspace(-gamma, gamma, n, dtype=DOUBLE)) @ basis.T
    b = torch.randn(n, generator=generator, dtype=DOUBLE)
    for tolerance in (1e-6, 1e-9):
        bound = math.log(tolerance) / math.log(gamma / (1 + math.sqrt(1 - gamma**2)))
        for solver in (ti.Anderson, ti.Auto):
            exact = solver(atol=float(tolerance * b.norm()), rtol=0.0, norm="two")
            sol = ti.fixed_point(lambda z: matrix @ z + b, torch.zeros_like(b), solver=exact)
            assert sol.converged
            assert sol.evaluations <= 1.3 * bound


def test_max_steps_bounds_all_stages_together() -> None:
    sol = ti.root(lambda z: z * z + 1, torch.ones((), dtype=DOUBLE), max_steps=25, on_failure="ignore")
    assert sol.steps <= 25
    assert not sol.converged


def test_trace_runs_through_all_stages() -> None:
    sol = ti.root(lambda z: z * z + 1, torch.ones((), dtype=DOUBLE), trace=True, on_failure="ignore")
    assert sol.trace is not None
    assert sol.trace.shape[0] == int(sol.steps)
    assert sol.trace.min() >= sol.residual * (1 - 1e-12)


@pytest.mark.parametrize("solver", [None, ti.Auto(atol=1e-8, rtol=0.0, norm="max")], ids=["default", "atol"])
def test_asymptotic_zero_is_no_root(solver: ti.Auto | None) -> None:
    """`exp(−z)` is below any tolerance far out, and Newton's step is still 1 there."""
    z0 = torch.zeros(2, 1, dtype=DOUBLE)
    sol = ti.root(lambda z: torch.exp(-z), z0, solver=solver, batch_dims=1, on_failure="ignore")
    assert not sol.converged.any()


def test_huge_residual_at_the_start_does_not_make_anything_converged() -> None:
    """`rtol·‖F(z0)‖` is 10²² here."""
    sol = ti.root(lambda z: torch.exp(z) - 1, torch.full((), 80.0, dtype=DOUBLE))
    assert sol.converged
    assert abs(sol.value.item()) <= 1e-9
