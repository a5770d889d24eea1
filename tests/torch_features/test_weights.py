"""Weights that are computed from others, shared, pruned or replaced: the layer follows what is there now."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import torchimplicit as ti
from tests.torch_features.cells import (
    EVERY_LAYER,
    EXACT,
    FEATURES,
    TIGHT,
    Cell,
    agrees_with_unrolled,
    closed_layer,
    inputs,
    unrolled,
)


class Symmetric(nn.Module):
    """`(W + Wᵀ) / 2`."""

    def forward(self, w: Tensor) -> Tensor:
        return 0.5 * (w + w.T)


class Dropped(nn.Module):
    """Entries of the weight dropped at random, in training."""

    def forward(self, w: Tensor) -> Tensor:
        return torch.nn.functional.dropout(w, 0.3, self.training)


def spectral_norm_by_hook(linear: nn.Linear) -> None:
    nn.utils.spectral_norm(linear, n_power_iterations=20)
    linear(inputs(1))  # its first power iterations


WEIGHTS: dict[str, Callable[[nn.Linear], Any]] = {
    "parametrize": lambda linear: parametrize.register_parametrization(linear, "weight", Symmetric()),
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm by hook": spectral_norm_by_hook,
    "pruned": lambda linear: prune.random_unstructured(linear, "weight", amount=0.4),
}
EVERY_WEIGHT = pytest.mark.parametrize("norm", WEIGHTS.values(), ids=WEIGHTS.keys())


@EVERY_LAYER
@EVERY_WEIGHT
def test_computed_weights_have_the_gradients_of_the_unrolled_iteration(make: Any, norm: Any) -> None:
    layer = make()
    norm(layer.cell.linear)
    agrees_with_unrolled(layer.eval(), inputs())


@EVERY_LAYER
@EVERY_WEIGHT
def test_computed_weights_follow_a_change_of_what_they_are_computed_from(make: Any, norm: Any) -> None:
    layer, x = make(), inputs()
    norm(layer.cell.linear)
    layer.eval()
    before = layer(x)
    before.sum().backward()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert (layer(x) - before).abs().max() > 1e-3
    agrees_with_unrolled(layer, x)


@EVERY_LAYER
def test_spectral_norm_in_training_takes_one_power_iteration_per_solve(make: Any) -> None:
    layer = make()
    parametrizations.spectral_norm(layer.cell.linear)
    with torch.no_grad():  # far from the converged power iteration that torch starts with
        layer.cell.linear.parametrizations.weight.original.copy_(torch.randn(FEATURES, FEATURES))
    layer.train()
    twin = copy.deepcopy(layer)
    solution = layer.solve(inputs())
    assert solution.converged.all()
    twin.cell.linear.weight  # noqa: B018 - one access is one iteration
    found, expected = (m.cell.linear.parametrizations.weight[0]._u for m in (layer, twin))
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)


@EVERY_LAYER
def test_a_parametrization_that_draws_is_drawn_once_per_solve(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    parametrize.register_parametrization(layer.cell.linear, "weight", Dropped())
    layer.train()
    torch.manual_seed(5)
    z = layer(x)
    z.sum().backward()
    torch.manual_seed(5)
    weight = layer.cell.linear.weight.detach()
    parametrize.remove_parametrizations(layer.cell.linear, "weight")
    with torch.no_grad():
        layer.cell.linear.weight.copy_(weight)
    again = x.detach().clone().requires_grad_()
    fixed = unrolled(layer, again)
    fixed.sum().backward()
    torch.testing.assert_close(z, fixed, atol=1e-10, rtol=0)
    torch.testing.assert_close(x.grad, again.grad, atol=1e-9, rtol=0)


class Adapted(nn.Module):
    """A linear layer and a low-rank correction, as adapters wrap it: `weight` is that of the base alone."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Parameter(0.3 * torch.randn(1, FEATURES, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(FEATURES, 1, dtype=torch.float64))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, z: Tensor) -> Tensor:
        return self.base(z) + 0.3 * z @ self.down.T @ self.up.T


@EVERY_LAYER
def test_an_adapter_in_the_place_of_the_linear_layer_is_part_of_the_equation(make: Any) -> None:
    layer = make()
    layer.cell.linear = Adapted(layer.cell.linear)
    assert sum(p.requires_grad for p in layer.parameters()) == 2
    agrees_with_unrolled(layer, inputs())


def test_a_bias_put_into_the_tanh_layer_is_part_of_the_equation() -> None:
    layer = closed_layer()
    layer.cell.linear = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
    agrees_with_unrolled(layer, inputs())


def test_a_forward_put_on_the_linear_layer_itself_is_the_one_that_counts() -> None:
    layer = closed_layer()
    linear = layer.cell.linear
    linear.forward = lambda z: 0.5 * nn.Linear.forward(linear, z)
    agrees_with_unrolled(layer, inputs())


def test_a_cell_shared_by_two_layers_has_the_sum_of_their_gradients() -> None:
    cell, x = Cell(), inputs().requires_grad_()
    one, other = (ti.nn.FixedPoint(cell, solver=s, adjoint=EXACT) for s in (ti.Picard(rtol=1e-13), TIGHT))
    model = nn.Sequential(one, other)
    assert len(list(model.parameters())) == 2
    found = torch.autograd.grad(model(x).square().sum(), [x, *cell.parameters()])

    def iterate(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(120):
            z = cell(z, x)
        return z

    expected = torch.autograd.grad(iterate(iterate(x)).square().sum(), [x, *cell.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_a_weight_tied_to_one_outside_the_layer_has_both_gradients() -> None:
    layer = closed_layer()
    decoder = nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.float64)
    decoder.weight = layer.linear.weight
    x = inputs()

    def total(z: Tensor) -> Tensor:
        return decoder(z).square().sum()

    (found,) = torch.autograd.grad(total(layer(x)), decoder.weight)
    z = torch.zeros_like(x)
    for _ in range(120):
        z = layer.cell(z, x)
    (expected,) = torch.autograd.grad(total(z), decoder.weight)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
