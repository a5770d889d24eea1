"""Contractive equilibrium layers: `‖W‖ ≤ κ < 1` by parametrisation, in the two-norm or the maximum norm."""

from collections.abc import Callable
from typing import Any, ClassVar, Never

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._adjoint import Adjoint
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree
from ..solvers import Method
from ._activations import Activation, activation_of
from ._affine import AffineMap, SplitMap
from ._certificate import Certificate
from ._checks import OPTIONS, require_between, require_images, require_last, require_norm, require_size
from ._layer import FixedPoint
from ._memory import Memory
from ._operators import DenseOperator
from ._parametrizations import InfinityBall, SpectralBall, SpectralKernel, conv_norm_bound


class ContractiveLinear(FixedPoint):
    """The layer `z = σ(W z + U x + b)` with `‖W‖ ≤ κ`: a contraction, whatever is learnt (Banach 1922).

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.ContractiveLinear(3, 8, contraction=0.8, norm="inf")
    >>> layer(torch.randn(4, 3)).shape, layer.certificate().factor <= 0.8
    (torch.Size([4, 8]), True)

    With `norm="2"` W is scaled down where its spectral norm, computed exactly, exceeds κ; with `norm="inf"` each of its
    rows is projected onto the ℓ1-ball of radius κ (El Ghaoui et al. 2021, implicit deep learning), and the projection
    is differentiated too. Input `(..., in_features)`, output `(..., features)`.

    Args:
        in_features: of x.
        features: of z.
        contraction: κ in (0, 1).
        norm: `"2"` or `"inf"`.
        activation: a name or an `Activation`.
        solver: None is `Auto()`.
        adjoint: None is `Implicit()`.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: as in `FixedPoint`; None starts from zero.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        contraction: float = 0.9,
        norm: str = "2",
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
        refuse_unknown(name, unknown, (*OPTIONS, "contraction", "norm", "activation"))
        require_size(name, in_features=in_features, features=features)
        require_between(name, 0.0, 1.0, contraction=contraction)
        require_norm(name, norm)
        cell = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
        ball = SpectralBall(contraction) if norm == "2" else InfinityBall(contraction)
        nn.utils.parametrize.register_parametrization(cell, "weight", ball)
        super().__init__(cell, solver=solver, adjoint=adjoint, max_steps=max_steps, on_failure=on_failure, init=init)
        self.contraction, self.norm = contraction, norm
        self.activation = activation_of(name, activation)
        self.injection = nn.Linear(in_features, features, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """W."""
        return self.cell.weight  # pyright: ignore[reportFunctionMemberAccess]

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """The norm of W, which is the factor of `Picard`, and `‖U‖/(1 − ‖W‖)`."""
        order = 2 if self.norm == "2" else float("inf")
        factor = float(torch.linalg.matrix_norm(self.weight, order))
        lipschitz = float(torch.linalg.matrix_norm(self.injection.weight, order)) / (1.0 - factor)
        source = (
            "Banach 1922; Fung et al. 2022, thm. 0.1"
            if self.norm == "2"
            else "El Ghaoui et al. 2021, implicit deep learning"
        )
        return Certificate(factor < 1.0, 1.0 - factor, factor, lipschitz, self.norm, source)

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        (x,) = inputs
        margin = 1.0 - self.contraction
        maps = SplitMap if self.norm == "2" else AffineMap
        return maps(DenseOperator(self.weight, margin), self.activation), (self.injection(x),)

    def _batch_dims(self, *inputs: Tensor) -> int:
        return inputs[0].ndim - 1

    def _start(self, *inputs: PyTree) -> PyTree:
        x: Any = inputs[0]
        require_last(type(self).__name__, x, self.injection.in_features)
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        return x.new_zeros(*x.shape[:-1], self.injection.out_features, dtype=self.injection.weight.dtype)


class _ConvMap:
    """`(z, c) ↦ σ(K ∗ z + c)`, with K computed once."""

    samplewise: ClassVar[bool] = True

    def __init__(self, kernel: Tensor, activation: Activation) -> None:
        self.kernel = kernel
        self.activation = activation

    def __call__(self, z: Tensor, c: Tensor) -> Tensor:
        """Shaped like z."""
        return self.activation(functional.conv2d(z, self.kernel, padding=self.kernel.shape[-1] // 2) + c)


class ContractiveConv2d(FixedPoint):
    """The layer `z = σ(K ∗ z + U ∗ x + b)`, its convolution of norm at most κ for images of every size.

    >>> import torch, torchimplicit as ti
    >>> ti.nn.ContractiveConv2d(1, 4)(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 4, 8, 8])

    `norm="2"`: K is scaled down where an upper bound of its norm (see `conv_norm_bound`; never below the norm itself,
    as power iterations are) exceeds κ. `norm="inf"`: the weights that reach one output are projected onto the ℓ1-ball
    of radius κ. Zero padding; input `(B, in_channels, H, W)`, output `(B, channels, H, W)`.

    Args:
        in_channels: of x.
        channels: of z.
        kernel_size: of K and U, odd.
        contraction: κ in (0, 1).
        norm: `"2"` or `"inf"`.
        activation: a name or an `Activation`.
        solver: None is `Auto()`.
        adjoint: None is `Implicit()`.
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
        contraction: float = 0.9,
        norm: str = "2",
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
        refuse_unknown(name, unknown, (*OPTIONS, "contraction", "norm", "activation"))
        require_size(name, in_channels=in_channels, channels=channels)
        require_size(name, odd=True, kernel_size=kernel_size)
        require_between(name, 0.0, 1.0, contraction=contraction)
        require_norm(name, norm)
        pad, place = kernel_size // 2, {"device": device, "dtype": dtype}
        cell = nn.Conv2d(channels, channels, kernel_size, padding=pad, bias=False, **place)
        ball = SpectralKernel(contraction) if norm == "2" else InfinityBall(contraction)
        nn.utils.parametrize.register_parametrization(cell, "weight", ball)
        super().__init__(cell, solver=solver, adjoint=adjoint, max_steps=max_steps, on_failure=on_failure, init=init)
        self.contraction, self.norm = contraction, norm
        self.activation = activation_of(name, activation)
        self.injection = nn.Conv2d(in_channels, channels, kernel_size, padding=pad, **place)

    @property
    def weight(self) -> Tensor:
        """K."""
        return self.cell.weight  # pyright: ignore[reportFunctionMemberAccess]

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """The bound of the norm of K, which is the factor of `Picard`, and that of U over what it leaves of 1."""
        bound = conv_norm_bound if self.norm == "2" else _infinity_norm
        factor, injection = float(bound(self.weight)), float(bound(self.injection.weight))
        source = (
            "Banach 1922; norms: Singla & Feizi 2021"
            if self.norm == "2"
            else "El Ghaoui et al. 2021, implicit deep learning"
        )
        return Certificate(factor < 1.0, 1.0 - factor, factor, injection / (1.0 - factor), self.norm, source)

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        (x,) = inputs
        return _ConvMap(self.weight, self.activation), (self.injection(x),)

    def _start(self, *inputs: PyTree) -> PyTree:
        x: Any = inputs[0]
        require_images(type(self).__name__, x, self.injection.in_channels)
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        shape = (x.shape[0], self.injection.out_channels, *x.shape[2:])
        return x.new_zeros(shape, dtype=self.injection.weight.dtype)


def _infinity_norm(kernel: Tensor) -> Tensor:
    """The largest sum of absolute weights that reach one output."""
    return kernel.abs().flatten(1).sum(1).max()
