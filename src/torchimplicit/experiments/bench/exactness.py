"""How far a model's gradient is from the exact one, which is computed in float64 without this library."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchimplicit.experiments.bench.epochs import FEATURES
from torchimplicit.experiments.bench.notebook import NotebookNewton, make_notebook_model
from torchimplicit.experiments.bench.timing import Batch, Weights, batch_residual

_SOLVED = 1e-10
"""Frobenius norm of the reference's residual: 1e-6 of the tolerance that the contenders are given."""


def gradient_errors(build: Callable[[], nn.Module], weights: Weights, batches: Sequence[Batch]) -> list[float | None]:
    """Per batch `‖g − g_exact‖ / ‖g_exact‖` of the loss's gradient, over all parameters; `build` makes the model.

    None where the reference found no solution: Newton's method from `tanh(x)` does not always.
    """
    model = build()
    _give(model, weights)
    errors: list[float | None] = []
    for batch in batches:
        exact = exact_gradient(weights, batch)
        if exact is None:
            errors.append(None)
            continue
        found = _gradient(model, batch).double()
        errors.append(float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)))
    return errors


def exact_gradient(weights: Weights, batch: Batch) -> Tensor | None:
    """The gradient in float64 by the notebook's Newton method, which differentiates through its exact steps."""
    layer = NotebookNewton(FEATURES, _SOLVED)
    model = make_notebook_model(layer, FEATURES).double()
    _give(model, weights)
    seen: list[Batch] = []
    layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0].detach(), output.detach())))
    images, labels = batch
    gradient = _gradient(model, (images.double(), labels))
    x, z = seen[0]
    return gradient if batch_residual(layer.linear.weight, x, z) <= _SOLVED else None


@torch.no_grad()
def _give(model: nn.Module, weights: Weights) -> None:
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)


def _gradient(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    loss = nn.functional.cross_entropy(model(images), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
