"""Blocks of steps of a compiled loop: plain ones, extrapolated, or those of `ShiftedTanh` and of its adjoint."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..solvers._picard import _LONGEST, _SHORTEST
from ._rational_tanh import tanh

State = tuple[Tensor, ...]
"""What one block hands to the next; no tensor may be one that was handed in."""


class Arrived(NamedTuple):
    """Where a block ends.

    Attributes:
        z: the state of each sample, `(B, n)`.
        value: the map's value there.
        known: what `go_on` needs beside it.
    """

    z: Tensor
    value: Tensor
    known: State


class Judged(NamedTuple):
    """What is known of the samples at a look, `(B,)` each, but `()` for `taken`.

    Attributes:
        norm: of the residual.
        before: that of the last look.
        taken: steps before the block.
    """

    norm: Tensor
    before: Tensor
    taken: Tensor


class Steps(ABC):
    """How a loop steps."""

    @abstractmethod
    def begin(self, start: Tensor, value: Tensor) -> State:
        """The state at a start where the map's value is known."""

    @abstractmethod
    def walk(self, state: State, block: int) -> Arrived:
        """A block of steps."""

    @abstractmethod
    def go_on(self, state: State, arrived: Arrived, judged: Judged) -> State:
        """What the next block begins with."""


class PlainSteps(Steps):
    """`z ← function(z)`, and after each block, if wanted, one along the last step (see `Picard(extrapolate_every=…)`).

    The state: where the next block begins; where it would begin without the extrapolation; and the samples that are
    extrapolated no more, since their residual has grown after it.

    Args:
        function: of the state.
        extrapolate: whether it is wanted.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], extrapolate: bool) -> None:
        self._function = function
        self._extrapolate = extrapolate

    def begin(self, start: Tensor, value: Tensor) -> State:
        """At the map's value."""
        if not self._extrapolate:
            return (value.clone(),)
        return value.clone(), value.clone(), torch.zeros_like(value[:, 0], dtype=torch.bool)

    def walk(self, state: State, block: int) -> Arrived:
        """So many applications."""
        before = z = state[0]
        value = self._function(z)
        for _ in range(block - 1):
            before, z, value = z, value, self._function(value)
        return Arrived(z, value, (before,))

    def go_on(self, state: State, arrived: Arrived, judged: Judged) -> State:
        """At the value, or further along, or back where that was of no use."""
        z, value, (before,) = arrived
        if not self._extrapolate:
            return (value.clone(),)
        _, plain, off = state
        worse = (judged.taken > 0) & ~off & ~(judged.norm <= judged.before)
        off = off | worse
        residual = value - z
        change = residual - (z - before)
        square = (change * change).sum(dim=1).clamp_min(torch.finfo(change.dtype).tiny)
        length = ((change * residual).sum(dim=1) / square).clamp(_LONGEST, _SHORTEST)
        further = value - torch.where(off, 0.0, length)[:, None] * residual
        return torch.where(worse[:, None], plain, further), value.clone(), off


class ShiftedSteps(Steps):
    """Those of `ShiftedTanh` (which see). The state: `b = W z`.

    Args:
        weight: W.
        product: `Pᵀ`.
        shift: c, `()`.
        x: `(B, n)`.
        image: `W z` at the start.
    """

    def __init__(self, weight: Tensor, product: Tensor, shift: Tensor, x: Tensor, image: Tensor) -> None:
        self._transposed = weight.t()
        self._product, self._shift, self._x, self._image = product, shift, x, image

    def begin(self, start: Tensor, value: Tensor) -> State:
        """`W z`."""
        return (self._image.clone(),)

    def walk(self, state: State, block: int) -> Arrived:
        """So many products with P, and one with W, which says whether the equation holds."""
        (b,) = state
        z = b
        for _ in range(block):
            z = tanh(b + self._x) - self._shift * b
            b = torch.mm(z, self._product)
        z = z + self._shift * b
        b = torch.mm(z, self._transposed)
        return Arrived(z, tanh(b + self._x), (b,))

    def go_on(self, state: State, arrived: Arrived, judged: Judged) -> State:
        """At `W z`."""
        return (arrived.known[0].clone(),)


class ShiftedAdjointSteps(Steps):
    """`u = v + Wᵀ D u` by corrections from the residual: those of `ShiftedTanhJacobian.approach`.

    The state: u and its residual.

    Args:
        weight: W.
        product: `Pᵀ`.
        shift: c, `()`.
        slope: D, `(B, n)`.
        v: `(B, n)`.
    """

    def __init__(self, weight: Tensor, product: Tensor, shift: Tensor, slope: Tensor, v: Tensor) -> None:
        self._weight, self._slope, self._v = weight, slope, v
        self._product, self._shift = product.t(), shift

    def begin(self, start: Tensor, value: Tensor) -> State:
        """The start, and what is left there."""
        return start.clone(), value - start

    def walk(self, state: State, block: int) -> Arrived:
        """So many products with P, and one with W."""
        u, residual = state
        rest = self._slope - self._shift
        q = residual + self._shift * torch.mm(residual, self._product)
        first = y = rest * q
        for _ in range(block - 2):
            y = first + rest * torch.mm(y, self._product)
        u = u + torch.addmm(q, y, self._product)
        return Arrived(u, torch.addmm(self._v, self._slope * u, self._weight), ())

    def go_on(self, state: State, arrived: Arrived, judged: Judged) -> State:
        """At u."""
        return arrived.z.clone(), arrived.value - arrived.z
