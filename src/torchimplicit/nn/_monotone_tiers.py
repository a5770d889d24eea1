"""The multi-tier monotone layer: several scales in one equilibrium, each tier fed by the one before."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Never

import torch
from torch import Tensor, nn

from .._adjoint import Adjoint
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree, Solution
from ..linear import resolvent_step
from ..solvers import Method
from ._activations import Activation, activation_of
from ._affine import SplitMap
from ._certificate import Certificate
from ._checks import OPTIONS, require_images, require_margin, require_size
from ._memory import Memory
from ._monotone import Split, splitting_factor
from ._operators import CircularMap, CircularOperator, Waves, spectrum
from ._parametrizations import MonotoneTierKernel, conv_norm_bound
from ._tiers import Coupling, TieredOperator


class _Tier(nn.Module):
    """Kernels of one tier: `weight` is W's diagonal block; `filter` is A, `down` is K, None in the last tier."""

    def __init__(self, channels: int, following: int | None, size: int, margin: float, place: dict[str, Any]) -> None:
        super().__init__()
        bound = (channels * size**2) ** -0.5
        self.filter = nn.Parameter(torch.empty(channels, channels, size, size, **place).uniform_(-bound, bound))
        self.skew = nn.Parameter(torch.empty(channels, channels, size, size, **place).uniform_(-bound, bound))
        self.down: nn.Parameter | None = None
        if following is not None:
            self.down = nn.Parameter(torch.empty(following, channels, size, size, **place).uniform_(-bound, bound))
        self.kernel = MonotoneTierKernel(margin)

    @property
    def weight(self) -> Tensor:
        """The kernel of the diagonal block."""
        return self.kernel(self.filter, self.skew, self.down)


