"""Newton-CG: minimisation by truncated Newton steps, from Hessian-vector products."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from .._solution import Status
from ..linear import ResidualJacobian
from ._base import Solver, Step
from ._descent import descend, objective


@dataclass(frozen=True, eq=False, repr=False)
class NewtonCG(Solver[None]):
    """Truncated Newton minimisation (Dembo & Steihaug 1983; Nocedal & Wright 2006, algorithm 7.1).

    For `minimize` and `least_squares`. Each sample's Newton system `∂²φ d = −∂φ` is solved by conjugate gradients until
    its residual is `min(½, √‖∂φ‖)` of the gradient; negative curvature ends that early, with what has been found so
    far or, at once, the direction of steepest descent: a saddle point does not attract. Then a line search on φ.
    Hessian-vector products are exact, by automatic differentiation. Quadratic convergence near a regular minimum.

    Args:
        max_products: Hessian-vector products in one step.
    """

    max_products: int = 200

    max_steps: ClassVar[int] = 200
    patience: ClassVar[int] = 100  # the gradient may rise for long while the objective falls

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_count("max_products", 1)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> None:
        """No state."""
        objective(evaluation)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: None, active: Tensor | None
    ) -> Step[None]:
        """One inner solve, one line search."""
        residual = evaluation.residual
        norm = two(residual)
        running = torch.ones_like(norm, dtype=torch.bool) if active is None else active
        operator = problem.linearize(z, evaluation.value)
        direction = _truncated(operator, residual, running & (norm > 0), self.max_products)
        moved = descend(problem, z, evaluation, direction, torch.ones_like(norm), running)
        failure = torch.where(moved.stuck, int(Status.STALLED), -1) if bool(moved.stuck.any()) else None
        return Step(moved.z, moved.found, None, failure, look=True)


def _truncated(operator: ResidualJacobian, residual: Tensor, running: Tensor, max_products: int) -> Tensor:
    """`d`, `(B, n)`, with `∂²φ d ≈ r`; a direction of descent."""
    norm = two(residual)
    goal = norm * norm.sqrt().clamp_max(0.5)
    d, rest = torch.zeros_like(residual), residual
    p, square = residual, norm * norm
    going = running & norm.isfinite()
    for _ in range(max_products):
        image = operator.mv(p)
        curvature = torch.linalg.vecdot(p, image)
        # Relative to its size: the curvature of a direction is as good as none where rounding makes it.
        positive = curvature > torch.finfo(p.dtype).eps * two(p) * two(image)
        first = (d == 0).all(dim=1)
        d = torch.where((going & ~positive & first)[:, None], residual, d)
        going = going & positive
        alpha = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)[:, None]
        d = d + alpha * p
        rest = rest - alpha * image
        after = torch.linalg.vecdot(rest, rest)
        going = going & (after.sqrt() > goal)
        if not bool(going.any()):
            break
        p = torch.where(going[:, None], rest + (after / torch.where(square > 0, square, 1.0))[:, None] * p, p)
        square = torch.where(going, after, square)
    return torch.where(running[:, None], d, 0.0)
