"""`TanhEquilibrium`: `z = tanh(W z + x)`, the layer the project grew from, with its Jacobian in closed form."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Never

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._adjoint import Adjoint
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree, Solution
from ..solvers import Method
from ._layer import FixedPoint
from ._memory import Memory
from ._shifted_tanh import ShiftedTanh, shifted_tanh
from ._tanh_jacobian import TanhJacobian

_OPTIONS = ("solver", "adjoint", "max_steps", "on_failure", "init", "depth", "compiled", "device", "dtype")


@dataclass(frozen=True, eq=False, repr=False)
class _ReducedJacobian:
    """`J = D W` of a cell with products in another dtype; vectors in that of the slope."""

    slope: Tensor
    cell: "_ReducedCell"

    def mv(self, p: Tensor) -> Tensor:
        """`D W p`."""
        return self.slope * self.cell.product(p)

    def rmv(self, u: Tensor) -> Tensor:
        """`Wᵀ D u`."""
        weight = self.cell.weight
        return torch.matmul((self.slope * u).to(weight.dtype), weight).to(u.dtype)

    def select(self, samples: Tensor) -> "_ReducedJacobian":
        """The Jacobian of some samples, by their indices."""
        return _ReducedJacobian(self.slope.index_select(0, samples), self.cell)

    def dense(self) -> Tensor:
        """`(B, n, n)`."""
        return self.slope[..., :, None] * self.cell.weight


class _ReducedCell:
    """`tanh(W z + x)` with products in another dtype, which no graph is recorded of.

    Args:
        weight: W.
        dtype: of the products.
    """

    samplewise = True
    pure = True

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype)

    @cached_property
    def _transposed(self) -> Tensor:
        """By which a product is a quarter quicker than by the weight as it lies."""
        return self.weight.t().contiguous()

    def product(self, z: Tensor) -> Tensor:
        """`W z`."""
        return torch.matmul(z.to(self.weight.dtype), self._transposed)

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        """`(..., n)`, `(..., n)` to `(..., n)`."""
        return torch.add(x, self.product(z)).tanh_()

    def repeat(self, z: Tensor, times: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `TanhCell.repeat`."""
        last = z
        for _ in range(times):
            z, last = last, self(last, x)
        return z, last

    def linearize(self, z: Tensor, value: Tensor, x: Tensor) -> _ReducedJacobian:
        """The Jacobian at z."""
        return _ReducedJacobian(1.0 - value * value, self)


