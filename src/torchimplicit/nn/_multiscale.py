"""`MultiscaleEquilibrium`: feature maps of several resolutions that settle together (multiscale DEQ)."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._adjoint import Adjoint
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree
from ..solvers import Method
from ._layer import FixedPoint
from ._memory import Memory
from ._residual import ResidualCell, check_count, check_groups

_GAIN = 0.2
"""Initial gain of the norms behind which something comes back to where it came from."""
_OPTIONS = ("groups", "solver", "adjoint", "max_steps", "on_failure", "init", "device", "dtype")


class MultiscaleCell(nn.Module):
    """One step of all resolutions: a residual block in each, then every one is made of all.

    With `z̃ᵢ = ResidualCell(zᵢ, x if i = 0 else 0)`, the step is `zᵢ ← gn(conv₁ₓ₁(relu(Σⱼ Tⱼᵢ z̃ⱼ)))`: `Tᵢᵢ` is the
    identity; a coarser `z̃ⱼ` goes through a 1 × 1 convolution and a group norm and is repeated to the finer size; a
    finer one goes through `i − j` convolutions of 3 × 3 with stride 2, each with its group norm, a relu between them.

    Args:
        channels: of each resolution, the finest first; each has half the height and width of the one before, rounded
            up.
        groups: of the norms.
        device: of the parameters.
        dtype: of the parameters.
    """

    samplewise = True
    """As in `ResidualCell`."""

    def __init__(
        self,
        channels: Sequence[int],
        groups: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)

        def convolution(source: int, target: int, size: int, stride: int = 1, gain: float = 1.0) -> nn.Sequential:
            conv = nn.Conv2d(source, target, size, stride, size // 2, bias=False, device=device, dtype=dtype)
            norm = nn.GroupNorm(groups, target, device=device, dtype=dtype)
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.constant_(norm.weight, gain)
            return nn.Sequential(conv, norm)

        def passage(source: int, target: int) -> nn.Module:
            if source >= target:
                same = source == target
                return nn.Identity() if same else convolution(channels[source], channels[target], 1, gain=_GAIN)
            steps = [convolution(a, b, 3, 2) for a, b in pairwise(channels[source : target + 1])]
            between = [layer for step in steps for layer in (step, nn.ReLU())]
            return nn.Sequential(*between[:-1])

        levels = range(len(channels))
        self.blocks = nn.ModuleList(ResidualCell(c, c, groups=groups, device=device, dtype=dtype) for c in channels)
        self.passages = nn.ModuleList(nn.ModuleList(passage(j, i) for j in levels) for i in levels)
        self.out = nn.ModuleList(convolution(c, c, 1, gain=_GAIN) for c in channels)
        coarse: Any = self.blocks[1:]
        for block in coarse:
            nn.init.constant_(block.norm3.weight, _GAIN)

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """`(B, Cᵢ, Hᵢ, Wᵢ)` for each resolution, and x like the finest, to the same."""
        inner = [block(leaf, x if i == 0 else 0.0) for i, (block, leaf) in enumerate(zip(self.blocks, z, strict=True))]
        return tuple(self._fused(i, inner) for i in range(len(z)))

    def _fused(self, target: int, inner: list[Tensor]) -> Tensor:
        size = inner[target].shape[-2:]
        total = inner[target]
        passages: Any = self.passages[target]
        for source, leaf in enumerate(inner):
            if source != target:
                leaf = passages[source](leaf)
                total = total + (functional.interpolate(leaf, size=size) if source > target else leaf)
        return self.out[target](functional.relu(total))


class MultiscaleEquilibrium(FixedPoint):
    """Feature maps of several resolutions at one joint equilibrium: the multiscale DEQ (Bai, Koltun & Kolter 2020).

    The state is a tuple `(B, channels[i], ⌈H / 2ⁱ⌉, ⌈W / 2ⁱ⌉)`, the finest first, and so is the output; the input
    `(B, channels[0], H, W)` enters the finest alone (§3.2). A step is a residual block in each resolution, then fusion.

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.MultiscaleEquilibrium((8, 16), groups=4, solver=ti.Anderson(rtol=1e-4))
    >>> solution = layer.solve(torch.randn(2, 8, 14, 14))
    >>> [tuple(leaf.shape) for leaf in solution.value], solution.converged.tolist()
    ([(2, 8, 14, 14), (2, 16, 7, 7)], [True, True])

    A coarse resolution has no input of its own and its norms undo any scale of its state, so that with the usual gains
    the map is no contraction at the start. The norms behind which a state comes back (at the end of a step, of a coarse
    block, of a passage from coarse to fine) therefore begin with a gain of 0.2, with which it is one in practice.

    It differs from the paper's released code in this, too: the block is that of `ResidualEquilibrium`, whose first norm
    comes after the relu; all norms have the same number of groups; no dropout, no weight normalisation. As there,
    nothing keeps the map a contraction during training (see `ResidualEquilibrium`).

    Args:
        channels: of each resolution, two at least; a single one is `ResidualEquilibrium`.
        groups: of the norms; divides all numbers of channels.
        solver: None is `Auto()`.
        adjoint: None is `Implicit()`.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: as in `FixedPoint`, a tuple as the state; None starts from zero.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: unknown option.
        ValueError: sizes that do not fit each other; an input of another shape or too small, when called.
    """

    cell: MultiscaleCell

    def __init__(
        self,
        channels: Sequence[int],
        *,
        groups: int = 8,
        solver: Method | None = None,
        adjoint: Adjoint | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "warn",
        init: Callable[..., PyTree] | Memory | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, _OPTIONS)
        if not isinstance(channels, Sequence) or len(channels) < 2:
            raise ValueError(f"channels={channels!r} is not valid; give two numbers at least, the finest first.")
        for count in channels:
            check_count("channels", count)
        check_groups(groups, *channels)
        super().__init__(
            MultiscaleCell(channels, groups, device, dtype),
            solver=solver,
            adjoint=adjoint,
            max_steps=max_steps,
            on_failure=on_failure,
            init=init,
        )

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of each resolution, for an input of so many pixels."""
        found = [(height, width)]
        for _ in self.cell.channels[1:]:
            height, width = -(-height // 2), -(-width // 2)
            found.append((height, width))
        return found

    def _batch_dims(self, *inputs: Tensor) -> int:
        return 1

    def _start(self, *inputs: PyTree) -> PyTree:
        (x,) = inputs
        channels = self.cell.channels
        if x.ndim != 4 or x.shape[1] != channels[0]:
            raise ValueError(
                f"MultiscaleEquilibrium: the input must be (B, {channels[0]}, H, W), but it is {tuple(x.shape)}; "
                "map images to that many channels first."
            )
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        sizes = self.sizes(*x.shape[-2:])
        return tuple(x.new_zeros(x.shape[0], c, *size) for c, size in zip(channels, sizes, strict=True))
