"""`Picard(extrapolate_every=...)`, and the step of least residual in `Neumann`: fewer steps, the same answers."""

import math

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def slow_mode(rates: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """A matrix with these real eigenvalues, and a right-hand side that holds all of their modes."""
    basis = normal(len(rates), len(rates))
    return basis @ torch.diag(torch.tensor(rates, dtype=DOUBLE)) @ torch.linalg.inv(basis), basis.sum(dim=1)


@pytest.mark.parametrize("check_every", [1, 3, 8])
@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_a_single_real_mode_ends_with_the_first_extrapolation(check_every: int, damping: float) -> None:
    sol = ti.fixed_point(
        lambda z: 0.97 * z + 1.0,
        torch.zeros(3, 1, dtype=DOUBLE),
        batch_dims=1,
        solver=ti.Picard(extrapolate_every=6, damping=damping, check_every=check_every),
    )
    assert bool(sol.converged.all())
    # Six plain steps, one more for the difference, and the extrapolated one.
    assert int(sol.steps.max()) == math.ceil(8 / check_every) * check_every
    torch.testing.assert_close(sol.value, torch.full((3, 1), 1 / 0.03, dtype=DOUBLE), rtol=1e-9, atol=0)


def test_steps_are_halved_by_a_slow_real_mode_and_none_is_counted_twice() -> None:
    matrix, b = slow_mode((0.95, 0.6, 0.4, -0.3))
    calls = []

    def fn(z: Tensor) -> Tensor:
        calls.append(1)
        return z @ matrix.T + b

    z0 = torch.zeros(2, 4, dtype=DOUBLE)
    plain = ti.fixed_point(fn, z0, batch_dims=1, solver=ti.Picard())
    calls.clear()
    fast = ti.fixed_point(fn, z0, batch_dims=1, solver=ti.Picard(extrapolate_every=10))
    assert bool(fast.converged.all())
    assert int(fast.steps.max()) < 0.25 * int(plain.steps.max())
    assert fast.evaluations == int(fast.steps.max()) + 1
    assert sum(calls) == fast.evaluations + 1  # one for the gradient's sake, which is not counted


@pytest.mark.parametrize("check_every", [1, 4, 7])
def test_the_iteration_is_the_same_however_often_it_is_looked_at(check_every: int) -> None:
    weight, x = 0.25 * normal(5, 5, seed=1), normal(4, 5, seed=2)

    def fn(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + x)

    def solve(every: int) -> Tensor:
        solver = ti.Picard(extrapolate_every=5, check_every=every, rtol=0.0, atol=1e-300)
        options = {"batch_dims": 1, "max_steps": 28, "on_failure": "ignore"}
        value = ti.fixed_point(fn, 0 * x, solver=solver, **options).value
        assert isinstance(value, Tensor)
        return value

    torch.testing.assert_close(solve(check_every), solve(2), rtol=0, atol=1e-15)


def test_a_sample_is_the_same_alone_and_in_a_batch() -> None:
    weight, x = 0.3 * normal(6, 6, seed=3), 2 * normal(7, 6, seed=4)
    solver = ti.Picard(extrapolate_every=6, check_every=6)

    def solve(x: Tensor) -> ti.Solution:
        return ti.fixed_point(lambda z, x: torch.tanh(z @ weight.T + x), 0 * x, x, batch_dims=1, solver=solver)

    together = solve(x)
    for i in range(7):
        alone = solve(x[i : i + 1])
        assert int(alone.steps) == int(together.steps[i])
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=0, atol=1e-13)


def test_a_step_that_made_it_worse_is_taken_back_and_is_the_samples_last() -> None:
    """Far out the map looks like z/2 + 30, whose fixed point is 60; there it is cut off, and falls back only slowly."""

    def fn(z: Tensor) -> Tensor:
        return torch.where(z < 40, 0.9 * z + 3.0 - 0.0004 * z**2, z - 7 + torch.sin(z))

    solver = ti.Picard(extrapolate_every=3)
    together = ti.fixed_point(fn, torch.tensor([[0.0], [10.0]], dtype=DOUBLE), batch_dims=1, solver=solver)
    plain = ti.fixed_point(fn, torch.tensor([[0.0], [10.0]], dtype=DOUBLE), batch_dims=1, solver=ti.Picard())
    assert bool(together.converged.all())
    torch.testing.assert_close(together.value, plain.value, rtol=1e-9, atol=0)


def test_complex_modes_that_no_extrapolation_removes_do_no_harm() -> None:
    turn = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    b = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    z0 = torch.zeros(1, 2, dtype=DOUBLE)
    plain = ti.fixed_point(lambda z: z @ turn.T + b, z0, batch_dims=1, solver=ti.Picard())
    fast = ti.fixed_point(lambda z: z @ turn.T + b, z0, batch_dims=1, solver=ti.Picard(extrapolate_every=8))
    assert bool(fast.converged.all())
    assert int(fast.steps.max()) <= 1.1 * int(plain.steps.max())


def test_extrapolation_and_searched_damping_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"damping_patience.*extrapolate_every"):
        ti.Picard(extrapolate_every=5, damping_patience=3)
    with pytest.raises(ValueError, match=r"extrapolate_every"):
        ti.Picard(extrapolate_every=1)


@pytest.mark.parametrize("kind", ["fixed_point", "root"])
def test_gradients_are_those_of_any_other_solver(kind: str) -> None:
    weight = (0.3 * normal(5, 5, seed=5)).requires_grad_()
    x = normal(3, 5, seed=6).requires_grad_()

    def fn(z: Tensor, x: Tensor) -> Tensor:
        out = torch.tanh(z @ weight.T + x)
        return out if kind == "fixed_point" else z - out

    call = ti.fixed_point if kind == "fixed_point" else ti.root
    grads = []
    for solver in (ti.Picard(extrapolate_every=4, rtol=1e-13), ti.Newton(rtol=1e-13)):
        sol = call(fn, torch.zeros(3, 5, dtype=DOUBLE), x, batch_dims=1, solver=solver)
        grads.append(torch.autograd.grad(sol.value.square().sum(), (weight, x)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_neumanns_long_step_removes_a_slow_real_mode() -> None:
    matrix, b = slow_mode((0.97, 0.5, 0.2, -0.4))
    weight = matrix.clone().requires_grad_()
    sol = ti.fixed_point(
        lambda z: z @ weight.T + b,
        torch.zeros(1, 4, dtype=DOUBLE),
        batch_dims=1,
        solver=ti.Newton(),
        adjoint=ti.Implicit(linear_solver=ti.Neumann(slowest=0.99, patience=2)),
    )
    sol.value.sum().backward()
    assert sol.adjoint.status is not None
    assert int(sol.adjoint.status.max()) == 0
    # The series alone takes ln(3.7e-11)/ln(0.97) = 790 products.
    assert sol.adjoint.steps is not None
    assert int(sol.adjoint.steps.max()) < 120
    inverse = torch.linalg.inv(torch.eye(4, dtype=DOUBLE) - matrix)
    u = inverse.T @ torch.ones(4, dtype=DOUBLE)
    torch.testing.assert_close(weight.grad, torch.outer(u, inverse @ b), rtol=1e-8, atol=1e-10)
