"""The map `(z, c) ↦ σ(W z + c)` of one solve: its value, its Jacobian, and the parts that splitting methods need."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from ..linear import MonotoneOperator
from ._activations import Activation


@dataclass(frozen=True, eq=False, repr=False)
class SlopedJacobian:
    """`J = D W`, D the slopes of each sample."""

    slope: Tensor
    operator: Any
    monotone: MonotoneOperator | None = None
    """W again, where splitting may be used: the linear solver `Splitting` asks for it."""

    def mv(self, p: Tensor) -> Tensor:
        """`D W p`."""
        return self.slope * self.operator.mv(p)

    def rmv(self, u: Tensor) -> Tensor:
        """`Wᵀ D u`."""
        return self.operator.rmv(self.slope * u)

    def dense(self) -> Tensor:
        """`(B, n, n)`."""
        matrix = self.operator.dense()
        return self.slope.reshape(-1, len(matrix), 1) * matrix


@dataclass(frozen=True, eq=False, repr=False)
class SplitBatch:
    """The split form of a batch (see `solvers.SplitForm`)."""

    operator: MonotoneOperator
    offset: Tensor
    activation: Activation

    def prox(self, p: Tensor, step_size: Tensor | float) -> Tensor:
        """`prox_{αf}(p)`."""
        return self.activation.prox(p, step_size)

    def select(self, samples: Tensor) -> Self:
        """The form of some samples, by their indices."""
        return replace(self, offset=self.offset.index_select(0, samples))


class AffineMap:
    """`(z, c) ↦ σ(W z + c)`, with W computed once, for the length of a solve.

    Args:
        operator: W, with its graph.
        activation: σ.
    """

    samplewise: ClassVar[bool] = True
    pure: ClassVar[bool] = True

    def __init__(self, operator: Any, activation: Activation) -> None:
        self.operator = operator
        self.activation = activation

    def __call__(self, z: Tensor, c: Tensor) -> Tensor:
        """Shaped like z."""
        return self.activation(self.operator.mv(z) + c)

    def linearize(self, z: Tensor, value: Tensor, c: Tensor) -> SlopedJacobian:
        """The Jacobian, of which all that depends on z is known from the value."""
        return SlopedJacobian(self.activation.slope(value), self.operator)


class SplitMap(AffineMap):
    """The same with a monotone W."""

    def linearize(self, z: Tensor, value: Tensor, c: Tensor) -> SlopedJacobian:
        """The Jacobian, and that it can be split."""
        return SlopedJacobian(self.activation.slope(value), self.operator, self.operator)

    def splitting(self, c: Tensor) -> SplitBatch:
        """For the splitting methods."""
        return SplitBatch(self.operator, c.reshape(-1, self.operator.unknowns), self.activation)
