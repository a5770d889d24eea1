"""`ResidualEquilibrium`: the convolutional residual block with group norm, at its fixed point."""

from collections.abc import Callable
from typing import Never

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

_OPTIONS = (
    "hidden_channels",
    "kernel_size",
    "groups",
    "solver",
    "adjoint",
    "max_steps",
    "on_failure",
    "init",
    "device",
    "dtype",
)
_SPREAD = 0.01
"""Standard deviation of the initial weights."""


class ResidualCell(nn.Module):
    """`gn₃(relu(z + gn₂(x + conv₂(gn₁(relu(conv₁ z))))))`, convolutions without bias.

    Args:
        channels: of z and x.
        hidden_channels: between the two convolutions.
        kernel_size: odd; borders are padded with zeros.
        groups: of the three norms.
        device: of the parameters.
        dtype: of the parameters.
    """

    samplewise = True
    """x is indexed by sample as z is, and a group norm sees one sample: converged ones may leave the batch."""

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        groups: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv1 = nn.Conv2d(
            channels, hidden_channels, kernel_size, padding=padding, bias=False, device=device, dtype=dtype
        )
        self.conv2 = nn.Conv2d(
            hidden_channels, channels, kernel_size, padding=padding, bias=False, device=device, dtype=dtype
        )
        self.norm1 = nn.GroupNorm(groups, hidden_channels, device=device, dtype=dtype)
        self.norm2 = nn.GroupNorm(groups, channels, device=device, dtype=dtype)
        self.norm3 = nn.GroupNorm(groups, channels, device=device, dtype=dtype)
        for convolution in (self.conv1, self.conv2):
            nn.init.normal_(convolution.weight, std=_SPREAD)

    def forward(self, z: Tensor, x: Tensor | float) -> Tensor:
        """`(B, C, H, W)`, `(B, C, H, W)` to `(B, C, H, W)`; x may be the number 0."""
        y = self.norm1(functional.relu(self.conv1(z)))
        return self.norm3(functional.relu(z + self.norm2(x + self.conv2(y))))


class ResidualEquilibrium(FixedPoint):
    """The equilibrium of a residual block, `z = gn(relu(z + gn(x + conv(gn(relu(conv z))))))`.

    The layer of chapter 4 of the Deep Implicit Layers tutorial (Kolter, Duvenaud & Johnson 2020) and the residual block
    of a multiscale DEQ (Bai, Koltun & Kolter 2020, §3.2). Input and output have shape `(B, channels, H, W)`; the start
    is z = 0. As there, convolutions begin with weights of standard deviation 0.01, with which the map contracts.

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.ResidualEquilibrium(8, 16, groups=4, solver=ti.Anderson(rtol=1e-4))
    >>> solution = layer.solve(torch.randn(2, 8, 7, 7))
    >>> solution.value.shape, solution.converged.tolist()
    (torch.Size([2, 8, 7, 7]), [True, True])

    Nothing keeps it a contraction during training: a group norm divides by a deviation that no parameter bounds, so
    there is no `certificate()`. Watch `ti.monitor`, and penalise the Jacobian if it grows (Bai, Koltun & Kolter 2021).

    Args:
        channels: of input and output.
        hidden_channels: between the convolutions; None is `channels`.
        kernel_size: odd.
        groups: of the norms; divides both numbers of channels.
        solver: None is `Auto()`.
        adjoint: None is `Implicit()`.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: as in `FixedPoint`; None starts from zero.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: unknown option.
        ValueError: sizes that do not fit each other; an input of another shape, when called.
    """

    cell: ResidualCell

    def __init__(
        self,
        channels: int,
        hidden_channels: int | None = None,
        *,
        kernel_size: int = 3,
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
        hidden = channels if hidden_channels is None else hidden_channels
        check_count("channels", channels)
        check_count("hidden_channels", hidden)
        check_count("kernel_size", kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is not valid; give an odd number, which keeps H and W.")
        check_groups(groups, channels, hidden)
        super().__init__(
            ResidualCell(channels, hidden, kernel_size, groups, device, dtype),
            solver=solver,
            adjoint=adjoint,
            max_steps=max_steps,
            on_failure=on_failure,
            init=init,
        )

    def _batch_dims(self, *inputs: Tensor) -> int:
        (x,) = inputs
        channels = self.cell.conv1.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(
                f"ResidualEquilibrium: the input must be (B, {channels}, H, W), but it is {tuple(x.shape)}; "
                "map images to that many channels first."
            )
        return 1


def check_count(name: str, value: object) -> None:
    """Raise unless value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is not valid; give an integer >= 1.")


def check_groups(groups: int, *channels: int) -> None:
    """Raise unless `groups` divides all numbers of channels."""
    check_count("groups", groups)
    for count in channels:
        if count % groups:
            raise ValueError(f"groups={groups} is not valid; it must divide the {count} channels.")
