"""Hooks of modules and tensors, on the layer and in the cell."""

from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti
from tests.torch_features.cells import (
    EVERY_LAYER,
    EXACT,
    TIGHT,
    Cell,
    agrees_with_unrolled,
    close,
    gradients,
    inputs,
    loss,
    unrolled,
)


@EVERY_LAYER
def test_forward_hooks_of_the_layer_are_called_once_and_may_change_what_goes_in_and_comes_out(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    wanted = [x, *layer.parameters()]
    expected = 3 * unrolled(layer, 2 * x)
    calls: list[str] = []

    def before(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        calls.append("before")
        return 2 * args[0]

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        calls.append("after")
        return 3 * output

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
    z = layer(x)
    assert calls == ["before", "after"]
    torch.testing.assert_close(z, expected, atol=1e-10, rtol=0)
    close(gradients(z, wanted), gradients(expected, wanted))


@EVERY_LAYER
def test_backward_hooks_of_the_layer_see_its_gradients_once(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    seen: list[Tensor] = []
    layer.register_full_backward_pre_hook(lambda module, grads: seen.append(grads[0].clone()))
    layer.register_full_backward_hook(lambda module, inside, outside: seen.extend((inside[0], outside[0])))
    z = layer(x)
    z.retain_grad()
    loss(z).backward()
    assert len(seen) == 3
    before, inside, outside = seen
    truth = unrolled(layer, x)
    (expected,) = torch.autograd.grad(loss(truth), x, retain_graph=True)
    (by_value,) = torch.autograd.grad(loss(truth), truth)
    close([before, outside], [by_value, by_value])
    close([inside, x.grad], [expected, expected])


@EVERY_LAYER
def test_a_backward_hook_of_the_layer_may_change_the_gradient(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    layer.register_full_backward_hook(lambda module, inside, outside: (2 * inside[0],))
    (found,) = gradients(layer(x), [x])
    (expected,) = gradients(unrolled(layer, x), [x])
    close([found], [2 * expected])


@EVERY_LAYER
def test_hooks_of_the_cell_and_within_it_change_the_equation(make: Any) -> None:
    """They are called at every evaluation, as the cell is; the unrolled iteration calls them, too."""
    layer = make()
    layer.cell.linear.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    layer.cell.linear.register_forward_hook(lambda module, args, output: 0.7 * output)
    agrees_with_unrolled(layer, inputs())
    layer = make()
    layer.cell.register_forward_pre_hook(lambda module, args: (args[0], args[1] + 0.3))
    agrees_with_unrolled(layer, inputs())


@EVERY_LAYER
def test_forward_hooks_of_the_cell_are_called_at_every_evaluation(make: Any) -> None:
    layer, calls = make(), [0, 0]
    layer.solver = ti.Newton(linear_solver=ti.GMRES(), rtol=1e-12)  # whose products call nothing

    def count(i: int) -> Any:
        return lambda *_: calls.__setitem__(i, calls[i] + 1)

    layer.cell.register_forward_hook(count(0))
    layer.cell.linear.register_forward_hook(count(1))
    with torch.no_grad():
        solution = layer.solve(inputs())
    assert calls[0] == calls[1]
    assert int(solution.steps.max()) < calls[0] <= solution.evaluations


@EVERY_LAYER
def test_backward_hooks_of_the_cell_change_every_product_with_its_jacobian(make: Any) -> None:
    """As they do in the unrolled iteration, where they are called at every step."""
    for module in (lambda layer: layer.cell, lambda layer: layer.cell.linear):
        layer, calls = make(), [0]

        def halve(m: nn.Module, inside: Any, outside: Any, calls: list[int] = calls) -> Any:
            calls[0] += 1
            return tuple(None if g is None else 0.5 * g for g in inside)

        module(layer).register_full_backward_hook(halve)
        x = inputs().requires_grad_()
        wanted = [x, *layer.parameters()]
        found = gradients(layer(x), wanted)
        assert calls[0] > 0
        if not isinstance(layer, ti.nn.Root):  # z − f(z): half of its gradient is not that of a half of f
            close(found, gradients(unrolled(layer, x), wanted))


def test_hooks_of_tensors_are_called_once() -> None:
    layer, x = ti.nn.FixedPoint(Cell(), solver=TIGHT, adjoint=EXACT), inputs().requires_grad_()
    weight = layer.cell.linear.weight
    (expected,) = gradients(unrolled(layer, x), [weight])
    calls: list[str] = []
    x.register_hook(lambda g: calls.append("x"))
    weight.register_hook(lambda g: calls.append("weight") or 2 * g)
    weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    z = layer(x)
    z.register_hook(lambda g: calls.append("z"))
    loss(z).backward()
    assert sorted(calls) == ["accumulated", "weight", "x", "z"]
    close([weight.grad], [2 * expected])


def test_an_optimiser_may_step_in_the_backward_pass() -> None:
    """Each parameter is updated, and its gradient freed, as soon as it has been accumulated."""
    layer, x = ti.nn.FixedPoint(Cell(), solver=TIGHT, adjoint=EXACT), inputs()
    before = [p.detach().clone() for p in layer.parameters()]
    expected = gradients(unrolled(layer, x), layer.parameters())

    def step(p: Tensor) -> None:
        with torch.no_grad():
            p.sub_(0.1 * p.grad)
        p.grad = None

    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(step)
    loss(layer(x)).backward()
    close([(b - p) / 0.1 for b, p in zip(before, layer.parameters(), strict=True)], expected)
    assert all(p.grad is None for p in layer.parameters())
