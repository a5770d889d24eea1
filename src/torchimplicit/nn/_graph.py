"""`ImplicitGraph`: the implicit graph convolution `Z = φ(Â Z Wᵀ + X)`, whose equilibrium exists and is unique."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._adjoint import Adjoint
from .._api import fixed_point
from .._options import nearest, refuse_unknown
from .._report import OnFailure
from .._solution import PyTree, Solution
from ..diagnostics import record
from ..solvers import Method
from ._layer import FixedPoint

_OPTIONS = ("kappa", "activation", "solver", "adjoint", "max_steps", "on_failure", "init", "device", "dtype")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "identity": lambda t: t,
}
"""Componentwise, with slopes in [0, 1]."""


class RowBall(nn.Module):
    """The nearest matrix whose rows have sums of absolute values of at most `radius`, a parametrization.

    Each row is projected onto the ℓ1 ball by the threshold of Duchi et al. (2008); differentiable almost everywhere,
    and where it does nothing the identity.

    Args:
        radius: κ, so that `‖W‖_∞ ≤ κ`.
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, W: Tensor) -> Tensor:
        """`(m, n)` to `(m, n)`."""
        size = W.abs()
        falling = size.sort(dim=1, descending=True).values
        count = torch.arange(1, W.shape[1] + 1, dtype=W.dtype, device=W.device)
        level = (falling.cumsum(dim=1) - self.radius) / count
        last = (falling > level).sum(dim=1, keepdim=True).clamp(min=1) - 1
        shrunk = W.sign() * (size - level.gather(1, last)).clamp(min=0.0)
        return torch.where(size.sum(dim=1, keepdim=True) > self.radius, shrunk, W)

    def right_inverse(self, W: Tensor) -> Tensor:
        """Any W is its own preimage."""
        return W


@dataclass(frozen=True, eq=False)
class GraphCertificate:
    """Why `Z = φ(Â Z Wᵀ + X)` has exactly one solution.

    Attributes:
        contraction: `‖W‖_∞·λ̄`, with `λ̄ ≥ λ_pf(|Â|)` of the graph as it is used; below 1.
        lipschitz: `1 / (1 − contraction)`, of the solution as a function of X, in the norm below.
        weight: `v > 0` of the norm `max_ij |Z_ij| / v_i` in which these hold, `(n,)`.
        source: of the inequality.
    """

    contraction: float
    lipschitz: float
    weight: Tensor
    source: str


def perron(adjacency: Tensor, steps: int = 50) -> tuple[Tensor, Tensor]:
    """An upper bound of `λ_pf(|A|)` and the vector `v > 0` that proves it: `|A| v ≤ λ̄ v`.

    For any positive v the largest `(|A| v)_i / v_i` is such a bound (Collatz 1942; Horn & Johnson 2013, 8.1.26); power
    steps make it a sharp one, where a graph is connected.

    Args:
        adjacency: `(n, n)`, dense or sparse.
        steps: products with it.
    """
    size = adjacency.abs()
    v = torch.ones(adjacency.shape[0], 1, dtype=adjacency.dtype, device=adjacency.device)
    best, witness = None, v
    for _ in range(steps + 1):
        image = size @ v
        ratio = image / v
        bound = ratio.amax()
        if best is None or bool(bound < best):
            best, witness = bound, v
        if bool(bound - ratio.amin() <= 1e-6 * bound):  # the least ratio is a lower bound
            break
        # A step of |A| + its bound: no component comes near zero, nor does a sign alternate.
        v = image + bound * v
        v = v / v.amax().clamp(min=torch.finfo(v.dtype).tiny)
        v = v.clamp(min=1e-6)
    assert best is not None
    return best, witness[:, 0]


class GraphCell(nn.Module):
    """`φ(Â Z Wᵀ + X)` on `(..., n, d)`, with `‖W‖_∞ ≤ κ`."""

    pure = True

    def __init__(self, features: int, kappa: float, activation: str, device: object, dtype: object) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False, device=device, dtype=dtype)  # pyright: ignore[reportArgumentType]
        parametrize.register_parametrization(self.linear, "weight", RowBall(kappa))
        self.activation = activation

    def forward(self, z: Tensor, x: Tensor, adjacency: Tensor, weight: Tensor) -> Tensor:
        """Weight is W, projected once for each solve."""
        return _ACTIVATIONS[self.activation](spread(adjacency, torch.matmul(z, weight.mT)) + x)


