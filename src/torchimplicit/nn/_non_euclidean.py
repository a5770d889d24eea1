"""NEMON: layers whose equilibrium is unique by a measure in the maximum norm, and robust in that norm."""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn

from .._adjoint import Adjoint
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree
from ..solvers import Method, Picard
from ._activations import Activation, activation_of
from ._affine import AffineMap
from ._certificate import Certificate
from ._checks import OPTIONS, require_between, require_last, require_size
from ._layer import FixedPoint
from ._memory import Memory
from ._operators import DenseOperator
from ._parametrizations import NonEuclidean

_PATIENT = 100_000


class NonEuclideanMonotone(FixedPoint):
    """The layer `z = σ(W z + U x + b)` with `μ_{∞,D}(W) ≤ γ < 1` (NEMON; Jafarpour et al., NeurIPS 2021).

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.NonEuclideanMonotone(3, 8)
    >>> layer(torch.randn(4, 3)).shape, layer.certificate().lipschitz > 0
    (torch.Size([4, 8]), True)

    `μ_{∞,D}(W) = maxᵢ (Wᵢᵢ + Σⱼ Dᵢ|Wᵢⱼ|/Dⱼ)`, j ≠ i, is the measure of W in the norm `‖D v‖_∞`; W need not be small.
    `weight` is `γ I + D⁻¹AD − diag(|A|1)`, A and D = diag(exp d) free. Solved by the averaged iteration
    `z ← (1 − α) z + α σ(W z + U x + b)`, `α = 1/(1 − min(0, minᵢ Wᵢᵢ))`, which contracts by `1 − α (1 − max(γ, 0))`:
    `Picard(damping=α)`, α as W is at each solve. Input `(..., in_features)`, output `(..., features)`.

    Args:
        in_features: of x.
        features: of z.
        measure: γ < 1; negative ones make a more robust layer.
        activation: a name or an `Activation`.
        solver: None is `Picard(damping=α)`.
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
        measure: float = 0.05,
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
        refuse_unknown(name, unknown, (*OPTIONS, "measure", "activation"))
        require_size(name, in_features=in_features, features=features)
        require_between(name, -float("inf"), 1.0, measure=measure)
        cell = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            cell.weight.copy_(measure * torch.eye(features))
        nn.utils.parametrize.register_parametrization(cell, "weight", NonEuclidean(measure))
        free: Any = cell.parametrizations
        nn.init.uniform_(free.weight.original0, -1.0 / features, 1.0 / features)
        max_steps = _PATIENT if solver is None and max_steps is None else max_steps
        super().__init__(cell, solver=solver, adjoint=adjoint, max_steps=max_steps, on_failure=on_failure, init=init)
        self.measure = measure
        self.activation = activation_of(name, activation)
        self.injection = nn.Linear(in_features, features, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """W."""
        return self.cell.weight  # pyright: ignore[reportFunctionMemberAccess]

    @property
    def scaling(self) -> Tensor:
        """The diagonal of D, but for a factor: the largest is 1."""
        d: Tensor = self.cell.parametrizations.weight.original1  # pyright: ignore[reportFunctionMemberAccess]
        return (d - d.max()).exp()

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """`1 − γ`, the factor of the averaged iteration in `‖D v‖_∞`, and `maxᵢ(1/Dᵢ) ‖D U‖_∞/(1 − γ)`.

        The Lipschitz bound holds in the plain maximum norm of x and z.
        """
        gamma, scaling = self._measure(), self.scaling
        factor = 1.0 - self._damping(self.weight) * (1.0 - max(gamma, 0.0))
        injection = (scaling[:, None] * self.injection.weight).abs().sum(1).max()
        lipschitz = float(injection / scaling.min()) / (1.0 - gamma)
        source = "Jafarpour, Davydov, Proskurnikov & Bullo, NeurIPS 2021"
        return Certificate(gamma < 1.0, 1.0 - gamma, factor, lipschitz, "inf, weighted by D (Lipschitz: inf)", source)

    def _measure(self) -> float:
        weight, scaling = self.weight, self.scaling
        similar = scaling[:, None] * weight / scaling
        diagonal = weight.diagonal()
        return float((diagonal + similar.abs().sum(1) - diagonal.abs()).max())

    @staticmethod
    def _damping(weight: Tensor) -> float:
        return 1.0 / (1.0 - min(0.0, float(weight.detach().diagonal().min())))

    def _method(self, cell: Any) -> Method | None:
        return Picard(damping=self._damping(cell.operator.weight))

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        (x,) = inputs
        return AffineMap(DenseOperator(self.weight, 0.0), self.activation), (self.injection(x),)

    def _batch_dims(self, *inputs: Tensor) -> int:
        return inputs[0].ndim - 1

    def _start(self, *inputs: PyTree) -> PyTree:
        x: Any = inputs[0]
        require_last(type(self).__name__, x, self.injection.in_features)
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        return x.new_zeros(*x.shape[:-1], self.injection.out_features, dtype=self.injection.weight.dtype)
