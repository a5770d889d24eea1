"""The notebook's recipe: which solver, which network, which optimiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.config import check_layer
from torchimplicit.experiments.errors import ExperimentError

PIXELS = 28 * 28
CLASSES = 10
SOLVERS = ("picard", "anderson", "newton")

RecipeSolver = ti.Picard | ti.Anderson | ti.Newton


class ExplicitTanh(nn.Module):
    """`z = tanh(W x + x)`: the cell of `TanhEquilibrium` applied once, started at its own input.

    The explicit twin: the same parameters and initial weights, no equation to solve. Started at zero, as the
    implicit layer is, one application would be `tanh(x)` and `W` would never be used.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` of shape `(..., features)` to the same shape."""
        return torch.tanh(self.linear(x) + x)


def make_solver(name: str, tolerance: float, batch_size: int, precision: str = "float32") -> RecipeSolver:
    """The solver called `name`, which stops where the notebook's does.

    The notebook stops when the Frobenius norm of `f(z) - z` over the whole batch is below `tolerance`. Here
    each sample stops by itself, at a two-norm of `tolerance / sqrt(batch_size)`: if all do, the batch meets
    `tolerance`. In reduced precision it cannot, and stops at what the dtype can reach, the library's default.
    """
    atol = tolerance / math.sqrt(batch_size)
    rtol, every = (0.0, 12) if precision == "float32" else (None, 4)  # a third of the digits takes a third of the steps
    if name == "picard":
        return ti.Picard(atol=atol, rtol=rtol, norm="two", check_every=every, extrapolate_every=12)
    if name == "anderson":
        return ti.Anderson(atol=atol, rtol=rtol, norm="two")
    if name == "newton":
        # Far from the solution plain steps are as good as Newton's and cost a fraction; near it a linear system solved
        # to 3 % cuts the residual as far. Each sample's own J is used, by products alone.
        linear = ti.Cascade(dense_limit=0, gmres=ti.GMRES(restart=10, max_steps=10))
        warmup = 3 * every
        return ti.Newton(
            linear_solver=linear, forcing=0.03, warmup=warmup, check_every=every, atol=atol, rtol=rtol, norm="two"
        )
    raise ExperimentError(f"solver: unknown solver '{name}', valid ones are {', '.join(SOLVERS)}")


def make_dense_newton(tolerance: float, batch_size: int) -> ti.Newton:
    """Newton with the Jacobian as a dense matrix, as in the notebook, and the tolerance of `make_solver`."""
    return ti.Newton(atol=tolerance / math.sqrt(batch_size), rtol=0.0, norm="two")


def _make_adjoint(precision: str) -> ti.Implicit | ti.NeumannSeries:
    """How the layer's gradient is computed."""
    if precision != "float32":
        # A residual of ε leaves slow modes unsolved, along which the exact gradient is largest: with it training went
        # astray in the second epoch. The series cut short has a bound.
        return ti.NeumannSeries(terms=5)
    # A sample that is not solved must not steer the weights: near a singular Jacobian, where solvers get stuck, the
    # linearised equation's gradient is finite but huge, and one such sample undoes the training. The tolerance gives
    # the parameters' gradient the accuracy that the notebook's unrolled loop has (2e-4).
    return ti.Implicit(rtol=2e-4, unconverged="zero")


def make_model(
    layer: str,
    *,
    tolerance: float = 1e-4,
    batch_size: int = 100,
    max_steps: int | None = None,
    features: int = 100,
    precision: str = "float32",
    compiled: bool = False,
) -> nn.Sequential:
    """Flatten, Linear(784, features), the layer, Linear(features, 10): images `(B, 28, 28)` to logits.

    The same seed gives the same initial weights whatever `layer` is; `compiled` is the layer's.
    """
    check_layer(layer)
    first = nn.Linear(PIXELS, features)
    if layer == "explicit":
        middle: nn.Module = ExplicitTanh(features)
    else:
        solver = make_solver(layer, tolerance, batch_size, precision)
        middle = ti.nn.TanhEquilibrium(
            features,
            solver=solver,
            adjoint=_make_adjoint(precision),
            max_steps=max_steps,
            on_failure="ignore",  # the job counts and reports failures itself, batch by batch
            compiled=compiled,
        )
    return nn.Sequential(nn.Flatten(), first, middle, nn.Linear(features, CLASSES))


def with_penalty(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a network of `make_model`, and the size of its layer's Jacobian: see `ti.jacobian_penalty`.

    With the solution held fixed, as in the paper: that the penalty moves it as well, into saturation, costs accuracy.
    """
    flatten, first, layer, last = model.children()
    x = first(flatten(images))
    z = layer(x)
    return last(z), ti.jacobian_penalty(layer, z.detach(), x)
