"""Implicit layers in the cell of an implicit layer: right first derivatives, and higher ones right or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, vmap

import torchimplicit as ti
from tests.torch_features.cells import EXACT, LAYERS, close, inputs, loss, unrolled

EVERY_INNER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


class Outer(nn.Module):
    """`0.2 inner(z) + x`."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.exact = False

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.2 * (unrolled(self.inner, z, 40) if self.exact else self.inner(z)) + x


def truth(cell: Outer, x: Tensor) -> Tensor:
    cell.exact = True
    z = torch.zeros_like(x)
    for _ in range(26):
        z = cell(z, x)
    cell.exact = False
    return z


OUTER: dict[str, Callable[[Outer, Tensor], Tensor]] = {
    "picard": lambda cell, x: ti.nn.FixedPoint(cell, solver=ti.Picard(rtol=1e-12), adjoint=EXACT)(x),
    "anderson": lambda cell, x: ti.nn.FixedPoint(cell, solver=ti.Anderson(rtol=1e-12), adjoint=EXACT)(x),
    "broyden": lambda cell, x: ti.nn.FixedPoint(cell, solver=ti.Broyden(rtol=1e-12), adjoint=EXACT)(x),
    "newton": lambda cell, x: ti.nn.FixedPoint(cell, solver=ti.Newton(rtol=1e-12), adjoint=EXACT)(x),
    "krylov": lambda cell, x: ti.nn.FixedPoint(
        cell, solver=ti.Newton(linear_solver=ti.GMRES(), rtol=1e-12), adjoint=ti.Implicit(ti.LU())
    )(x),
    "root": lambda cell, x: ti.root(lambda z: z - cell(z, x), torch.zeros_like(x), batch_dims=1).value,
}


@EVERY_INNER
@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER.keys())
def test_first_derivatives_are_those_of_the_unrolled_model(make: Any, outer: Any) -> None:
    cell, x = Outer(make()), inputs(2).requires_grad_()
    wanted = [x, *cell.parameters()]
    z, exact = outer(cell, x), truth(cell, x)
    torch.testing.assert_close(z, exact, atol=1e-9, rtol=0)
    close(torch.autograd.grad(loss(z), wanted), torch.autograd.grad(loss(exact), wanted), 1e-8)


def test_three_layers_in_each_other() -> None:
    middle = Outer(LAYERS["autograd"]())
    cell = Outer(ti.nn.FixedPoint(middle, solver=ti.Auto(rtol=1e-12), adjoint=EXACT))
    layer, x = ti.nn.FixedPoint(cell, solver=ti.Auto(rtol=1e-12), adjoint=EXACT), inputs(2).requires_grad_()
    wanted = [x, *cell.parameters()]
    z = torch.zeros_like(x)
    for _ in range(12):
        z = 0.2 * truth(middle, z) + x
    close(torch.autograd.grad(loss(layer(x)), wanted), torch.autograd.grad(loss(z), wanted), 1e-5)


def test_an_inner_solve_that_closes_over_the_outer_state() -> None:
    a, x = torch.tensor(0.4, dtype=torch.float64, requires_grad=True), inputs(2).requires_grad_()

    def outer(z: Tensor) -> Tensor:
        inner = ti.fixed_point(lambda u: torch.cos(a * u + z), torch.zeros_like(z), batch_dims=1, adjoint=EXACT)
        return 0.5 * inner.value + x

    z = ti.fixed_point(outer, torch.zeros_like(x), batch_dims=1, solver=ti.Auto(rtol=1e-12), adjoint=EXACT).value
    found = torch.autograd.grad(loss(z), [a, x])
    y = torch.zeros_like(x)
    for _ in range(50):
        u = torch.zeros_like(x)
        for _ in range(40):
            u = torch.cos(a * u + y)
        y = 0.5 * u + x
    close(found, torch.autograd.grad(loss(y), [a, x]), 1e-8)


def test_an_implicit_layer_in_an_objective() -> None:
    """Its gradient has a derivative of the layer in it, and the derivative of the minimum a second one."""
    layer, x = LAYERS["autograd"](), inputs(2).requires_grad_()
    wanted = [x, *layer.parameters()]

    def minimum(solve: Callable[[Tensor], Tensor]) -> Tensor:
        return ti.minimize(
            lambda z: 0.5 * (z - x).square().sum(1) + 0.1 * solve(z).square().sum(1),
            torch.zeros_like(x),
            batch_dims=1,
            on_failure="raise",
            solver=ti.Auto(rtol=1e-11),
        ).value

    z, exact = minimum(layer), minimum(lambda z: unrolled(layer, z, 60))
    torch.testing.assert_close(z, exact, atol=1e-9, rtol=0)
    close(torch.autograd.grad(loss(z), wanted), torch.autograd.grad(loss(exact), wanted), 1e-8)


def second(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    return torch.autograd.grad(g.square().sum(), leaf)[0]


HIGHER: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "create_graph": second,
    "func.grad": lambda f, x: grad(f)(x),
    "hessian": lambda f, x: hessian(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "grad of grad": lambda f, x: grad(lambda x: grad(f)(x).square().sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda row: f(row[None])))(x),
}


@pytest.mark.parametrize("inner", LAYERS)
@pytest.mark.parametrize("name", HIGHER)
def test_what_else_is_asked_for_is_right_or_refused(inner: str, name: str) -> None:
    """An inner layer with a closed form is seen through by the transforms; everything else is an error."""
    cell, x, higher = Outer(LAYERS[inner]()), inputs(2), HIGHER[name]

    def found() -> Tensor:
        return higher(lambda x: loss(OUTER["anderson"](cell, x)), x)

    if inner != "closed" or name == "create_graph":
        with pytest.raises(RuntimeError, match="every operation of fn"):
            found()
        return
    expected = higher(lambda x: loss(truth(cell, x)), x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found(), expected, atol=1e-7, rtol=0)
