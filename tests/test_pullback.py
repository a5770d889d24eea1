"""A cell that supplies its pullback: the same gradients as the recorded graph gives, whatever is asked of it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import torchimplicit as ti

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def layer(seed: int = 0) -> ti.nn.TanhEquilibrium:
    made = ti.nn.TanhEquilibrium(5, solver=ti.Newton(rtol=1e-13)).double()
    with torch.no_grad():
        made.linear.weight.copy_(0.4 * normal(5, 5, seed=seed))
    return made


def plain(of: ti.nn.TanhEquilibrium, x: Tensor, z0: Tensor) -> Tensor:
    """The same equation, of a function of which nothing is known."""
    found = ti.fixed_point(
        lambda z: torch.tanh(z @ of.linear.weight.T + x), z0, batch_dims=1, solver=ti.Newton(rtol=1e-13)
    )
    assert isinstance(found.value, Tensor)
    return found.value


def test_nothing_is_recorded_where_the_cell_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x = layer(), normal(3, 5).requires_grad_()
    called: list[bool] = []
    forward = type(of.cell).forward

    def watched(self: Any, z: Tensor, x: Tensor) -> Tensor:
        called.append(torch.is_grad_enabled())
        return forward(self, z, x)

    monkeypatch.setattr(type(of.cell), "forward", watched)
    monkeypatch.setattr(type(of.cell), "linearize", type(of.cell).linearize)
    value = of(x)
    value.sum().backward()
    assert called
    assert not any(called)


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_are_those_of_the_plain_function(rows: int) -> None:
    of, x, v = layer(), normal(rows, 5, seed=1).requires_grad_(), normal(rows, 5, seed=2)
    grads = torch.autograd.grad(of(x), (x, of.linear.weight), v)
    expected = torch.autograd.grad(plain(of, x, torch.zeros_like(x)), (x, of.linear.weight), v)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_input_that_is_broadcast_takes_the_sum() -> None:
    of, x, z0 = layer(), normal(5, seed=3).requires_grad_(), torch.zeros(4, 5, dtype=DOUBLE)
    found = ti.fixed_point(of.cell, z0, x, batch_dims=1, solver=ti.Newton(rtol=1e-13))
    (grad,) = torch.autograd.grad(found.value.square().sum(), x)
    (expected,) = torch.autograd.grad(plain(of, x, z0).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_a_tensor_in_two_places_takes_both_parts() -> None:
    of = layer(4)
    weight = of.linear.weight
    found = ti.fixed_point(of.cell, torch.zeros_like(weight), weight, batch_dims=1, solver=ti.Newton(rtol=1e-13))
    (grad,) = torch.autograd.grad(found.value.sum(), weight)
    (expected,) = torch.autograd.grad(plain(of, weight, torch.zeros_like(weight)).sum(), weight)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_a_weight_that_is_computed_is_differentiated_through() -> None:
    of, x = layer(5), normal(3, 5, seed=6)
    parametrizations.spectral_norm(of.linear)
    of.eval()  # the power iteration's vectors stay as they are
    (original,) = of.parameters()
    (grad,) = torch.autograd.grad(of(x).square().sum(), original)
    (expected,) = torch.autograd.grad(plain(of, x, torch.zeros_like(x)).square().sum(), original)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
    assert grad.abs().max() > 1e-3


def test_only_what_requires_a_gradient_gets_one() -> None:
    of, x = layer(), normal(3, 5)
    of.requires_grad_(False)
    assert not of(x).requires_grad
    x.requires_grad_()
    of(x).sum().backward()
    assert x.grad is not None
    assert of.linear.weight.grad is None


def test_a_weight_that_was_changed_in_between_is_noticed() -> None:
    of, x = layer(), normal(3, 5).requires_grad_()
    value = of(x)
    with torch.no_grad():
        of.linear.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("known", [True, False], ids=["closed form", "recorded"])
def test_an_input_may_be_changed_in_place_afterwards(known: bool) -> None:
    of, leaf, z0 = layer(), normal(3, 5, seed=9).requires_grad_(), torch.zeros(3, 5, dtype=DOUBLE)
    x = 1.0 * leaf
    found = of(x) if known else plain(of, x, z0)
    x += found  # a residual connection; no first derivative reads x
    (grad,) = torch.autograd.grad(x.square().sum(), leaf)
    y = 1.0 * leaf
    (expected,) = torch.autograd.grad((y + plain(of, y, z0)).square().sum(), leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_backward_twice_and_in_a_batch() -> None:
    of, x = layer(), normal(3, 5, seed=7).requires_grad_()
    value, v = of(x), normal(2, 3, 5, seed=8)
    one = [torch.autograd.grad(value, (x, of.linear.weight), each, retain_graph=True) for each in v]
    both = torch.autograd.grad(value, (x, of.linear.weight), v, is_grads_batched=True)
    for i in range(2):
        torch.testing.assert_close(both[0][i], one[i][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(both[1][i], one[i][1], rtol=1e-9, atol=1e-12)


def test_a_sample_whose_adjoint_fails_contributes_nothing() -> None:
    of = layer()
    with torch.no_grad():
        of.linear.weight.copy_(torch.eye(5, dtype=DOUBLE))
    # At x = 0 the equation z = tanh(z) is singular in 0; elsewhere it is regular.
    x = torch.stack((torch.zeros(5, dtype=DOUBLE), torch.ones(5, dtype=DOUBLE))).requires_grad_()
    of.on_failure, of.adjoint = "ignore", ti.Implicit(linear_solver=ti.LU())
    solution = of.solve(x)
    solution.value.sum().backward()
    assert solution.adjoint.status is not None
    assert solution.adjoint.status.tolist() == [ti.Status.SINGULAR, ti.Status.CONVERGED]
    assert x.grad is not None
    assert x.grad[0].count_nonzero() == 0
    assert x.grad[1].count_nonzero() == 5


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["together", "one after the other"])
@pytest.mark.parametrize("solver", [ti.Picard(check_every=8), ti.Anderson(), ti.Newton(), ti.Auto()], ids=repr)
def test_the_slope_is_that_of_the_value_at_the_solution(solver: ti.solvers.Method, spread: float) -> None:
    layer = ti.nn.TanhEquilibrium(20, solver=solver, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.randn(20, 20, dtype=torch.float64, generator=generator) * 0.18)
    x = torch.randn(30, 20, dtype=torch.float64, generator=generator)
    x = (x * torch.linspace(1 / spread, 1, 30, dtype=torch.float64)[:, None]).requires_grad_()
    v = torch.randn(30, 20, dtype=torch.float64, generator=generator)
    solution = layer.solve(x)
    assert (int(solution.steps.max()) > int(solution.steps.min())) or spread == 1.0
    (found,) = torch.autograd.grad(solution.value, x, v)
    weight, z = layer.linear.weight.detach(), solution.value.detach()
    slope = 1 - torch.tanh(z @ weight.T + x.detach()) ** 2
    matrix = torch.eye(20, dtype=torch.float64) - slope[:, :, None] * weight
    expected = slope * torch.linalg.solve(matrix.mT, v[:, :, None])[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
