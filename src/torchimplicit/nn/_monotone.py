"""Monotone equilibrium layers: a unique equilibrium for every input, however large the weights become."""

import math
from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn

from .._adjoint import Adjoint, Implicit
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree
from ..linear import RELAXATION, Splitting, resolvent_step
from ..solvers import Method, PeacemanRachford
from ._activations import Activation, activation_of
from ._affine import SplitMap
from ._certificate import Certificate
from ._checks import OPTIONS, require_last, require_margin, require_size
from ._layer import FixedPoint
from ._memory import Memory
from ._operators import DenseOperator
from ._parametrizations import MonotoneMatrix


class MonotoneCell(nn.Module):
    """`σ(W z + c)` with `I − W ⪰ m I`: `weight` is W, made of free parameters A and B by `MonotoneMatrix`."""

    def __init__(
        self,
        features: int,
        margin: float,
        activation: Activation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.activation = activation
        self.weight = nn.Parameter((1.0 - margin) * torch.eye(features, device=device, dtype=dtype))
        nn.utils.parametrize.register_parametrization(self, "weight", MonotoneMatrix(margin))
        bound = features**-0.5
        parametrizations: Any = self.parametrizations
        for free in parametrizations.weight.parameters():
            nn.init.uniform_(free, -bound, bound)

    def operator(self, c: Tensor) -> DenseOperator:
        """W as it is now."""
        return DenseOperator(self.weight, self.margin)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """`(..., n)`, `(..., n)` to `(..., n)`."""
        return self.activation(self.operator(c).mv(z) + c)


class Split(FixedPoint):
    """Base of the layers `z = σ(W z + c)`, `c` an injection of x, which are solved by splitting in both passes."""

    cell: Any
    injection: Any

    def __init__(self, cell: nn.Module, injection: nn.Module, features: int, options: dict[str, Any]) -> None:
        options["solver"] = PeacemanRachford() if options["solver"] is None else options["solver"]
        options["adjoint"] = Implicit(linear_solver=Splitting()) if options["adjoint"] is None else options["adjoint"]
        super().__init__(cell, **options)
        self.injection = injection
        self.features = features

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        (x,) = inputs
        c = self.injection(x)
        return SplitMap(self.cell.operator(c), self.cell.activation), (c,)


class MonotoneLinear(Split):
    """The monotone equilibrium layer `z = σ(W z + U x + b)`, `I − W ⪰ m I` (monDEQ; Winston & Kolter, NeurIPS 2020).

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.MonotoneLinear(3, 8)
    >>> x = torch.randn(4, 3)
    >>> z = layer(x)
    >>> bool(torch.allclose(z, torch.relu(z @ layer.weight.T + layer.injection(x)), atol=1e-3)), z.shape
    (True, torch.Size([4, 8]))

    There is exactly one z for every x, whatever the parameters are: `weight` is `W = (1 − m) I − AᵀA + B − Bᵀ`. Its
    norm has no bound, and `Picard` or `Anderson` may fail. The defaults do not: Peaceman and Rachford's splitting in
    the forward pass and in the adjoint. Input `(..., in_features)`, output `(..., features)`.

    Args:
        in_features: of x.
        features: of z.
        margin: m in (0, 1]. The smaller, the more W can do, and the more steps it takes.
        activation: a name or an `Activation`: any function with slopes in [0, 1].
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
        in_features: int,
        features: int,
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
        require_size(name, in_features=in_features, features=features)
        require_margin(name, margin)
        options = {"solver": solver, "adjoint": adjoint, "max_steps": max_steps, "on_failure": on_failure, "init": init}
        cell = MonotoneCell(features, margin, activation_of(name, activation), device, dtype)
        super().__init__(cell, nn.Linear(in_features, features, device=device, dtype=dtype), features, options)

    @property
    def weight(self) -> Tensor:
        """W."""
        return self.cell.weight

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """Margin, the factor of the splitting by its default step size, and `‖U‖₂/m`."""
        operator = self.cell.operator(self.weight)
        margin = operator.margin
        factor = splitting_factor(margin, operator.norm_bound(), resolvent_step(operator))
        lipschitz = float(torch.linalg.matrix_norm(self.injection.weight, 2)) / margin
        source = "Winston & Kolter 2020, §3; Pabbaraju, Winston & Kolter 2021, thm. 1"
        return Certificate(True, margin, factor, lipschitz, "2", source)

    def _batch_dims(self, *inputs: Tensor) -> int:
        (x,) = inputs
        require_last(type(self).__name__, x, self.injection.in_features)
        return x.ndim - 1

    def _start(self, *inputs: PyTree) -> PyTree:
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        x: Any = inputs[0]
        require_last(type(self).__name__, x, self.injection.in_features)
        return x.new_zeros(*x.shape[:-1], self.features, dtype=self.injection.weight.dtype)


def splitting_factor(margin: float, norm: float, step_size: float) -> float:
    """The bound of `‖(1 − ρ) I + ρ (2 (I + αF)⁻¹ − I)‖` for F monotone by m with norm L, ρ the relaxation.

    It is `1 − ρ + ρ √(1 − 4αm/(1 + αL)²)`.
    """
    reflected = math.sqrt(max(0.0, 1.0 - 4.0 * step_size * margin / (1.0 + step_size * norm) ** 2))
    return 1.0 - RELAXATION + RELAXATION * reflected