class TanhCell(nn.Module):
    """`tanh(W z + x)`, and its Jacobian.

    Args:
        features: n, the size of z and x.
        device: of W.
        dtype: of W.
    """

    samplewise = True
    """x is indexed by sample as z is: converged samples may leave the batch."""

    def __init__(
        self, features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False, device=device, dtype=dtype)

    @property
    def pure(self) -> bool:
        """Nothing is drawn at random, and nothing changed: no evaluation need be watched, but for a parametrization."""
        return type(self.linear) is nn.Linear

    @property
    def closed_form(self) -> bool:
        """Whether the linear layer is a product with its weight and nothing else.

        Another module may have been put in its place (a quantised one, an adapter), or pruning hang on it as a hook.
        """
        return _is_product(self.linear)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """`(..., n)`, `(..., n)` to `(..., n)`."""
        linear = self.linear
        if not _is_product(linear):
            return torch.tanh(linear(z) + x)
        weight = linear.weight
        # One operation in the place of two, where the shapes allow it, and in place where no graph needs it.
        fused = z.ndim == 2 and z.shape == x.shape and not z.is_meta
        fused = fused and not torch.is_autocast_enabled(z.device.type)
        preactivation = torch.addmm(x, z, weight.t()) if fused else functional.linear(z, weight) + x
        return torch.tanh(preactivation) if torch.is_grad_enabled() else preactivation.tanh_()

    def repeat(self, z: Tensor, times: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cell applied `times` in succession, without a graph: the last two values, z itself the first of all."""
        weight, last = self.linear.weight.t(), z
        for _ in range(times):
            z = last
            last = torch.addmm(x, z, weight) if z.ndim == 2 else torch.matmul(z, weight).add_(x)
            last.tanh_()
        return z, last

    def preconditioned(self) -> ShiftedTanh | None:
        """The form in which steps contract faster; None where it cannot be had."""
        return shifted_tanh(self.linear.weight)

    def reduced(self, dtype: torch.dtype) -> _ReducedCell:
        """The cell with its products in another dtype."""
        return _ReducedCell(self.linear.weight, dtype)

    def linearize(self, z: Tensor, value: Tensor, x: Tensor) -> TanhJacobian:
        """The Jacobian at z, where `value = tanh(W z + x)`: `1 − value²` is the slope."""
        return TanhJacobian(1.0 - value * value, self.linear.weight.detach(), z)


def _is_product(linear: nn.Module) -> bool:
    own = vars(linear)
    # A parametrized layer is of a class of its own, which inherits `forward`.
    if "forward" in own or (type(linear) is not nn.Linear and type(linear).forward is not nn.Linear.forward):
        return False
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    return (own["_parameters"].get("bias") if type(linear) is nn.Linear else linear.bias) is None


class TanhEquilibrium(FixedPoint):
    """The layer `z = tanh(W z + x)` of the Deep Implicit Layers tutorial (Kolter, Duvenaud & Johnson 2020, chapter 1).

    `W` is `layer.linear.weight`, initialised as `nn.Linear(features, features, bias=False)`; the start is z = 0, unless
    `init` says otherwise. Input and output have shape `(..., features)`; every row is a problem of its own.

    Args:
        features: n.
        solver: None is `Auto()`, which begins with `PreconditionedPicard` where n is at most 256.
        adjoint: None is `Implicit()`.
        max_steps: None is the solver's default.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: as in `FixedPoint`; None starts from zero.
        depth: as in `FixedPoint`.
        compiled: the forward and the backward pass are one call of a C++ loop each, quicker where a step is cheap
            (CPU, float32 and float64). The first call on a machine compiles them, which takes a C++ compiler and some
            ten seconds. `solver` may be None, which is the steps of `PreconditionedPicard` up to 256 unknowns, and
            extrapolated ones of `Picard` above, looked at after every eighth; `PreconditionedPicard`; `Picard` without
            damping, also with `mixed_precision`, looked at as its `extrapolate_every`, or `check_every`, says; or a
            Newton method with a `warmup`, which is plain steps, and GMRES for the few samples that these leave. The
            adjoint solver is `Neumann`, alone or in its `Cascade`. Samples that the loop does not solve, and all else,
            are solved as without: there is nothing that it changes but the time, and values within the tolerance.
        device: of W.
        dtype: of W.
    """

    cell: TanhCell

    def __init__(
        self,
        features: int,
        *,
        solver: Method | None = None,
        adjoint: Adjoint | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "warn",
        init: Callable[..., PyTree] | Memory | None = None,
        depth: int | None = None,
        compiled: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, _OPTIONS)
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"features={features!r} is not valid; give an integer >= 1.")
        if not isinstance(compiled, bool):
            raise TypeError(f"compiled={compiled!r} is not valid; give True or False.")
        super().__init__(
            TanhCell(features, device, dtype),
            solver=solver,
            adjoint=adjoint,
            max_steps=max_steps,
            on_failure=on_failure,
            init=init,
            depth=depth,
        )
        self.compiled = compiled

    def _run(
        self,
        cell: Callable[..., PyTree],
        z0: PyTree,
        given: tuple[PyTree, ...],
        solver: Method | None,
        batch_dims: int,
        trace: bool,
        label: str,
    ) -> Solution:
        if self.compiled and not trace and self.cell.closed_form and self.process_group is None:
            from ._compiled import at_once

            found = at_once(
                self.linear.weight,
                given[0],
                z0,
                cell,
                solver=solver,
                adjoint=self.adjoint,
                max_steps=self.max_steps,
                on_failure=self.on_failure,
                label=label,
            )
            if found is not None:
                return found
        return super()._run(cell, z0, given, solver, batch_dims, trace, label)

    def _batch_dims(self, *inputs: Tensor) -> int:
        (x,) = inputs
        if x.ndim < 1 or x.shape[-1] != self.linear.in_features:
            raise ValueError(
                f"TanhEquilibrium: the input must be (..., {self.linear.in_features}), but it is {tuple(x.shape)}; "
                "give features= the size of its last dim."
            )
        return x.ndim - 1

    @property
    def linear(self) -> nn.Linear:
        """`W`, as a linear layer."""
        return self.cell.linear