class _Tiers(nn.Module):
    """All of them, and the biases."""

    def __init__(
        self, channels: Sequence[int], size: int, margin: float, activation: Activation, place: dict[str, Any]
    ) -> None:
        super().__init__()
        following, bounds = [*channels[1:], None], [(c * size**2) ** -0.5 for c in channels[:-1]]
        self.tiers = nn.ModuleList(_Tier(c, f, size, margin, place) for c, f in zip(channels, following, strict=True))
        self.biases = nn.ParameterList(
            torch.empty(c, **place).uniform_(-bound, bound) for c, bound in zip(channels[1:], bounds, strict=True)
        )
        self.margin = margin
        self.activation = activation

    def operator(self, size: tuple[int, int]) -> TieredOperator:
        """W, on images of this size in the first tier."""
        operators, couplings = [], []
        before: Any = None
        tier: Any
        for tier in self.tiers:
            if before is not None:
                waves, half = Waves.of(size, tier.weight.dtype, tier.weight.device), (size[0] // 2, size[1] // 2)
                down = CircularMap(waves, waves.prepared(spectrum(before.down, size)))
                small = Waves.of(half, tier.weight.dtype, tier.weight.device)
                filtering = CircularMap(small, small.prepared(spectrum(tier.filter, half)))
                couplings.append(Coupling(down, filtering, size))
                size = half
            operators.append(CircularOperator(spectrum(tier.weight, size), size, self.margin))
            before = tier
        return TieredOperator(tuple(operators), tuple(couplings), self.margin)

    def forward(self, *_: Tensor) -> Tensor:
        """Not a map by itself: its operator depends on the size of the images."""
        raise NotImplementedError("MonotoneTiers: call the layer.")


class MonotoneTiers(Split):
    """A monotone layer of several scales (multi-tier monDEQ; Winston & Kolter, NeurIPS 2020, §4.2).

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.MonotoneTiers(1, (4, 6))
    >>> [tuple(z.shape) for z in layer(torch.rand(2, 1, 12, 12))]
    [(2, 4, 12, 12), (2, 6, 6, 6)]

    Tier i has `channels[i]` images of the size of x, halved i times. W is block lower triangular: in its diagonal
    `(1 − m) I − AᵢᵀAᵢ − KᵢᵀKᵢ + Bᵢ − Bᵢᵀ`, and below it `−2 Aᵢ₊₁ᵀ P Kᵢ`, P keeping every second pixel. Then
    `⟨(I − W) p, p⟩ ≥ m ‖p‖² + Σ ‖P Kᵢ pᵢ + Aᵢ₊₁ pᵢ₊₁‖²`, and the resolvent is found tier after tier by FFT. (In
    the place of `KᵢᵀKᵢ`, `KᵢᵀPᵀP Kᵢ` would do, but no FFT inverts it; the larger one is monotone as well.)
    Input `(B, in_channels, H, W)`; the output is a tuple of images, finest first.

    Args:
        in_channels: of x, which is injected into the first tier.
        channels: of the tiers.
        kernel_size: of every convolution, odd.
        margin: m in (0, 1].
        activation: a name or an `Activation`.
        solver: None is `PeacemanRachford()`.
        adjoint: None is `Implicit(linear_solver=Splitting())`.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: gives the start, flat `(B, n)`; None starts from zero.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernel_size: int = 3,
        *,
        margin: float = 0.5,
        activation: str | Activation = "relu",
        solver: Method | None = None,
        adjoint: Adjoint | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "warn",
        init: Callable[..., PyTree] | Memory | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        name = type(self).__name__
        refuse_unknown(name, unknown, (*OPTIONS, "margin", "activation"))
        require_size(name, in_channels=in_channels)
        for c in channels:
            require_size(name, channels=c)
        require_size(name, odd=True, kernel_size=kernel_size)
        require_margin(name, margin)
        if not channels:
            raise ValueError(f"{name}: channels={channels!r} is not valid; give the channels of one tier or more.")
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {"solver": solver, "adjoint": adjoint, "max_steps": max_steps, "on_failure": on_failure, "init": init}
        cell = _Tiers(channels, kernel_size, margin, activation_of(name, activation), place)
        pad = kernel_size // 2
        injection = nn.Conv2d(in_channels, channels[0], kernel_size, padding=pad, **place)
        super().__init__(cell, injection, sum(channels), options)

    def forward(self, *inputs: PyTree) -> PyTree:
        """The tiers, `(B, Cᵢ, H/2ⁱ, W/2ⁱ)` each."""
        return self.solve(*inputs).value

    def solve(self, *inputs: PyTree, trace: bool = False) -> Solution:
        """The solution, its `value` the tuple of tiers."""
        x: Any = inputs[0]
        solution = super().solve(*inputs, trace=trace)
        return replace(solution, value=self._images(solution.value, (x.shape[2], x.shape[3])))

    @torch.no_grad()
    def certificate(self, size: tuple[int, int]) -> Certificate:
        """Margin, the factor of the splitting by its default step size, and `‖U‖₂/m`, on inputs of this size."""
        operator = self.cell.operator(size)
        factor = splitting_factor(operator.margin, operator.norm_bound(), resolvent_step(operator))
        lipschitz = float(conv_norm_bound(self.injection.weight)) / operator.margin
        source = "Winston & Kolter 2020, §3; Pabbaraju, Winston & Kolter 2021, thm. 1"
        return Certificate(True, operator.margin, factor, lipschitz, "2", source)

    def _images(self, z: Any, size: tuple[int, int]) -> tuple[Tensor, ...]:
        shapes = self._shapes(size)
        parts = z.split([c * h * w for c, h, w in shapes], 1)
        return tuple(part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True))

    def _shapes(self, size: tuple[int, int]) -> list[tuple[int, int, int]]:
        return [(t.filter.shape[0], size[0] >> i, size[1] >> i) for i, t in enumerate(self.cell.tiers)]

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        x: Any = inputs[0]
        shapes = self._shapes((x.shape[2], x.shape[3]))
        biases = [
            b[:, None].expand(c, h * w).reshape(1, -1)
            for b, (c, h, w) in zip(self.cell.biases, shapes[1:], strict=True)
        ]
        c = torch.cat([self.injection(x).flatten(1), *(b.expand(len(x), -1) for b in biases)], 1)
        return SplitMap(self.cell.operator((x.shape[2], x.shape[3])), self.cell.activation), (c,)

    def _start(self, *inputs: PyTree) -> PyTree:
        x: Any = inputs[0]
        require_images(type(self).__name__, x, self.injection.in_channels)
        halvings = len(self.cell.tiers) - 1
        if x.shape[2] % 2**halvings or x.shape[3] % 2**halvings:
            raise ValueError(
                f"{type(self).__name__}: height and width must be multiples of {2**halvings} for {halvings + 1} tiers, "
                f"but the input is {tuple(x.shape)}."
            )
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        n = sum(c * h * w for c, h, w in self._shapes((x.shape[2], x.shape[3])))
        return x.new_zeros(x.shape[0], n, dtype=self.injection.weight.dtype)
