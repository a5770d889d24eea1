"""Jacobians as operators: by automatic differentiation, in closed form, and as `A = I − J` or its transpose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward


class JacobianOperator(Protocol):
    """The Jacobian `J = ∂fn/∂z` of each sample at one state.

    A function or cell may supply its own in closed form: give it a method `linearize(z, value, *args)` that returns
    an object with `mv(p)` and `rmv(u)` on tensors shaped like z, and `dense()` of shape `(B, n, n)`. `value` is
    `fn(z, *args)`, already known. Other methods are optional. `select(samples)` gives the operator of some samples
    alone, by their indices, so that an iteration can go on with those that need it. `neumann(p, terms, transposed)`
    gives `Σₖ Jᵏ p` over `k < terms` and `J^terms p`, `Jᵀ` for `J` if transposed, where that is cheaper together than
    product by product; `torchimplicit.nn.TanhEquilibrium` has these two. `diagonal()` gives the diagonal of `J`, shaped
    like z, to the preconditioner `Jacobi`, where that is cheaper than `dense()`. `pullback(u)`, of a module's, gives
    `uᵀ ∂fn/∂t` of all else that fn reads: one gradient or None for each of `args`, which must be tensors, and a dict of
    those of the parameters by name; an attribute `reads` has the names of these. No graph is then recorded for a first
    derivative. It must hold for every u shaped like z. A cell with a method `reduced(dtype)` gives itself with products
    in another dtype, what a solve in mixed precision begins with: an object to call, with `linearize`, and `repeat` if
    the cell has it. A cell with a method `preconditioned()` gives itself in a form whose steps contract faster,
    made of its parameters alone, or None where it cannot; if it is `pure`: an object with
    `repeat(z, times, *args)`, which takes so many steps of that form and returns the last state and fn's value there,
    and with `linearize`, whose operator may have `approach(p, terms, transposed)` beside `neumann`: any
    `u ≈ (I − J)⁻¹ p` by so many products, and `p − (I − J) u`. `PreconditionedPicard` and the adjoint solve use it.
    While an attribute `closed_form` of the cell is False, none of this is used.
    """

    def mv(self, p: Tensor) -> Tensor:
        """`J p`."""
        ...

    def rmv(self, u: Tensor) -> Tensor:
        """`Jᵀ u`."""
        ...

    def dense(self) -> Tensor:
        """`J`, `(B, n, n)`."""
        ...


Count = Callable[[int], None]
Tangent = Callable[[Tensor], Tensor | None]
_FEW_ROWS = 8
"""Rows of a Jacobian up to which one product for each takes less time than `vmap` takes to begin."""


@dataclass(frozen=True, eq=False, repr=False)
class AutogradJacobian:
    """`J` of a function `(B, n) -> (B, m)` by automatic differentiation of one recorded evaluation.

    `rmv` is reverse mode. `mv` is the reverse of the (linear) map `u ↦ Jᵀu`, which needs no forward-mode formulas and
    is recorded once. `dense` takes the `m` rows by `vmap` over reverse mode (as `torch.func.jacrev`); because samples
    are independent, row `i` of every sample comes from one product.

    Attributes:
        output: fn's value `(B, m)`, with its graph.
        state: the `(B, n)` leaf that graph starts from.
        count: told the number of products taken.
        tangents: finds a cheaper way to `p ↦ J p` than the reverse of the reverse, which may turn out to be none.
    """

    output: Tensor
    state: Tensor
    count: Count
    tangents: Callable[[], Tangent | None] | None = None

    @classmethod
    def at(
        cls,
        fn: Callable[[Tensor], Tensor],
        z: Tensor,
        count: Count,
        tangents: Callable[[], Tangent | None] | None = None,
    ) -> Self:
        """Record `fn` at `z`."""
        with torch.inference_mode(False), torch.enable_grad():
            state = z.clone().requires_grad_() if z.is_inference() else z.detach().requires_grad_()
            return cls(fn(state), state, count, tangents)

    def mv(self, p: Tensor) -> Tensor:
        """`J p`."""
        self.count(1)
        if not self.output.requires_grad:
            return torch.zeros_like(self.output)
        product = None if self._tangent is None else self._tangent(p)
        if product is not None:
            return product
        u, transposed = self._transposed
        if not transposed.requires_grad:
            return torch.zeros_like(self.output)
        with torch.inference_mode(False):
            (product,) = torch.autograd.grad(transposed, u, p, retain_graph=True, materialize_grads=True)
        return product

    @cached_property
    def _tangent(self) -> Tangent | None:
        return None if self.tangents is None else self.tangents()

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        """`u` and `Jᵀ u`, with the graph between them."""
        with torch.inference_mode(False), torch.enable_grad():
            u = torch.zeros_like(self.output, requires_grad=True)
            (transposed,) = torch.autograd.grad(self.output, self.state, u, create_graph=True, materialize_grads=True)
        return u, transposed

    def rmv(self, u: Tensor) -> Tensor:
        """`Jᵀ u`."""
        self.count(1)
        return self._product(u) if self.output.requires_grad else torch.zeros_like(self.state)

    def _product(self, u: Tensor) -> Tensor:
        """`Jᵀ u`, uncounted."""
        # What `torch.autograd.grad` calls once it has looked at its arguments, which takes a third of its time here.
        (product,) = _engine_run_backward(
            (self.output,), (u,), True, False, (self.state,), allow_unreachable=True, accumulate_grad=False
        )
        return torch.zeros_like(self.state) if product is None else product

    def select(self, samples: Tensor) -> "PartialJacobian":
        """`J` of some samples alone, by their indices."""
        return PartialJacobian(self, self.state.shape[0], samples)

    def dense(self) -> Tensor:
        """`J`, `(B, m, n)`."""
        batch, n = self.state.shape
        m = self.output.shape[1]
        self.count(m)
        if not self.output.requires_grad or m * n == 0:
            return self.state.new_zeros(batch, m, n)
        basis = torch.eye(m, dtype=self.state.dtype, device=self.state.device)
        rows = basis[:, None, :].expand(m, batch, m)
        if m <= _FEW_ROWS:
            return torch.stack([self._product(row) for row in rows], dim=1)
        try:
            (jacobian,) = torch.autograd.grad(
                self.output, self.state, rows, retain_graph=True, is_grads_batched=True, materialize_grads=True
            )
        except RuntimeError:
            # An operation in fn has no batching rule: one row at a time gives the same matrix.
            products = [
                torch.autograd.grad(self.output, self.state, row, retain_graph=True, materialize_grads=True)[0]
                for row in rows
            ]
            jacobian = torch.stack(products)
        if jacobian.shape != (m, batch, n):  # what torch materialises where the output does not depend on the state
            jacobian = self.state.new_zeros(m, batch, n)
        return jacobian.transpose(0, 1)

    def diagonal(self) -> Tensor:
        """Of `J`, `(B, n)`; costs as much as `dense`."""
        return self.dense().diagonal(dim1=1, dim2=2)


@dataclass(frozen=True, eq=False, repr=False)
class SuppliedJacobian:
    """`J` in the closed form that fn supplied, reshaped to matrices `(B, n)`."""

    operator: Any
    shape: torch.Size
    matrix_shape: tuple[int, int]
    count: Count

    def mv(self, p: Tensor) -> Tensor:
        """`J p`."""
        self.count(1)
        if self.shape == self.matrix_shape:
            return self.operator.mv(p)
        return self.operator.mv(p.reshape(self.shape)).reshape(self.matrix_shape)

    def rmv(self, u: Tensor) -> Tensor:
        """`Jᵀ u`."""
        self.count(1)
        if self.shape == self.matrix_shape:
            return self.operator.rmv(u)
        return self.operator.rmv(u.reshape(self.shape)).reshape(self.matrix_shape)

    def neumann(self, p: Tensor, terms: int, transposed: bool) -> tuple[Tensor, Tensor] | None:
        """`Σₖ Jᵏ p` over `k < terms` and `J^terms p`, where the supplied operator has a `neumann` too."""
        return self._both("neumann", p, terms, transposed)

    def approach(self, p: Tensor, terms: int, transposed: bool) -> tuple[Tensor, Tensor] | None:
        """`u ≈ (I − J)⁻¹ p` and `p − (I − J) u`, where the supplied operator has a way of its own, or the series."""
        return self._both("approach" if hasattr(self.operator, "approach") else "neumann", p, terms, transposed)

    def _both(self, method: str, p: Tensor, terms: int, transposed: bool) -> tuple[Tensor, Tensor] | None:
        if not hasattr(self.operator, method):
            return None
        self.count(terms)
        if self.shape == self.matrix_shape:
            return getattr(self.operator, method)(p, terms, transposed)
        total, rest = getattr(self.operator, method)(p.reshape(self.shape), terms, transposed)
        return total.reshape(self.matrix_shape), rest.reshape(self.matrix_shape)

    @property
    def reads(self) -> tuple[str, ...] | None:
        """Names of the parameters of which `pullback` gives gradients; None if there is no `pullback`."""
        return getattr(self.operator, "reads", None) if hasattr(self.operator, "pullback") else None

    def pullback(self, u: Tensor) -> tuple[Sequence[Tensor | None], dict[str, Tensor]]:
        """`uᵀ ∂fn/∂t` for the tensors among fn's args, in order, and for its parameters, by name."""
        return self.operator.pullback(u if self.shape == self.matrix_shape else u.reshape(self.shape))

    def select(self, samples: Tensor) -> "SuppliedJacobian | PartialJacobian":
        """`J` of some samples alone, by their indices."""
        if not hasattr(self.operator, "select") or len(self.shape) != 2:
            return PartialJacobian(self, self.matrix_shape[0], samples)
        count, n = samples.numel(), self.shape[1]
        return SuppliedJacobian(self.operator.select(samples), torch.Size((count, n)), (count, n), self.count)

    def dense(self) -> Tensor:
        """`J`, `(B, n, n)`."""
        self.count(1)
        batch, n = self.matrix_shape
        return self.operator.dense().reshape(batch, n, n)

    def diagonal(self) -> Tensor:
        """Of `J`, `(B, n)`."""
        if not hasattr(self.operator, "diagonal"):
            return self.dense().diagonal(dim1=1, dim2=2)
        self.count(1)
        return self.operator.diagonal().reshape(self.matrix_shape)


