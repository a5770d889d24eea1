"""The equation to solve, in residual form, on matrices `(B, n)`; counts the calls of the user's function."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ._layout import Layout
from .linear import AutogradJacobian, JacobianOperator, ResidualJacobian, SuppliedJacobian

Kind = Literal["fixed_point", "root"]


class Evaluation:
    """One evaluation at a state: fn's `value` and the `residual`, both `(B, n)`.

    The residual is computed when it is first looked at: a plain Picard step between two checks never does.
    """

    __slots__ = ("_residual", "_start", "value")

    def __init__(self, value: Tensor, start: Tensor | None = None, residual: Tensor | None = None) -> None:
        self.value = value
        self._start = start
        self._residual = residual

    @property
    def residual(self) -> Tensor:
        """`fn(z) − z` for a fixed point, `−fn(z)` for a root."""
        if self._residual is None:
            self._residual = -self.value if self._start is None else self.value - self._start
        return self._residual

    def select(self, samples: Tensor) -> "Evaluation":
        """The evaluation of some samples, by their indices."""
        if self._residual is not None:
            return Evaluation(self.value.index_select(0, samples), residual=self._residual.index_select(0, samples))
        start = None if self._start is None else self._start.index_select(0, samples)
        return Evaluation(self.value.index_select(0, samples), start)


class Problem:
    """`z = fn(z, *args)` or `fn(z, *args) = 0` as one residual `r(z)` whose zero is wanted.

    `r = fn(z) − z` for a fixed point and `r = −fn(z)` for a root, so that `z + r` is the plain (Picard or Richardson)
    step in both cases, and with `A = −∂r/∂z` Newton's step is `A⁻¹ r` in both cases.

    Attributes:
        epsilon: rounding unit of fn's values; larger than the state's own under autocast.
    """

    def __init__(self, kind: Kind, fn: Any, args: tuple[Any, ...], layout: Layout) -> None:
        self.kind: Kind = kind
        self.fn = fn
        self.args = args
        self.layout = layout
        self._counted = [0]
        self.epsilon = torch.finfo(layout.dtype).eps

    @property
    def evaluations(self) -> int:
        """Calls of fn so far, Jacobian products included."""
        return self._counted[0]

    def output(self, z: Tensor) -> Tensor:
        """fn's value `(B, n)` at a state `(B, n)`; differentiable where grad mode is on."""
        self._counted[0] += 1
        leaves = self.layout.check_output(self.fn(self.layout.unpack(z), *self.args), self.kind)
        if not self.layout.simple:
            self.epsilon = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
        return self.layout.pack(leaves)

    def evaluate(self, z: Tensor) -> Evaluation:
        """Value and residual at a state `(B, n)`."""
        value = self.output(z)
        return Evaluation(value, z if self.kind == "fixed_point" else None)

    def scale(self, evaluation: Evaluation, norm: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The scale of the relative tolerance at a state, `(B,)`: `‖fn(z)‖` for a fixed point; None for a root.

        The units of a root's fn are not those of z; its scale is the initial residual's norm.
        """
        return norm(evaluation.value) if self.kind == "fixed_point" else None

    @property
    def has_closed_form(self) -> bool:
        """Whether fn supplies its Jacobian itself (see `JacobianOperator`); one tensor as state only."""
        return self.layout.simple and hasattr(self.fn, "linearize")

    def select(self, samples: Tensor) -> "Problem | None":
        """The problem of some samples alone, by their indices, or None if fn does not say that it can be split.

        A function or cell says so by an attribute `samplewise = True`: every tensor among its inputs is indexed by
        sample in its first dim, and no row depends on another. Calls of the part count as calls of the whole.
        """
        if not getattr(self.fn, "samplewise", False) or len(self.layout.batch_shape) != 1:
            return None
        args = tuple(a.index_select(0, samples) if isinstance(a, Tensor) else a for a in self.args)
        part = Problem(self.kind, self.fn, args, self.layout.select(samples.numel()))
        part.epsilon = self.epsilon
        part._counted = self._counted
        return part

    def linearize(self, z: Tensor, value: Tensor) -> ResidualJacobian:
        """`A = −∂r/∂z` at a state, from the closed form where fn supplies one, else by automatic differentiation."""
        jacobian: JacobianOperator
        if self.has_closed_form:
            shape = self.layout.shapes[0]
            self._counted[0] += 1
            operator = self.fn.linearize(z.reshape(shape), value.reshape(shape), *self.args)
            jacobian = SuppliedJacobian(operator, shape, self.layout.matrix_shape, self.count)
        else:
            jacobian = AutogradJacobian.at(self.output, z, self.count)
        return ResidualJacobian(jacobian, shifted=self.kind == "fixed_point")

    def count(self, products: int) -> None:
        """Add Jacobian products to the evaluations."""
        self._counted[0] += products
