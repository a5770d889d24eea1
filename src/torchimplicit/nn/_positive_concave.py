"""Positive concave layers: a unique non-negative equilibrium without any bound of the weights."""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn

from .._adjoint import Adjoint
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree
from ..solvers import Method, Picard
from ._activations import Activation, Clamp, Sigmoid, Softsign, Tanh, activation_of
from ._affine import AffineMap
from ._certificate import Certificate
from ._checks import OPTIONS, require_between, require_last, require_size
from ._layer import FixedPoint
from ._memory import Memory
from ._operators import DenseOperator
from ._parametrizations import NonNegative

_PATIENT = 20_000
_ACTIVATIONS = ("tanh", "softsign", "relu6", "sigmoid")


class PositiveConcave(FixedPoint):
    """The layer `z = σ(W z + s(x))` with `W ≥ 0`, `s ≥ floor > 0` and σ concave on z ≥ 0 (pcDEQ; Gabor et al. 2024).

    >>> import torch, torchimplicit as ti
    >>> z = ti.nn.PositiveConcave(3, 8)(torch.randn(4, 3))
    >>> z.shape, bool((z > 0).all())
    (torch.Size([4, 8]), True)

    A positive concave map has at most one fixed point, and a bounded one has one; the plain iteration from any z ≥ 0
    goes there, however large W is, and so does the Neumann series of the adjoint. `weight` is W, by `NonNegative`;
    `s(x) = floor + softplus(U x + b)`. (With s = 0, z = 0 would be a second fixed point: hence the floor.) Other
    solvers may leave the cone, in which alone the fixed point is unique. Input `(..., in_features)`, output
    `(..., features)`.

    Args:
        in_features: of x.
        features: of z.
        activation: `"tanh"`, `"softsign"`, `"relu6"` or `"sigmoid"`.
        floor: of s, positive.
        solver: None is `Picard()`.
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
        activation: str | Activation = "tanh",
        floor: float = 0.01,
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
        refuse_unknown(name, unknown, (*OPTIONS, "activation", "floor"))
        require_size(name, in_features=in_features, features=features)
        require_between(name, 0.0, float("inf"), floor=floor)
        self_activation = activation_of(name, activation)
        if not isinstance(self_activation, Tanh | Softsign | Sigmoid) and self_activation != Clamp(0.0, 6.0):
            raise ValueError(
                f"{name}: activation={activation!r} is not concave and bounded; give one of {_ACTIVATIONS}."
            )
        cell = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
        nn.init.uniform_(cell.weight, 0.0, 1.0 / features)
        nn.utils.parametrize.register_parametrization(cell, "weight", NonNegative())
        max_steps = _PATIENT if solver is None and max_steps is None else max_steps
        super().__init__(
            cell,
            solver=Picard() if solver is None else solver,
            adjoint=adjoint,
            max_steps=max_steps,
            on_failure=on_failure,
            init=init,
        )
        self.activation = self_activation
        self.floor = floor
        self.injection = nn.Linear(in_features, features, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """W."""
        return self.cell.weight  # pyright: ignore[reportFunctionMemberAccess]

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """`1 − ε` with `ε = σ(floor)/sup σ`, a factor in Thompson's metric `maxᵢ |ln aᵢ − ln bᵢ|` for every x.

        From a, b > 0: one step takes the distance t to `−ln(ε + (1 − ε) e^(−t)) ≤ (1 − ε) t`. There is no bound of the
        Lipschitz constant.
        """
        top = self.activation.high if isinstance(self.activation, Clamp) else 1.0
        factor = 1.0 - float(self.activation(torch.tensor(self.floor, dtype=torch.float64))) / top
        source = "Gabor, Piotrowski & Cavalcante 2024; the factor follows from concavity"
        return Certificate(factor < 1.0, 1.0 - factor, factor, None, "Thompson metric", source)

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        (x,) = inputs
        s = self.floor + nn.functional.softplus(self.injection(x))
        return AffineMap(DenseOperator(self.weight, 0.0), self.activation), (s,)

    def _batch_dims(self, *inputs: Tensor) -> int:
        return inputs[0].ndim - 1

    def _start(self, *inputs: PyTree) -> PyTree:
        x: Any = inputs[0]
        require_last(type(self).__name__, x, self.injection.in_features)
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        return x.new_zeros(*x.shape[:-1], self.injection.out_features, dtype=self.injection.weight.dtype)