@dataclass(frozen=True, eq=False, repr=False)
class PartialJacobian:
    """`J` of some samples, by their indices, where only products with the whole batch are to be had."""

    whole: AutogradJacobian | SuppliedJacobian
    batch: int
    samples: Tensor

    def mv(self, p: Tensor) -> Tensor:
        """`J p`."""
        return self.whole.mv(self._spread(p)).index_select(0, self.samples)

    def rmv(self, u: Tensor) -> Tensor:
        """`Jᵀ u`."""
        return self.whole.rmv(self._spread(u)).index_select(0, self.samples)

    def dense(self) -> Tensor:
        """`J`, `(rows, n, n)`."""
        return self.whole.dense().index_select(0, self.samples)

    def diagonal(self) -> Tensor:
        """Of `J`, `(rows, n)`."""
        return self.whole.diagonal().index_select(0, self.samples)

    def select(self, samples: Tensor) -> "PartialJacobian":
        """`J` of some of the rows alone."""
        return replace(self, samples=self.samples.index_select(0, samples))

    def _spread(self, p: Tensor) -> Tensor:
        return p.new_zeros(self.batch, p.shape[1]).index_copy_(0, self.samples, p)


@dataclass(frozen=True, eq=False, repr=False)
class ResidualJacobian:
    """`A = −∂r/∂z`, or its transpose: `I − J` for a fixed point (`shifted`), `J` for a root.

    Attributes:
        jacobian: `J`.
        shifted: whether `A = I − J`.
        transposed: whether it is the transpose that is meant.
        epsilon: rounding unit of the products, where it is larger than that of their dtype.
        record: records `J` in reduced precision, None where that cannot be had; itself None where nobody would.
    """

    jacobian: AutogradJacobian | SuppliedJacobian | PartialJacobian
    shifted: bool
    transposed: bool = False
    epsilon: float = 0.0
    record: Callable[[], AutogradJacobian | SuppliedJacobian | None] | None = None

    @property
    def divisible(self) -> bool:
        """Whether products for some samples cost less than for all."""
        return isinstance(self.jacobian, SuppliedJacobian)

    @property
    def quick(self) -> bool:
        """Whether the Jacobian has a quicker way to approach a solution than the series."""
        return isinstance(self.jacobian, SuppliedJacobian) and hasattr(self.jacobian.operator, "approach")

    @property
    def mT(self) -> "ResidualJacobian":
        """The transpose."""
        return replace(self, transposed=not self.transposed)

    def mv(self, p: Tensor) -> Tensor:
        """`A p`."""
        product = self._product(p)
        return p - product if self.shifted else product

    def neumann(self, p: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """`Σₖ (I − A)ᵏ p` over `k < terms`, and `(I − A)^terms p`."""
        if self.shifted and isinstance(self.jacobian, SuppliedJacobian):
            both = self.jacobian.neumann(p, terms, self.transposed)
            if both is not None:
                return both
        return self._series(p, terms)

    def approach(self, p: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        """`u ≈ A⁻¹ p` by so many products, and `p − A u`: the series, or a quicker way that the Jacobian has."""
        if self.shifted and isinstance(self.jacobian, SuppliedJacobian):
            both = self.jacobian.approach(p, terms, self.transposed)
            if both is not None:
                return both
        return self._series(p, terms)

    def _series(self, p: Tensor, terms: int) -> tuple[Tensor, Tensor]:
        total, rest = p, self._richardson(p)
        for i in range(terms - 1):
            total = total.add_(rest) if i else total + rest
            rest = self._richardson(rest)
        return total, rest

    def dense(self) -> Tensor:
        """`A`, `(B, n, n)`."""
        matrix = self.jacobian.dense()
        if self.transposed:
            matrix = matrix.mT
        if not self.shifted:
            return matrix
        return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device) - matrix

    def diagonal(self) -> Tensor:
        """Of `A`, `(B, n)`."""
        diagonal = self.jacobian.diagonal()
        return 1.0 - diagonal if self.shifted else diagonal

    def select(self, samples: Tensor) -> "ResidualJacobian":
        """`A` of some samples alone, by their indices."""
        return replace(self, jacobian=self.jacobian.select(samples), record=None)

    def coarse(self) -> "ResidualJacobian | None":
        """The same with products in reduced precision, to begin a refinement with; None where there is none."""
        jacobian = None if self.record is None else self.record()
        return None if jacobian is None else replace(self, jacobian=jacobian, record=None)

    def _richardson(self, p: Tensor) -> Tensor:
        product = self._product(p)
        return product if self.shifted else p - product

    def _product(self, p: Tensor) -> Tensor:
        return self.jacobian.rmv(p) if self.transposed else self.jacobian.mv(p)