def spread(adjacency: Tensor, z: Tensor) -> Tensor:
    """`Â z` for `(n, n)`, dense or sparse, and `(..., n, d)`."""
    if z.ndim == 2 or not adjacency.is_sparse:
        return adjacency @ z
    flat = z.movedim(-2, 0)
    return (adjacency @ flat.flatten(1)).reshape(flat.shape).movedim(0, -2)


class ImplicitGraph(FixedPoint):
    """The layer `Z = φ(Â Z Wᵀ + X)` of an implicit graph neural network (IGNN; Gu et al. 2020, equation 4, transposed).

    `Â` is the adjacency matrix divided by a proven upper bound of its Perron–Frobenius eigenvalue, `‖W‖_∞ ≤ κ < 1` by a
    parametrization: then the map is a contraction by κ whatever the weights and the graph are (theorem 1 there, which
    constrains W by `κ/λ_pf` instead of the graph). Nodes hear of others at any distance.

    >>> import torch, torchimplicit as ti
    >>> chain = torch.diag(torch.ones(9), 1) + torch.diag(torch.ones(9), -1)
    >>> layer = ti.nn.ImplicitGraph(16)
    >>> layer(torch.randn(10, 16), chain).shape
    torch.Size([10, 16])
    >>> layer.certificate(chain).contraction < 0.9501
    True

    X is `(..., n, d)`, the features of n nodes, which a layer before this one makes; the adjacency `(n, n)`, dense or
    sparse, shared by the leading dims. A graph is one problem, and each of the leading dims' is.

    Args:
        features: d.
        kappa: κ, in (0, 1).
        activation: `"relu"`, `"tanh"` or `"identity"`.
        solver: None is `Auto()`.
        adjoint: None is `Implicit()`.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: as in `FixedPoint`, a callable of X and the adjacency; None starts from zero.
        device: of W.
        dtype: of W.

    Raises:
        TypeError: unknown option.
        ValueError: shapes do not fit, or an option is out of range.
    """

    cell: GraphCell

    def __init__(
        self,
        features: int,
        *,
        kappa: float = 0.95,
        activation: str = "relu",
        solver: Method | None = None,
        adjoint: Adjoint | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "warn",
        init: Callable[..., PyTree] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown("ImplicitGraph", unknown, _OPTIONS)
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"features={features!r} is not valid; give an integer >= 1.")
        if not 0.0 < kappa < 1.0:
            raise ValueError(f"kappa={kappa!r} is not valid; give a number in (0, 1).")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not known; {nearest(str(activation), _ACTIVATIONS)}")
        super().__init__(
            GraphCell(features, kappa, activation, device, dtype),
            solver=solver,
            adjoint=adjoint,
            max_steps=max_steps,
            on_failure=on_failure,
            init=init,
        )

    def solve(self, *inputs: Tensor, trace: bool = False) -> Solution:
        """The equilibrium for X and an adjacency matrix, with its evidence."""
        x, adjacency = inputs
        check_graph("ImplicitGraph", x, adjacency, self.cell.linear.in_features)
        weight = self.cell.linear.weight
        bound, _ = perron(adjacency)
        solution = fixed_point(
            self.cell,
            self._start(x, adjacency),
            x,
            adjacency / torch.where(bound > 0, bound, 1.0),
            weight,
            solver=self.solver,
            adjoint=self.adjoint,
            batch_dims=x.ndim - 2,
            max_steps=self.max_steps,
            on_failure=self.on_failure,
            trace=trace,
        )
        record(self, solution)
        return solution

    @torch.no_grad()
    def certificate(self, adjacency: Tensor) -> GraphCertificate:
        """The contraction factor on a graph, and the norm in which it holds."""
        bound, weight = perron(adjacency)
        scaled = adjacency / torch.where(bound > 0, bound, 1.0)
        rise = float(((scaled.abs() @ weight[:, None])[:, 0] / weight).amax())
        factor = float(self.cell.linear.weight.abs().sum(dim=1).amax()) * rise
        return GraphCertificate(
            contraction=factor,
            lipschitz=1.0 / (1.0 - factor),
            weight=weight,
            source="Gu et al. 2020, theorem 1; Collatz 1942 for the bound",
        )


def check_graph(layer: str, x: Tensor, adjacency: Tensor, features: int) -> None:
    """Raise `ValueError` unless X is `(..., n, d)` and the adjacency `(n, n)`."""
    if x.ndim < 2 or x.shape[-1] != features:
        raise ValueError(f"{layer}: X must be (..., n, {features}), but is {tuple(x.shape)}.")
    nodes = x.shape[-2]
    if tuple(adjacency.shape) != (nodes, nodes):
        raise ValueError(f"{layer}: the adjacency must be ({nodes}, {nodes}), but is {tuple(adjacency.shape)}.")
