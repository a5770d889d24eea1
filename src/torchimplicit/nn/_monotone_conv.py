"""The monotone convolutional layer: W a convolution with periodic padding, its resolvent by the Fourier transform."""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn

from .._adjoint import Adjoint
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree
from ..linear import resolvent_step
from ..solvers import Method
from ._activations import Activation, activation_of
from ._certificate import Certificate
from ._checks import OPTIONS, require_images, require_margin, require_size
from ._memory import Memory
from ._monotone import Split, splitting_factor
from ._operators import CircularOperator, spectrum
from ._parametrizations import MonotoneKernel, conv_norm_bound


class MonotoneConvCell(nn.Module):
    """`σ(W z + c)`, W a circular convolution with `I − W ⪰ m I`: `weight` is its kernel, made by `MonotoneKernel`."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        margin: float,
        activation: Activation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.activation = activation
        shape = (2, channels, channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        bound = (channels * kernel_size**2) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        # unsafe: the weight has another shape than what it is made of.
        nn.utils.parametrize.register_parametrization(self, "weight", MonotoneKernel(margin), unsafe=True)

    def operator(self, c: Tensor) -> CircularOperator:
        """W as it is now, on images of the size of c."""
        size = (c.shape[-2], c.shape[-1])
        return CircularOperator(spectrum(self.weight, size), size, self.margin)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """`(B, C, H, W)`, `(B, C, H, W)` to `(B, C, H, W)`."""
        return self.activation(self.operator(c).mv(z) + c)


class MonotoneConv2d(Split):
    """The monotone convolutional layer `z = σ(W z + U x + b)` (monDEQ; Winston & Kolter, NeurIPS 2020, §4).

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.MonotoneConv2d(1, 4, stride=2, padding=1)
    >>> layer(torch.rand(2, 1, 16, 16)).shape
    torch.Size([2, 4, 8, 8])

    W is a circular convolution `channels → channels`, `(1 − m) I − AᵀA + B − Bᵀ` with A and B of `kernel_size`; U is an
    ordinary one. Products with W and its resolvent are taken at each frequency: H and W must be `2·kernel_size − 1` at
    least. Input `(B, in_channels, ·, ·)`, output `(B, channels, H, W)`, as U makes it.

    Args:
        in_channels: of x.
        channels: of z.
        kernel_size: of A and B, odd.
        injection_size: kernel size of U; None is `kernel_size`.
        stride: of U.
        padding: of U, with zeros.
        margin: m in (0, 1].
        activation: a name or an `Activation`.
        solver: None is `PeacemanRachford()`.
        adjoint: None is `Implicit(linear_solver=Splitting())`.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: as in `FixedPoint`; None starts from zero.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 3,
        *,
        injection_size: int | None = None,
        stride: int = 1,
        padding: int = 0,
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
        refuse_unknown(name, unknown, (*OPTIONS, "injection_size", "stride", "padding", "margin", "activation"))
        injection_size = kernel_size if injection_size is None else injection_size
        require_size(name, in_channels=in_channels, channels=channels, injection_size=injection_size, stride=stride)
        require_size(name, odd=True, kernel_size=kernel_size)
        require_margin(name, margin)
        options = {"solver": solver, "adjoint": adjoint, "max_steps": max_steps, "on_failure": on_failure, "init": init}
        cell = MonotoneConvCell(channels, kernel_size, margin, activation_of(name, activation), device, dtype)
        injection = nn.Conv2d(
            in_channels, channels, injection_size, stride=stride, padding=padding, device=device, dtype=dtype
        )
        super().__init__(cell, injection, channels, options)

    @property
    def weight(self) -> Tensor:
        """The kernel of W, `(C, C, 2k − 1, 2k − 1)`."""
        return self.cell.weight

    @torch.no_grad()
    def certificate(self, size: tuple[int, int]) -> Certificate:
        """Margin, the factor of the splitting by its default step size, and `‖U‖₂/m`, on images of z of this size."""
        operator = CircularOperator(spectrum(self.weight, size), size, self.cell.margin)
        factor = splitting_factor(operator.margin, operator.norm_bound(), resolvent_step(operator))
        lipschitz = float(conv_norm_bound(self.injection.weight)) / operator.margin
        source = "Winston & Kolter 2020, §3; Pabbaraju, Winston & Kolter 2021, thm. 1"
        return Certificate(True, operator.margin, factor, lipschitz, "2", source)

    def _start(self, *inputs: PyTree) -> PyTree:
        x: Any = inputs[0]
        require_images(type(self).__name__, x, self.injection.in_channels)
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        u = self.injection
        size = [(n + 2 * u.padding[i] - u.kernel_size[i]) // u.stride[i] + 1 for i, n in enumerate(x.shape[2:])]
        return x.new_zeros(x.shape[0], self.features, *size, dtype=u.weight.dtype)
