"""Linear layers quantised for inference: a fixed point of the quantised cell, and no gradient through it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
]
FEATURES = 16


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


def quantised(layer: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer).eval(), {nn.Linear}, dtype=torch.qint8)


LAYERS = {
    "FixedPoint": lambda: ti.nn.FixedPoint(Cell(), solver=ti.Anderson(rtol=1e-3)),
    "TanhEquilibrium": lambda: ti.nn.TanhEquilibrium(FEATURES, solver=ti.Anderson(rtol=1e-3)),
}
EVERY_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


@EVERY_LAYER
def test_a_quantised_layer_solves_its_own_equation_near_the_other_ones_solution(make: Any) -> None:
    layer, x = make(), 0.5 * torch.randn(8, FEATURES)
    small = quantised(layer)
    assert type(small.cell.linear) is not nn.Linear
    with torch.no_grad():
        solution = small.solve(x)
        assert solution.converged.all()
        assert solution.status.shape == ()  # one problem: see below
        rms = (small.cell(solution.value, x) - solution.value).square().mean().sqrt()
        torch.testing.assert_close(solution.residual, rms)
        assert rms <= 1e-3
        distance = (solution.value - layer(x)).abs().max()
    assert 1e-5 < distance < 0.05


@EVERY_LAYER
def test_dynamic_quantisation_couples_the_samples_of_a_batch(make: Any) -> None:
    """Why they are solved as one: the cell's value for a sample depends on the largest entry of the others."""
    cell, z, x = quantised(make()).cell, torch.randn(2, FEATURES), torch.randn(2, FEATURES)
    with torch.no_grad():
        beside = cell(torch.stack((z[0], 100 * z[1])), x)[0]
        assert (cell(z, x)[0] - beside).abs().max() > 0.01


@EVERY_LAYER
def test_a_quantised_layer_that_cannot_reach_a_tolerance_says_so(make: Any) -> None:
    """What is quantised is piecewise constant: below its steps there need be no fixed point."""
    small = quantised(make())
    small.solver, small.on_failure = ti.Picard(rtol=1e-9), "ignore"
    outcomes = set()
    for seed in range(12):
        x = 0.5 * torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            solution = small.solve(x)
            residual = (small.cell(solution.value, x) - solution.value).square().mean().sqrt()
        outcomes.add(bool(solution.converged))
        assert bool(solution.converged) == bool(residual <= 1e-6)
    assert False in outcomes


DERIVATIVES = {
    "backward": lambda layer, x: layer(x.requires_grad_()).sum().backward(),
    "create_graph": lambda layer, x: torch.autograd.grad(layer(x.requires_grad_()).sum(), x, create_graph=True),
    "func.grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (torch.ones_like(x),)),
}


@EVERY_LAYER
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_a_gradient_through_a_quantised_layer_is_refused(make: Any, derivative: Any) -> None:
    """Torch has no derivative of a quantised layer, and would leave it out with a warning."""
    layer, x = quantised(make()), 0.5 * torch.randn(4, FEATURES)
    layer.on_failure = "ignore"
    with pytest.raises(RuntimeError, match=r"no derivative in torch|every operation of fn"):
        derivative(layer, x)


def test_a_quantised_layer_elsewhere_in_the_model_leaves_the_layers_gradient_alone() -> None:
    layer = ti.nn.FixedPoint(Cell())
    first = quantised(nn.Sequential(nn.Linear(FEATURES, FEATURES)))
    x = torch.randn(4, FEATURES)
    nn.Sequential(first, layer)(x).square().sum().backward()
    z, known = torch.zeros(4, FEATURES), first(x)
    for _ in range(100):
        z = layer.cell(z, known)
    (expected,) = torch.autograd.grad(z.square().sum(), layer.cell.linear.weight)
    torch.testing.assert_close(layer.cell.linear.weight.grad, expected, atol=1e-3, rtol=1e-3)
    assert expected.abs().max() > 0.1
