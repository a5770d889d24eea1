"""The networks and solvers of the recipe."""

import math

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.experiments.config import LAYERS
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.recipe import SOLVERS, ExplicitTanh, make_model, make_solver


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_starts_from_the_same_weights(layer: str) -> None:
    torch.manual_seed(7)
    reference = list(make_model("explicit").parameters())
    torch.manual_seed(7)
    weights = list(make_model(layer).parameters())
    assert [tuple(value.shape) for value in weights] == [(100, 784), (100,), (100, 100), (10, 100), (10,)]
    for value, expected in zip(weights, reference, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_a_batch_meets_the_notebooks_tolerance(solver: str, tolerance: float) -> None:
    torch.manual_seed(1)
    layer = make_model(solver, tolerance=tolerance, batch_size=32, features=40)[2]
    assert isinstance(layer, ti.nn.TanhEquilibrium)
    x = torch.randn(32, 40)
    with torch.no_grad():
        solution = layer.solve(x)
        z = solution.value
        residual = torch.linalg.vector_norm(torch.tanh(z @ layer.linear.weight.T + x) - z)
    assert bool(solution.converged.all())
    assert residual <= tolerance
    assert solution.residual.max() <= tolerance / math.sqrt(32)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_maps_images_to_logits_with_gradients(layer: str) -> None:
    model = make_model(layer, batch_size=4, features=20)
    loss = nn.functional.cross_entropy(model(torch.rand(4, 28, 28)), torch.tensor([0, 3, 9, 1]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_explicit_twin_applies_the_cell_once_from_its_input() -> None:
    layer = ExplicitTanh(6)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), torch.tanh(layer.linear(x) + x))


def test_max_steps_reach_the_layer() -> None:
    layer = make_model("picard", max_steps=2, batch_size=8, features=20)[2]
    assert isinstance(layer, ti.nn.TanhEquilibrium)
    solution = layer.solve(torch.randn(8, 20))
    assert solution.steps.max() == 2
    assert solution.status.tolist() == [ti.Status.MAX_STEPS] * 8


def test_unknown_solver_is_named() -> None:
    with pytest.raises(ExperimentError, match=r"unknown solver 'bfgs'.* picard, anderson, newton"):
        make_solver("bfgs", 1e-4, 100)
