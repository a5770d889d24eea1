"""The notebook's two layers, as they are: every iteration inside autograd, one pooled norm for the whole batch.

The notebook is chapter 1 of "Deep Implicit Layers" (Kolter, Duvenaud, Johnson; NeurIPS 2020 tutorial,
implicit-layers-tutorial.org/introduction). `torchimplicit` is measured against these layers, so they keep the
notebook's arithmetic, stopping rule, starting points and bounds. Three traits matter when reading the figures:

1. the norm is the Frobenius norm over the batch, so that all samples iterate until the slowest allows to stop;
2. backpropagation goes through every iteration, so that memory grows with their number;
3. Newton's method builds and factorises a dense `(B, n, n)` Jacobian at each step, and differentiates through that.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["NotebookFixedPoint", "NotebookNewton", "gradients_are_usable", "make_notebook_model"]


class NotebookFixedPoint(nn.Module):
    """Repeat `z <- tanh(W z + x)` from `z = 0` until the batch moves by less than `tolerance`; `(B, n) -> (B, n)`.

    `iterations` holds the count of the last forward pass, which is how the notebook reports it.
    """

    def __init__(self, features: int, tolerance: float = 1e-4, max_steps: int = 200) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False)
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.iterations = 0

    def forward(self, x: Tensor) -> Tensor:
        """Solve for every row of `x`."""
        z = torch.zeros_like(x)
        self.iterations = 0
        while self.iterations < self.max_steps:
            updated = torch.tanh(self.linear(z) + x)
            change = torch.norm(z - updated)
            z = updated
            self.iterations += 1
            if change < self.tolerance:
                break
        return z


class NotebookNewton(nn.Module):
    """Newton's method on `g(z) = z - tanh(W z + x)` from `z = tanh(x)`, with dense Jacobians; `(B, n) -> (B, n)`.

    With `s = W z + x`, `J = I - diag(sech^2 s) W`, one matrix per sample. Samples above the tolerance at the end are
    set to zero, as the notebook does.
    """

    def __init__(self, features: int, tolerance: float = 1e-4, max_steps: int = 40) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False)
        self.tolerance = tolerance
        self.max_steps = max_steps
        self.iterations = 0

    def forward(self, x: Tensor) -> Tensor:
        """Solve for every row of `x`."""
        z = torch.tanh(x)
        self.iterations = 0
        while self.iterations < self.max_steps:
            s = self.linear(z) + x
            g = z - torch.tanh(s)
            if torch.norm(g) < self.tolerance:
                break
            sech2 = 1 / torch.cosh(s) ** 2
            J = torch.eye(z.shape[1])[None] - sech2[:, :, None] * self.linear.weight[None]
            z = z - torch.linalg.solve(J, g[:, :, None])[:, :, 0]
            self.iterations += 1
        g = z - torch.tanh(self.linear(z) + x)
        z[torch.norm(g, dim=1) > self.tolerance] = 0
        return z


def make_notebook_model(layer: NotebookFixedPoint | NotebookNewton, features: int = 100) -> nn.Sequential:
    """Build the notebook's classifier of 28 x 28 images around `layer`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, features), layer, nn.Linear(features, 10))


def gradients_are_usable(parameters: Iterable[nn.Parameter]) -> bool:
    """Say whether no gradient holds a NaN: the notebook takes no optimiser step otherwise."""
    return not any(p.grad is not None and bool(torch.isnan(p.grad).any()) for p in parameters)
