"""Damped least squares from products with the Jacobian alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from ..linear import AutogradJacobian, PartialJacobian, ResidualJacobian
from ._trust_region import Model

_FORCING = 0.1
_PROBES = 3


@dataclass(eq=False, repr=False)
class MatrixFreeModel(Model):
    """The model with A known through its products.

    Attributes:
        operator: of the unscaled Jacobian, with `mv` and `rmv`.
        length: an estimate of `‖A‖₂`, `(B,)`.
    """

    operator: "Products"
    scale: Tensor
    usable: Tensor
    length: Tensor

    @classmethod
    def at(cls, problem: Problem, z: Tensor, evaluation: Evaluation) -> "MatrixFreeModel":
        """The model at an iterate."""
        operator = Products(problem.linearize_target(z, evaluation))
        # Three steps of the power method on AᵀA, from the gradient: the scale of λ need not be known well.
        target = evaluation.target
        tiny = torch.finfo(z.dtype).tiny
        v = operator.rmv(target)
        length = two(v) / two(target).clamp_min(tiny)
        for _ in range(_PROBES):
            image = operator.mv(v / two(v).clamp_min(tiny)[:, None])
            length = torch.maximum(length, two(image))
            v = operator.rmv(image)
        return cls(operator, torch.ones_like(z), length.isfinite(), length)

    def product(self, y: Tensor) -> Tensor:
        """`A y`."""
        return self.operator.mv(y)

    def gradient(self, target: Tensor) -> Tensor:
        """`Aᵀ t`."""
        return self.operator.rmv(target)

    def size(self) -> Tensor:
        """An estimate of the spectral norm."""
        return self.length

    def select(self, samples: Tensor) -> "MatrixFreeModel":
        """The model of some samples alone."""
        parts = (t.index_select(0, samples) for t in (self.scale, self.usable, self.length))
        return MatrixFreeModel(self.operator.select(samples), *parts)


class Products:
    """`A y` and `Aᵀ t` of a Jacobian, square or not."""

    def __init__(self, jacobian: AutogradJacobian | ResidualJacobian | PartialJacobian) -> None:
        self._jacobian = jacobian

    def mv(self, y: Tensor) -> Tensor:
        """`A y`."""
        return self._jacobian.mv(y)

    def rmv(self, t: Tensor) -> Tensor:
        """`Aᵀ t`."""
        return self._jacobian.mT.mv(t) if isinstance(self._jacobian, ResidualJacobian) else self._jacobian.rmv(t)

    def select(self, samples: Tensor) -> "Products":
        """Of some samples alone."""
        return Products(self._jacobian.select(samples))


def damped_by_conjugate_gradients(
    model: MatrixFreeModel, gradient: Tensor, weight: Tensor, running: Tensor, max_products: int
) -> Tensor:
    """`(AᵀA + w I) y = g` for each sample that runs, to a tenth of g, in the form that keeps `A y` (CGLS)."""
    y, rest = torch.zeros_like(gradient), gradient
    direction, square = rest, torch.linalg.vecdot(rest, rest)
    goal = _FORCING**2 * square
    going = running & (square > 0)
    for _ in range(max_products):
        image = model.product(direction)
        curvature = torch.linalg.vecdot(image, image) + weight * torch.linalg.vecdot(direction, direction)
        alpha = torch.where(going, square / torch.where(curvature > 0, curvature, 1.0), 0.0)[:, None]
        y = y + alpha * direction
        rest = rest - alpha * (model.gradient(image) + weight[:, None] * direction)
        after = torch.linalg.vecdot(rest, rest)
        going = going & (after > goal)
        if not bool(going.any()):
            break
        ratio = torch.where(going, after / torch.where(square > 0, square, 1.0), 0.0)
        direction = rest + ratio[:, None] * direction
        square = after
    return y
