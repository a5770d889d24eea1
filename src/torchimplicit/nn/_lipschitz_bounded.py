"""LBEN: a monotone layer, in a learnt metric, whose Lipschitz constant from x to the output is prescribed."""

import math
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
from ._affine import SplitMap
from ._certificate import Certificate
from ._checks import OPTIONS, require_between, require_last, require_size
from ._memory import Memory
from ._monotone import Split, splitting_factor
from ._operators import DenseOperator


class LipschitzBounded(Split):
    """`z = σ(W z + U x + b)`, `y = W_o z + b_y` with `‖y(x) − y(x')‖₂ ≤ L ‖x − x'‖₂` (LBEN; Revay et al. 2020).

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.LipschitzBounded(3, 8, 2, lipschitz=1.0)
    >>> layer(torch.randn(4, 3)).shape, layer.certificate().lipschitz
    (torch.Size([4, 2]), 1.0)

    `W = I − Ψ (W_oᵀW_o/(2L) + Ψ⁻¹UUᵀΨ⁻¹/(2L) + VᵀV + εI + N − Nᵀ)` with `Ψ = diag(exp d)`: V, N, d, U and W_o are free.
    `I − W` is monotone in the inner product with weights Ψ⁻¹, and the splitting methods solve it as they do the others.
    The bound holds for every activation with slopes in [0, 1]. The call gives y; `solve(x)` the Solution for z.
    Input `(..., in_features)`, output `(..., out_features)`.

    Args:
        in_features: of x.
        features: of z.
        out_features: of y.
        lipschitz: L > 0.
        epsilon: ε > 0.
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
        in_features: int,
        features: int,
        out_features: int,
        *,
        lipschitz: float = 1.0,
        epsilon: float = 0.05,
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
        refuse_unknown(name, unknown, (*OPTIONS, "lipschitz", "epsilon", "activation"))
        require_size(name, in_features=in_features, features=features, out_features=out_features)
        require_between(name, 0.0, math.inf, lipschitz=lipschitz, epsilon=epsilon)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        options = {"solver": solver, "adjoint": adjoint, "max_steps": max_steps, "on_failure": on_failure, "init": init}
        cell = _Free(features, place)
        super().__init__(cell, nn.Linear(in_features, features, **place), features, options)
        self.readout = nn.Linear(features, out_features, **place)
        self.activation = activation_of(name, activation)
        self.lipschitz, self.epsilon = float(lipschitz), float(epsilon)

    @property
    def weight(self) -> Tensor:
        """W, made of V, N, d, U and W_o."""
        V, N, d = self.cell.V, self.cell.N, self.cell.d
        U, out = self.injection.weight, self.readout.weight
        scaled = U * (-d).exp()[:, None]
        gram = (out.mT @ out + scaled @ scaled.mT) / (2.0 * self.lipschitz)
        identity = torch.eye(len(d), dtype=d.dtype, device=d.device)
        return identity - d.exp()[:, None] * (gram + V.mT @ V + self.epsilon * identity + N - N.mT)

    def forward(self, *inputs: PyTree) -> PyTree:
        """y for these inputs."""
        return self.readout(self.solve(*inputs).value)

    @torch.no_grad()
    def certificate(self) -> Certificate:
        """Margin and factor of the splitting in the metric Ψ⁻¹, and the prescribed bound from x to y."""
        operator = self.operator()
        factor = splitting_factor(operator.margin, operator.norm_bound(), resolvent_step(operator))
        source = "Revay, Wang & Manchester 2020"
        norm = "2, weighted by 1/Psi (Lipschitz: 2)"
        return Certificate(operator.margin > 0.0, operator.margin, factor, self.lipschitz, norm, source)

    def operator(self) -> DenseOperator:
        """W as it is now."""
        metric = (-self.cell.d.detach()).exp()
        weight = self.weight
        root = metric.sqrt()
        shifted = root[:, None] * (torch.eye(len(root), dtype=root.dtype, device=root.device) - weight.detach()) / root
        least = float(torch.linalg.eigvalsh(0.5 * (shifted + shifted.mT))[0])
        # What is proved: pᵀ Ψ⁻¹(I − W) p ≥ ε ‖p‖² ≥ ε min Ψ · ‖p‖² in the metric.
        return DenseOperator(weight, max(least, self.epsilon / float(metric.max())), metric)

    def _bound(self, *inputs: PyTree) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
        (x,) = inputs
        return SplitMap(self.operator(), self.activation), (self.injection(x),)

    def _batch_dims(self, *inputs: Tensor) -> int:
        return inputs[0].ndim - 1

    def _start(self, *inputs: PyTree) -> PyTree:
        x: Any = inputs[0]
        require_last(type(self).__name__, x, self.injection.in_features)
        if self.init is not None and not isinstance(self.init, Memory):
            return self.init(*inputs)
        return x.new_zeros(*x.shape[:-1], self.features, dtype=self.injection.weight.dtype)


class _Free(nn.Module):
    """V, N and d."""

    def __init__(self, features: int, place: dict[str, Any]) -> None:
        super().__init__()
        bound = features**-0.5
        self.V = nn.Parameter(torch.empty(features, features, **place).uniform_(-bound, bound))
        self.N = nn.Parameter(torch.empty(features, features, **place).uniform_(-bound, bound))
        self.d = nn.Parameter(torch.zeros(features, **place))

    def forward(self, *_: Tensor) -> Tensor:
        """Not a map by itself: the layer's W needs U and W_o too."""
        raise NotImplementedError("LipschitzBounded: call the layer; its cell holds parameters only.")
