"""The equation as a graph sees it: fn on matrices `(B, n)`, its residual, and when that counts as zero."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._layout import Layout
from .._norms import norm_function, two
from .._problem import Kind
from .._solution import PyTree
from .._tolerance import _FURTHER, _REACH, default_rtol, least_rtol
from ..solvers import Method

Evaluated = tuple[Tensor, Tensor]
"""A state and fn's value there, `(B, n)` both."""


class TracedEquation:
    """`Problem` and `Tolerance` (which see) without anything that depends on values, or that Python would remember.

    Attributes:
        kind: of the call.
        layout: of the state.
        epsilon: rounding unit of fn's values.
        start: z0 and fn's value there.
        first: the initial residual's norm, `(B,)`.
        unit: of the norms, as in `Tolerance`.
        asks_more: whether a residual within the limit must be `confirmed` too.
    """

    def __init__(self, kind: Kind, fn: Callable[..., Any], args: tuple[Any, ...], layout: Layout, method: Method):
        self.kind: Kind = kind
        self.layout = layout
        self.epsilon = torch.finfo(layout.dtype).eps
        self._fn = fn
        self._args = args
        self._rounds = any(torch.finfo(dtype).eps > torch.finfo(layout.dtype).eps for dtype in layout.dtypes)
        self._method = method
        self._euclidean = method.norm in ("rms", "two")
        self._norm = two if self._euclidean else norm_function(method.norm)
        self.asks_more = kind != "fixed_point" and method.rtol is None

    def begin(self, z: Tensor) -> None:
        """Evaluate fn at z0, `(B, n)`, and measure there."""
        # Inside a loop the shapes are read off tensors: symbolic ones must not come from elsewhere.
        self._leaves = pytree.tree_leaves(self.layout.unpack(z))
        self.unit = max(z.shape[1], 1) ** -0.5 if self._method.norm == "rms" else 1.0
        leaves = self.layout.check_output(self._fn(self._unpacked(z), *self._args), self.kind)
        self.epsilon = max(torch.finfo(leaf.dtype).eps for leaf in leaves)
        self.start = z, self._packed(leaves, z)
        rtol = default_rtol(self.kind, self.epsilon) if self._method.rtol is None else self._method.rtol
        first = self.first = self.norm(self.residual(self.start))
        self._noise_floor = _REACH * scalar(self.epsilon, first)
        self._rtol = None if rtol == 0.0 else scalar(rtol, first).maximum(scalar(least_rtol(self.epsilon), first))
        self._further = scalar(_FURTHER, first)
        self._above, least = 1 + 4 * torch.finfo(first.dtype).eps, torch.finfo(first.dtype).tiny
        self._least = (scalar(self._method.atol or 0.0, first) / self.unit * self._above).clamp_min(least)
        if self._method.atol is None:
            self._atol = (self.epsilon * self._above * _finite(first)).clamp_min(least)
        else:
            self._atol = self._least.expand_as(first).clone()

    def value(self, z: Tensor) -> Tensor:
        """fn at a state, `(B, n)` both."""
        return self._packed(pytree.tree_leaves(self._fn(self._unpacked(z), *self._args)), z)

    def residual(self, at: Evaluated) -> Tensor:
        """`fn(z) − z` for a fixed point, `−fn(z)` for a root."""
        z, value = at
        if self.kind != "fixed_point":
            return -value
        return value - (self._packed(pytree.tree_leaves(self._unpacked(z)), z) if self._rounds else z)

    def norm(self, residual: Tensor) -> Tensor:
        """`(B, n)` to `(B,)`, in the unit of the tolerance."""
        return self._norm(residual)

    def limit(self, value: Tensor, fallen: Tensor | None) -> Tensor:
        """What the residual's norm must be below, `(B,)`; `fallen` as in `Tolerance.limit`."""
        if self._rtol is None:
            return self._atol
        if self.kind != "fixed_point":
            return self._atol + self._rtol * _finite(self.first)
        limit = self._atol + self._rtol * self._norm(value)
        return limit if fallen is None else torch.minimum(limit, fallen)

    def fallen(self, peak: Tensor) -> Tensor:
        """What a residual must have fallen below from its peak, `(B,)`."""
        return (0.5 * self._above * peak).maximum(self._least)

    def confirmed(self, at: Evaluated, norm: Tensor) -> Tensor:
        """Whether a root is as near as its residual is small, `(B,)`."""
        z = at[0]
        size = torch.maximum(z.abs(), (z - self.start[0]).square().mean(dim=1, keepdim=True).sqrt())
        change = self._noise(at, self.epsilon ** (2 / 3) * size)
        return (norm <= self._norm(change)) | (norm <= self._least)

    def credible(self, z: Tensor, fallen: Tensor) -> Tensor:
        """Whether a fixed point's rounding is small beside the fall of its residual, `(B,)`; all True for a root."""
        if self.kind != "fixed_point":
            return torch.ones_like(fallen, dtype=torch.bool)
        return self.epsilon * self._norm(z) <= fallen

    def reached(self, at: Evaluated, norm: Tensor, peak: Tensor) -> Tensor:
        """Whether a residual is no more than rounding, `(B,)`."""
        z, value = at
        if self.kind == "fixed_point":
            noise = self._noise_floor * self._norm(value)
            return (norm <= noise) & (noise <= self.fallen(peak))
        change = self._noise(at, self._noise_floor * z)
        further = self._noise(at, self._further * self._noise_floor * z)
        within = (value.abs() <= change).all(dim=1)
        small = norm <= self.epsilon**0.5 * torch.maximum(peak, _finite(self.first))
        smooth = self._norm(further) >= 0.5 * self._further * self._norm(change)
        return within & (small | smooth)

    def _unpacked(self, z: Tensor) -> PyTree:
        """`(B, n)` to the state's own structure."""
        leaves = self._leaves
        columns = z.split(self.layout.sizes, dim=1) if len(leaves) > 1 else [z]
        return pytree.tree_unflatten(
            [c.to(leaf.dtype).reshape(leaf.shape) for c, leaf in zip(columns, leaves, strict=True)], self.layout.spec
        )

    def _packed(self, leaves: list[Tensor], z: Tensor) -> Tensor:
        """Back to `(B, n)`, as z."""
        columns = [leaf.to(z.dtype).reshape(z.shape[0], -1) for leaf in leaves]
        return (torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]).contiguous()

    def _noise(self, at: Evaluated, size: Tensor) -> Tensor:
        """How much each component of fn changes, to first order, when z moves by `size`, `(B, n)` both."""
        z, value = at
        signs = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
        changes = [self.value(z + size * s) - value for s in (signs, signs.cumsum(0).remainder(2) * 2 - 1)]
        return torch.maximum(changes[0].abs(), changes[1].abs())


def scalar(number: float, like: Tensor) -> Tensor:
    """A number as a tensor `()`: with `dynamic=True` a float is no constant, and a loop may carry only tensors."""
    return torch.full((), number, dtype=like.dtype, device=like.device)


def _finite(norm: Tensor) -> Tensor:
    return norm.nan_to_num(0.0, 0.0, 0.0)
