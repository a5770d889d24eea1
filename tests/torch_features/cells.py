"""Layers to try torch's features on, and the independent route: the same iteration, unrolled."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti

FEATURES = 3
TIGHT = ti.Auto(rtol=1e-12)
EXACT = ti.Implicit(rtol=1e-12)


class Cell(nn.Module):
    """`tanh(W z / 2 + b + x)` in float64, a contraction."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.mul_(1 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


class RootCell(Cell):
    """The same as an equation."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z - super().forward(z, x)


def autograd_layer() -> ti.nn.FixedPoint:
    """A layer whose Jacobian is automatic differentiation's."""
    return ti.nn.FixedPoint(Cell(), solver=TIGHT, adjoint=EXACT)


def closed_layer() -> ti.nn.TanhEquilibrium:
    """One that has its Jacobian in closed form, and takes no graph for a first derivative."""
    layer = ti.nn.TanhEquilibrium(FEATURES, solver=TIGHT, adjoint=EXACT, dtype=torch.float64)
    with torch.no_grad():
        layer.linear.weight.mul_(0.5 / torch.linalg.matrix_norm(layer.linear.weight, 2))
    return layer


def root_layer() -> ti.nn.Root:
    """An equation, solved by Newton's method."""
    return ti.nn.Root(RootCell(), solver=TIGHT, adjoint=EXACT)


LAYERS: dict[str, Callable[[], Any]] = {"autograd": autograd_layer, "closed": closed_layer, "root": root_layer}
EVERY_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def inputs(batch: int = 4, features: int = FEATURES) -> Tensor:
    return torch.randn(batch, features, dtype=torch.float64)


def unrolled(layer: Any, x: Tensor, steps: int = 400) -> Tensor:
    """The layer's equation solved by plain iteration, for backpropagation through it."""
    z = torch.zeros_like(x, requires_grad=True)
    for _ in range(steps):
        out = layer.cell(z, x)
        z = z - out if isinstance(layer, ti.nn.Root) else out
    return z


def loss(z: Tensor) -> Tensor:
    """Weighs every entry differently."""
    return (torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).reshape(z.shape) * z.square()).sum()


def gradients(z: Tensor, wanted: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(z), list(wanted))


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """All are equal, and none is zero."""
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def agrees_with_unrolled(layer: Any, x: Tensor) -> None:
    """Value, and gradients by input and parameters, are those of the unrolled iteration."""
    x = x.detach().clone().requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    z, truth = layer(x), unrolled(layer, x)
    torch.testing.assert_close(z, truth, atol=1e-10, rtol=0)
    close(gradients(z, wanted), gradients(truth, wanted))
