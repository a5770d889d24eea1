"""The baselines do what the notebook says of them, so that a ratio against them means something."""

import pytest
import torch

from torchimplicit.experiments.bench.notebook import (
    NotebookFixedPoint,
    NotebookNewton,
    gradients_are_usable,
    make_notebook_model,
)
from torchimplicit.experiments.bench.timing import batch_residual

LAYERS = [NotebookFixedPoint, NotebookNewton]


@pytest.mark.parametrize("kind, most", [(NotebookFixedPoint, 20), (NotebookNewton, 5)])
def test_random_input_is_solved_in_about_as_many_iterations_as_the_notebook_shows(kind, most: int) -> None:
    layer, x = kind(50), torch.randn(10, 50)
    z = layer(x)
    assert 2 < layer.iterations <= most
    assert batch_residual(layer.linear.weight, x, z) <= 1e-4


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_is_that_of_the_implicit_function(kind) -> None:
    layer = kind(6, tolerance=1e-13, max_steps=500).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    v = torch.randn_like(z)
    (gradient,) = torch.autograd.grad(z, x, v)
    # z = tanh(W z + x):  dz/dx = (I - D W)^-1 D,  D = diag(1 - z^2)
    D = torch.diag_embed(1 - z.detach() ** 2)
    J = torch.eye(6, dtype=torch.float64) - D @ layer.linear.weight.detach()
    expected = (v[:, None] @ torch.linalg.solve(J, D))[:, 0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


def test_the_fixed_point_loop_pools_its_norm_over_the_batch() -> None:
    """A batch of equal rows needs more iterations than one row: the notebook's tolerance shrinks with the batch."""
    layer, row = NotebookFixedPoint(50), torch.randn(1, 50)
    layer(row)
    alone = layer.iterations
    layer(row.expand(10_000, 50))
    assert layer.iterations > alone


def test_newton_zeroes_samples_that_did_not_arrive() -> None:
    layer, x = NotebookNewton(50, max_steps=1), torch.randn(10, 50)
    z = layer(x)
    residual = torch.linalg.vector_norm(torch.tanh(layer.linear(z) + x) - z, dim=1)
    assert torch.equal(z[residual > 0.1], torch.zeros_like(z[residual > 0.1]))
    assert bool((residual > 0.1).any())


def test_a_nan_gradient_is_not_usable() -> None:
    model = make_notebook_model(NotebookFixedPoint(100))
    model(torch.rand(2, 28, 28)).sum().backward()
    assert gradients_are_usable(model.parameters())
    weight = next(model.parameters())
    assert weight.grad is not None
    weight.grad[3, 5] = torch.nan
    assert not gradients_are_usable(model.parameters())
