"""How much of a forward and backward pass is spent outside a cell that does real work."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti
from torchimplicit.linear import _operator
from torchimplicit.solvers import Method

CHANNELS, HIDDEN, SIDE, BATCH = 64, 256, 8, 32
GAIN = 1.2
"""Of the random weights: some 20 steps of Picard solve the equation."""
SOLVERS: dict[str, Method] = {
    "picard": ti.Picard(),
    "anderson": ti.Anderson(),
    "broyden": ti.Broyden(),
    "auto": ti.Auto(),
}


class Clock:
    """Seconds spent in the cell: in its calls, and in the products with its Jacobian.

    A product of the adjoint solve is torch's whole backward pass through the recorded cell, with what torch itself
    takes to begin and to end it; the last one, which goes to the parameters, is part of the caller's own backward pass,
    and counts from where the gradient comes in to where that ends.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None
        self._product = False

    def start(self) -> None:
        """Enter the cell."""
        if not self._product:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Leave it, if it was entered."""
        if self._began is not None and not self._product:
            self.seconds += time.perf_counter() - self._began
            self._began = None

    @contextmanager
    def products(self) -> Iterator[None]:
        """For the length of a backward pass, time the library's own passes through the cell."""
        run = _operator._engine_run_backward

        def timed(*args: Any, **options: Any) -> Any:
            self.start()
            self._product = True
            try:
                return run(*args, **options)
            finally:
                self._product = False
                self.stop()

        with patch.object(_operator, "_engine_run_backward", timed):
            yield


class _Door(torch.autograd.Function):
    """The identity, which starts or stops a clock when a gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, clock: Clock, starts: bool) -> Tensor:
        ctx.clock, ctx.starts = clock, starts
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.starts:
            ctx.clock.start()
        else:
            ctx.clock.stop()
        return grads[0], None, None


class HeavyCell(nn.Module):
    """A residual block as equilibrium models use: `tanh(W₂ ∗ relu(W₁ ∗ z) + x)`, 3×3 convolutions; it times itself."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.first = nn.Conv2d(CHANNELS, HIDDEN, 3, padding=1)
        self.second = nn.Conv2d(HIDDEN, CHANNELS, 3, padding=1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`(B, C, H, W)`, `(B, C, H, W)` to `(B, C, H, W)`."""
        self.clock.start()
        graph = torch.is_grad_enabled()
        inner = _Door.apply(z, self.clock, False) if graph else z
        out = torch.tanh(self.second(functional.relu(self.first(inner))) + x)
        out = _Door.apply(out, self.clock, True) if graph else out
        self.clock.stop()
        return out  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Outside:
    """One forward and backward pass; `fraction` of its time was spent outside the cell."""

    fraction: float
    seconds: float
    evaluations: int
    products: int
    converged: bool


def make_layer(name: str, seed: int) -> tuple[ti.nn.FixedPoint, Tensor]:
    """A layer around a `HeavyCell` that contracts by about 0.8 per step, and its input."""
    torch.manual_seed(seed)
    cell = HeavyCell(Clock())
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    with torch.no_grad():
        for convolution, gain in ((cell.first, GAIN), (cell.second, GAIN)):
            fan_in = convolution.weight[0].numel()
            convolution.weight.normal_(std=gain / fan_in**0.5)
    return ti.nn.FixedPoint(cell, solver=SOLVERS[name], on_failure="ignore"), x.requires_grad_()


def outside(layer: ti.nn.FixedPoint, x: Tensor, cotangent: Tensor) -> Outside:
    """Time one pass."""
    clock: Clock = layer.cell.clock
    layer.zero_grad()
    clock.seconds = 0.0
    began = time.perf_counter()
    solution = layer.solve(x)
    with clock.products():
        solution.value.backward(cotangent)
    clock.stop()
    seconds = time.perf_counter() - began
    return Outside(
        fraction=1 - clock.seconds / seconds,
        seconds=seconds,
        evaluations=solution.evaluations,
        products=solution.adjoint.evaluations or 0,
        converged=bool(solution.converged.all()),
    )


@torch.no_grad()
def cell_seconds(layer: ti.nn.FixedPoint, x: Tensor, calls: int = 10) -> float:
    """Of one call of the cell."""
    began = time.perf_counter()
    for _ in range(calls):
        layer.cell(x, x)
    return (time.perf_counter() - began) / calls
