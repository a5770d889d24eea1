"""The equations `z = f(z, x)` that the contenders solve: random cells whose Jacobian has a given spectral radius."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti

CLOSE = 3e-3
"""Relative distance from the spectral radius asked for that is close enough."""
_WARM_UP, _COUNTED = 100, 200


class TanhCell(nn.Module):
    """`tanh(W z + x)`, written as anyone would; `z` and `x` are `(B, n)`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`(B, n)`, `(B, n)` to `(B, n)`."""
        return torch.tanh(functional.linear(z, self.weight) + x)


class ConvCell(nn.Module):
    """`tanh(W ∗ z + x)` with a 3×3 convolution; `z` and `x` are `(B, C, H, W)`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`(B, C, H, W)`, `(B, C, H, W)` to `(B, C, H, W)`."""
        return torch.tanh(functional.conv2d(z, self.weight, padding=1) + x)


Cell = TanhCell | ConvCell


@dataclass(frozen=True)
class Problem:
    """An equation and what to differentiate: `⟨cotangent, z*⟩` in the cell's weight and in x.

    Attributes:
        name: "tanh-100", "tanh-1000", "conv", ...
        radius: spectral radius of the Jacobian at the solution, the largest of the batch: all samples converge.
        cell: float32.
        x: `(B, ...)`, a leaf that requires a gradient.
        cotangent: like x.
    """

    name: str
    radius: float
    cell: Cell
    x: Tensor
    cotangent: Tensor

    @property
    def start(self) -> Tensor:
        """Zeros like z."""
        return torch.zeros_like(self.x, requires_grad=False)

    def f(self, z: Tensor) -> Tensor:
        """The map at x."""
        return self.cell(z, self.x)

    def layouts(self) -> tuple[tuple[str, "Problem"], ...]:
        """The problem as it is, unnamed, and its images with their channels last in memory, where it has images.

        The numbers are the same. Weights in this format are torch's own advice for convolutions on CPUs: with them it
        is the format of what a convolution returns, too.
        """
        if not isinstance(self.cell, ConvCell):
            return (("", self),)
        last = torch.channels_last
        cell = ConvCell(self.cell.weight.detach().contiguous(memory_format=last))
        x = self.x.detach().contiguous(memory_format=last).requires_grad_()
        other = Problem(self.name, self.radius, cell, x, self.cotangent.contiguous(memory_format=last))
        return (", channels_last", other), ("", self)


def make_problem(name: str, radius: float, seed: int, batch: int | None = None) -> Problem:
    """Draw a problem from `seed`: "tanh-N" (batch 100) or "conv" (32 channels, 32×32, batch 32)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "conv":
        channels, side = 32, 32
        weight, shape = draw(channels, channels, 3, 3) / (9 * channels) ** 0.5, (channels, side, side)
        make: Callable[[Tensor], Cell] = ConvCell
        default = 32
    elif name.startswith("tanh-"):
        n = int(name.removeprefix("tanh-"))
        weight, shape = draw(n, n) / n**0.5, (n,)
        make = TanhCell
        default = 100
    else:
        raise ValueError(f"problem {name!r} is not known; give 'conv' or 'tanh-N' with N features")
    batch = default if batch is None else batch
    x = draw(batch, *shape)
    scale = _find_scale(make, weight, x, radius)
    return Problem(name, radius, make(scale * weight), x.requires_grad_(), draw(batch, *shape))


def _find_scale(make: Callable[[Tensor], Cell], weight: Tensor, x: Tensor, radius: float) -> float:
    """Scale the weight until the largest spectral radius in the batch is `radius`.

    The slopes of tanh fall as the weights grow, so that the radius grows more slowly than the scale:
    `s ← s·radius/ρ(s)` approaches from below.
    """
    scale, found = radius, 0.0
    for _ in range(50):
        found = largest_radius(make(scale * weight), x)
        if abs(found / radius - 1) < CLOSE:
            return scale
        scale *= radius / found
    raise RuntimeError(f"no scale gives the spectral radius {radius}; the last was {found} at {scale}")


def largest_radius(cell: Cell, x: Tensor) -> float:
    """The spectral radius of `∂f/∂z` at the solution, the largest of the batch, from the growth of powers of Jᵀ.

    The growth is averaged over many steps, which evens out the turns of a complex pair.
    """
    with torch.no_grad():
        z = ti.fixed_point(cell, torch.zeros_like(x), x, batch_dims=1, solver=ti.Anderson(), on_failure="ignore").value
    z.requires_grad_()
    value = cell(z, x)
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    grown = torch.zeros(len(u), dtype=z.dtype)
    for step in range(_WARM_UP + _COUNTED):
        (u,) = torch.autograd.grad(value, z, u, retain_graph=True)
        norm = torch.linalg.vector_norm(u.flatten(1), dim=1)
        u = u / norm.view(-1, *[1] * (u.ndim - 1))
        if step >= _WARM_UP:
            grown += norm.log()
    return float((grown / _COUNTED).exp().max())
