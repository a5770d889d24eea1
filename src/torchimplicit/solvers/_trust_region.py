"""What trust-region methods share: a linear model of the residual, and whether it keeps its promise."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from ._base import hold

_ACCEPT = 1e-4
"""Fraction of the promised fall of `‖t‖²` that a step must keep to be taken."""

_FLAT = 64.0


class Model(ABC):
    """`t(z + D⁻¹ y) ≈ t − A y`, `A = −∂t/∂z D⁻¹`, of each sample; `t` is the residual or, of least squares, theirs.

    Attributes:
        scale: the diagonal of `D`, `(B, n)`.
        usable: whether the Jacobian is finite, `(B,)`.
    """

    scale: Tensor
    usable: Tensor

    @abstractmethod
    def product(self, y: Tensor) -> Tensor:
        """`A y`, `(B, m)`."""

    @abstractmethod
    def gradient(self, target: Tensor) -> Tensor:
        """`Aᵀ t`, `(B, n)`: steepest descent of `½‖t − A y‖²` at y = 0."""

    @abstractmethod
    def size(self) -> Tensor:
        """A norm of A, `(B,)`."""

    @abstractmethod
    def select(self, samples: Tensor) -> Self:
        """The model of some samples alone, by their indices."""

    def stationary(self, target: Tensor, gradient: Tensor) -> Tensor:
        """Whether `‖t‖` has a stationary point here, `(B,)`: the gradient is no more than rounding."""
        return two(gradient) <= 16 * torch.finfo(target.dtype).eps * self.size() * two(target)


@dataclass(eq=False, repr=False)
class DenseModel(Model):
    """The model with A as a matrix, `(B, m, n)`.

    `D` holds the largest norm that each column of the Jacobian has had (Moré 1978): the steps do not depend on the
    units of z.
    """

    matrix: Tensor
    scale: Tensor
    usable: Tensor

    @classmethod
    def at(cls, problem: Problem, z: Tensor, evaluation: Evaluation, before: "DenseModel | None") -> "DenseModel":
        """The model at an iterate; `before` is that of an earlier one."""
        matrix = problem.linearize_target(z, evaluation).dense()
        usable = matrix.isfinite().all(dim=2).all(dim=1)
        matrix = torch.where(usable[:, None, None], matrix, 0.0)
        columns = torch.linalg.vector_norm(matrix, dim=1)
        known = before is not None
        columns = torch.maximum(columns, before.scale) if known else torch.where(columns > 0, columns, 1.0)
        return cls(matrix / columns[:, None, :], columns, usable)

    def product(self, y: Tensor) -> Tensor:
        """`A y`."""
        return torch.bmm(self.matrix, y[:, :, None])[:, :, 0]

    def gradient(self, target: Tensor) -> Tensor:
        """`Aᵀ t`."""
        return torch.bmm(target[:, None], self.matrix)[:, 0]

    def size(self) -> Tensor:
        """Frobenius norm."""
        return torch.linalg.matrix_norm(self.matrix)

    def select(self, samples: Tensor) -> "DenseModel":
        """The model of some samples alone."""
        return DenseModel(*(t.index_select(0, samples) for t in (self.matrix, self.scale, self.usable)))


@dataclass(eq=False, repr=False)
class Trial:
    """A step tried: where it leads, and how much of the promised fall of `‖t‖²` it kept.

    Attributes:
        z: the new point where the step is accepted, else the old one.
        found: fn there.
        norm: of the target there, `(B,)`.
        ratio: kept over promised, `(B,)`; negative infinity where fn is not finite.
        accepted: `(B,)`.
    """

    z: Tensor
    found: Evaluation
    norm: Tensor
    ratio: Tensor
    accepted: Tensor


def attempt(
    problem: Problem, z: Tensor, evaluation: Evaluation, norm: Tensor, model: Model, y: Tensor, moving: Tensor
) -> Trial:
    """Take the step `D⁻¹ y` where it keeps its promise; the samples not `moving` stay."""
    new = hold(moving, z + y / model.scale, z)
    found = problem.evaluate(new)
    after = two(found.target)
    # Relative to ‖t‖², and as products of sums and differences: squares would overflow, differences cancel.
    size = torch.where(norm > 0, norm, 1.0)
    promised = two(evaluation.target - model.product(y)) / size
    promised = (1 - promised) * (1 + promised)
    kept = (1 - after / size) * (1 + after / size)
    ratio = torch.where(after.isfinite(), kept / promised.clamp_min(torch.finfo(z.dtype).tiny), -torch.inf)
    # Where the promise is no more than rounding, as beside a minimum that is not zero, the gradient decides.
    flat = (promised <= _FLAT * torch.finfo(z.dtype).eps) & after.isfinite()
    smaller = found.norm < evaluation.norm
    ratio = torch.where(flat, torch.where(smaller, 1.0, -1.0), ratio)
    accepted = moving & (ratio > _ACCEPT) & ((after < norm) | flat)
    return Trial(
        hold(accepted, new, z), found.where(accepted, evaluation), torch.where(accepted, after, norm), ratio, accepted
    )
