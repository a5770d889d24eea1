"""The line search of minimisation: along a direction of descent until the objective has fallen, sample by sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from ._base import hold

_ARMIJO = 1e-4
_HALVINGS = 30


@dataclass(eq=False, repr=False)
class Descent:
    """Where a search has led.

    Attributes:
        z: the points, `(B, n)`.
        found: fn there.
        stuck: the samples that found no lower point and are back at the start, `(B,)`.
    """

    z: Tensor
    found: Evaluation
    stuck: Tensor


def objective(evaluation: Evaluation) -> Tensor:
    """The objective of each sample, `(B,)`.

    Raises:
        TypeError: there is none: the problem is no minimisation.
    """
    if evaluation.objective is None:
        raise TypeError(
            "solver: this one minimises an objective, and there is none to a root or a fixed point; "
            "use it with torchimplicit.minimize or least_squares."
        )
    return evaluation.objective


def descend(
    problem: Problem, z: Tensor, evaluation: Evaluation, direction: Tensor, length: Tensor, moving: Tensor
) -> Descent:
    """Halve the step from `length`, `(B,)`, until `φ(z + t d) ≤ φ(z) − 10⁻⁴ t dᵀr` (Armijo 1966), `r = −∂φ/∂z`.

    Near a minimum φ is flat to rounding: there a step that does not raise it by more than that may also count by a
    smaller gradient (Hager & Zhang 2005, "approximate Wolfe").
    """
    start, gradient = objective(evaluation), evaluation.norm
    slope = torch.linalg.vecdot(direction, evaluation.residual)
    noise = 4 * torch.finfo(z.dtype).eps * start.abs()
    point = hold(moving, torch.addcmul(z, length[:, None], direction), z)
    found = problem.evaluate(point)
    for _ in range(_HALVINGS):
        now = objective(found)
        good = now <= start - _ARMIJO * length * slope
        good |= (now <= start + noise) & (found.norm < gradient)
        stuck = moving & ~good
        if not bool(stuck.any()):
            return Descent(point, found, stuck)
        length = torch.where(stuck, 0.5 * length, length)
        point = hold(stuck, torch.addcmul(z, length[:, None], direction), point)
        found = problem.evaluate(point)
    now = objective(found)
    good = (now <= start - _ARMIJO * length * slope) | ((now <= start + noise) & (found.norm < gradient))
    stuck = moving & ~good
    return Descent(hold(stuck, z, point), evaluation.where(stuck, found), stuck)
