"""Jacobians as operators: by automatic differentiation, in closed form, shifted to `I − J`, transposed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ._solver import LinearOperator


class JacobianOperator(LinearOperator, Protocol):
    """The Jacobian `J = ∂fn/∂z` of each sample at one state.

    A function or cell may supply its own in closed form: give it a method `linearize(z, value, *args)` that returns
    an object with `mv(p)` and `rmv(u)` on tensors shaped like z, and `dense()` of shape `(B, n, n)`. `value` is
    `fn(z, *args)`, already known. `torchimplicit.nn.TanhEquilibrium` does so.
    """


Count = Callable[[int], None]


@dataclass(frozen=True)
class AutogradJacobian:
    """`J` of a function `(B, n) -> (B, n)` by automatic differentiation of one recorded evaluation.

    `rmv` is reverse mode. `mv` is the reverse of the (linear) map `u ↦ Jᵀu`, which needs no forward-mode formulas.
    `dense` takes the `n` rows by `vmap` over reverse mode (as `torch.func.jacrev`); because samples are independent,
    row `i` of every sample comes from one product.

    Attributes:
        output: fn's value `(B, n)`, with its graph.
        state: the `(B, n)` leaf that graph starts from.
        count: told the number of products taken.
    """

    output: Tensor
    state: Tensor
    count: Count

    @classmethod
    def at(cls, fn: Callable[[Tensor], Tensor], z: Tensor, count: Count) -> Self:
        """Record `fn` at `z`."""
        with torch.inference_mode(False), torch.enable_grad():
            state = z.clone().requires_grad_() if z.is_inference() else z.detach().requires_grad_()
            return cls(fn(state), state, count)

    def mv(self, p: Tensor) -> Tensor:
        """`J p`."""
        self.count(1)
        if not self.output.requires_grad:
            return torch.zeros_like(p)
        with torch.inference_mode(False), torch.enable_grad():
            u = torch.zeros_like(self.output, requires_grad=True)
            (transposed,) = torch.autograd.grad(
                self.output, self.state, u, create_graph=True, materialize_grads=True
            )
            if not transposed.requires_grad:
                return torch.zeros_like(p)
            (product,) = torch.autograd.grad(transposed, u, p, materialize_grads=True)
        return product.detach()

    def rmv(self, u: Tensor) -> Tensor:
        """`Jᵀ u`."""
        self.count(1)
        if not self.output.requires_grad:
            return torch.zeros_like(u)
        (product,) = torch.autograd.grad(
            self.output, self.state, u, retain_graph=True, materialize_grads=True
        )
        return product

    def dense(self) -> Tensor:
        """`J`, `(B, n, n)`."""
        batch, n = self.state.shape
        self.count(n)
        if not self.output.requires_grad:
            return self.state.new_zeros(batch, n, n)
        basis = torch.eye(n, dtype=self.state.dtype, device=self.state.device)
        rows = basis[:, None, :].expand(n, batch, n)
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
            jacobian = torch.stack(products) if products else self.state.new_zeros(0, batch, n)
        return jacobian.transpose(0, 1)


@dataclass(frozen=True)
class SuppliedJacobian:
    """`J` in the closed form that fn supplied, reshaped to matrices `(B, n)`."""

    operator: Any
    shape: torch.Size
    matrix_shape: tuple[int, int]
    count: Count

    def mv(self, p: Tensor) -> Tensor:
        """`J p`."""
        self.count(1)
        return self.operator.mv(p.reshape(self.shape)).reshape(self.matrix_shape)

    def rmv(self, u: Tensor) -> Tensor:
        """`Jᵀ u`."""
        self.count(1)
        return self.operator.rmv(u.reshape(self.shape)).reshape(self.matrix_shape)

    def dense(self) -> Tensor:
        """`J`, `(B, n, n)`."""
        self.count(1)
        batch, n = self.matrix_shape
        return self.operator.dense().reshape(batch, n, n)


@dataclass(frozen=True)
class ResidualJacobian:
    """`A = −∂r/∂z`: `I − J` for a fixed point (`shifted`), `J` for a root."""

    jacobian: JacobianOperator
    shifted: bool

    def mv(self, p: Tensor) -> Tensor:
        """`A p`."""
        product = self.jacobian.mv(p)
        return p - product if self.shifted else product

    def rmv(self, u: Tensor) -> Tensor:
        """`Aᵀ u`."""
        product = self.jacobian.rmv(u)
        return u - product if self.shifted else product

    def dense(self) -> Tensor:
        """`A`, `(B, n, n)`."""
        matrix = self.jacobian.dense()
        if not self.shifted:
            return matrix
        return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device) - matrix


@dataclass(frozen=True)
class Transposed:
    """`Aᵀ` of an operator."""

    operator: LinearOperator

    def mv(self, p: Tensor) -> Tensor:
        """`Aᵀ p`."""
        return self.operator.rmv(p)

    def rmv(self, u: Tensor) -> Tensor:
        """`A u`."""
        return self.operator.mv(u)

    def dense(self) -> Tensor:
        """`Aᵀ`, `(B, n, n)`."""
        return self.operator.dense().mT
