"""The equation to solve, in residual form, on matrices `(B, n)`; counts the calls of the user's function."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._layout import Layout
from .linear import AutogradJacobian, ResidualJacobian, SuppliedJacobian

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

    fn runs under the autocast of the call; everything else runs without (see `exact`).

    Attributes:
        epsilon: rounding unit of fn's values; larger than the state's own under autocast.
    """

    def __init__(self, kind: Kind, fn: Any, args: tuple[Any, ...], layout: Layout) -> None:
        self.kind: Kind = kind
        self.fn = fn
        self.args = args
        self.layout = layout
        self._counted = [0]
        self._last: Tensor | None = None
        self._version = 0
        # The state's own shape is (B, n) already: nothing to pack or unpack.
        self._shape = layout.shapes[0]
        self._same = layout.bare and self._shape == layout.matrix_shape
        device = layout.device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self.args = pytree.tree_map(_usable, args)
        self.epsilon = torch.finfo(layout.dtype).eps
        # Whether fn was seen to return the state's own dtype and shape, and may repeat itself unseen.
        self._plain = False
        self._repeats = self._same and self._autocast is None and hasattr(fn, "repeat") and self.has_closed_form

    def exact(self) -> AbstractContextManager[Any]:
        """The context for the solvers' own algebra: no autocast."""
        return nullcontext() if self._autocast is None else torch.autocast(self.layout.device.type, enabled=False)

    @property
    def evaluations(self) -> int:
        """Calls of fn so far, Jacobian products included."""
        return self._counted[0]

    def output(self, z: Tensor) -> Tensor:
        """fn's value `(B, n)` at a state `(B, n)`; differentiable where grad mode is on.

        Raises:
            TypeError: what fn returns has another structure or dtype than z0.
            ValueError: it has another shape, or fn writes into its argument or into what it returned before.
        """
        self._counted[0] += 1
        layout = self.layout
        argument = z if self._same else layout.unpack(z)
        version = None if z.is_inference() else z._version
        if self._autocast is None:
            out = self.fn(argument, *self.args)
        else:
            with torch.autocast(layout.device.type, self._autocast):
                out = self.fn(argument, *self.args)
        if version is not None and z._version != version:
            raise ValueError(f"{self.kind}: fn changes its argument z in place; use out-of-place operations on z.")
        if self._same and type(out) is Tensor and out.shape == self._shape and out.dtype == layout.dtype:
            value = out
            self._plain = True
        else:
            leaves = layout.check_output(out, self.kind)
            self.epsilon = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
            value = layout.pack(leaves)
        if self._last is not None and self._last._version != self._version:
            raise ValueError(f"{self.kind}: fn writes into what it returned before; return a new tensor each time.")
        self._last = None if value.is_inference() else value.detach() if value.requires_grad else value
        self._version = 0 if self._last is None else self._last._version
        return value

    def evaluate(self, z: Tensor) -> Evaluation:
        """Value and residual at a state `(B, n)`."""
        return self.evaluation(z, self.output(z))

    def evaluation(self, z: Tensor, value: Tensor) -> Evaluation:
        """The evaluation at a state where fn's value is known."""
        if self.kind == "root":
            return Evaluation(value)
        return Evaluation(value, z if self._same else self.layout.rounded(z))

    def repeat(self, value: Tensor, times: int) -> tuple[Tensor, Tensor]:
        """fn applied `times` in succession, from a state `(B, n)`: the last state and fn's value there.

        A cell that supplies its Jacobian may also have a method `repeat(z, times, *args)`, which does the same without
        a look at what happens in between; it is used where nothing of that could matter.
        """
        if self._repeats and self._plain:
            self._counted[0] += times
            return self.fn.repeat(value, times, *self.args)
        z = value
        for _ in range(times):
            z, value = value, self.output(value)
        return z, value

    def scale(self, evaluation: Evaluation, norm: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The scale of the relative tolerance at a state, `(B,)`: `‖fn(z)‖` for a fixed point; None for a root.

        The units of a root's fn are not those of z; its scale is the initial residual's norm.
        """
        return norm(evaluation.value) if self.kind == "fixed_point" else None

    @property
    def has_closed_form(self) -> bool:
        """Whether fn supplies its Jacobian itself (see `JacobianOperator`); one tensor as state only.

        Not of a module with forward hooks, nor of one whose `forward` is newer than its `linearize`, overridden in a
        subclass or on the instance: the closed form would know nothing of what they change.
        """
        if not self.layout.simple or not hasattr(self.fn, "linearize"):
            return False
        hooked = getattr(self.fn, "_forward_hooks", None) or getattr(self.fn, "_forward_pre_hooks", None)
        return not hooked and _age(self.fn, "linearize") <= _age(self.fn, "forward")

    def select(self, samples: Tensor) -> "Problem | None":
        """The problem of some samples alone, by their indices, or None if fn does not say that it can be split.

        A function or cell says so by an attribute `samplewise = True`: every tensor among its inputs is indexed by
        sample in its first dim, and no row depends on another. Calls of the part count as calls of the whole.
        """
        if not getattr(self.fn, "samplewise", False) or len(self.layout.batch_shape) != 1:
            return None
        # An input that is broadcast to the samples is not indexed by them.
        shape = self.layout.shapes[0]
        if any(isinstance(a, Tensor) and (a.ndim != len(shape) or a.shape[0] != shape[0]) for a in self.args):
            return None
        args = tuple(a.index_select(0, samples) if isinstance(a, Tensor) else a for a in self.args)
        part = Problem(self.kind, self.fn, args, self.layout.select(samples.numel()))
        part.epsilon, part._plain = self.epsilon, self._plain
        part._counted, part._autocast = self._counted, self._autocast
        return part

    def linearize(self, z: Tensor, value: Tensor) -> ResidualJacobian:
        """`A = −∂r/∂z` at a state, from the closed form where fn supplies one, else by automatic differentiation."""
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


def _age(fn: Any, method: str) -> int:
    """How far up among the classes of fn a method is defined; −1 on the instance itself."""
    if method in getattr(fn, "__dict__", ()):
        return -1
    order = type(fn).__mro__
    return next((i for i, c in enumerate(order) if method in vars(c)), len(order))


def _usable(value: Any) -> Any:
    """An inference tensor as one that autograd can record; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
