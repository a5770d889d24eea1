"""Powell's dogleg: Newton's step where it can be trusted, steepest descent where it cannot."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from .._solution import Status
from ._base import Solver, Step
from ._trust_region import DenseModel, attempt

_RANK = 100.0
"""Rounding units, relative to the largest pivot, below which a pivot counts as zero."""


@dataclass(eq=False, repr=False)
class _Region:
    """The trust region of each sample.

    Attributes:
        model: at the iterate; None before the first step.
        radius: `‖D Δz‖` allowed, `(B,)`.
        norm: of the residual, `(B,)`.
    """

    model: DenseModel | None
    radius: Tensor
    norm: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Dogleg(Solver[_Region]):
    """Powell's hybrid method (1970): within a trust region, from steepest descent to Newton's step along a dogleg.

    The step minimises the linear model `‖r − A y‖` over the path from 0 to the Cauchy point to Newton's step, inside
    `‖y‖ ≤ Δ`; variables are scaled by the column norms of the Jacobian (Moré 1978; MINPACK's HYBRJ). A step that keeps
    less than 10⁻⁴ of the promised fall of `‖r‖²` is refused; below ¼ the region shrinks to a quarter of the step,
    above ¾ it doubles. Where the Jacobian is singular, Newton's step is that of least squares with least norm. A
    sample at which `‖r‖` is stationary without being zero is STALLED.

    Differences to MINPACK: exact Jacobians at every accepted step, no Broyden updates between.

    Args:
        radius: the first Δ, in units of `‖D z0‖`; none where that is zero.
    """

    radius: float = 1.0

    max_steps: ClassVar[int] = 400
    patience: ClassVar[int] = 40

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_number("radius", 0.0, inside=True)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Region:
        """No model yet."""
        norm = two(evaluation.target)
        return _Region(None, torch.full_like(norm, torch.nan), norm)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Region, active: Tensor | None
    ) -> Step[_Region]:
        """One trial step."""
        target = evaluation.target
        running = torch.ones_like(state.norm, dtype=torch.bool) if active is None else active
        model = state.model
        if model is None:
            model = DenseModel.at(problem, z, evaluation, None)
            size = two(model.scale * z)
            state.radius = self.radius * torch.where(size > 0, size, torch.inf)
        gradient = model.gradient(target)
        stationary = model.stationary(target, gradient) | ~model.usable
        y, newton = _dogleg(model, target, gradient, state.radius)
        moving = running & ~stationary & y.isfinite().all(dim=1)
        y = torch.where(moving[:, None], y, 0.0)
        trial = attempt(problem, z, evaluation, state.norm, model, y, moving)
        length = two(y)
        radius = torch.where(trial.ratio < 0.1, 0.5 * length, state.radius)
        wider = (trial.ratio > 0.5) & ~newton
        radius = torch.where(wider, torch.maximum(2 * length, radius), radius)
        state.radius = torch.where(moving, radius, state.radius)
        state.norm = trial.norm
        closed = moving & (state.radius <= 4 * torch.finfo(z.dtype).eps * two(model.scale * z))
        stuck = running & (stationary | closed | ~moving)
        failure = torch.where(stuck, int(Status.STALLED), -1) if bool(stuck.any()) else None
        moved = bool(trial.accepted.any())
        state.model = DenseModel.at(problem, trial.z, trial.found, model) if moved else model
        return Step(trial.z, trial.found, state, failure, look=True)


def _newton(model: DenseModel, target: Tensor) -> Tensor:
    """The step that makes the model least: Newton's, or for more residuals than unknowns Gauss and Newton's."""
    _, m, n = model.matrix.shape
    if m == n:
        newton, info = torch.linalg.solve_ex(model.matrix, target[:, :, None])
        newton = newton[:, :, 0]
        # A solution that does not solve, as of a matrix singular to rounding, is none.
        good = (info == 0) & (two(target - model.product(newton)) <= 1e-3 * two(target))
    else:
        q, r = torch.linalg.qr(model.matrix)
        newton = torch.zeros_like(model.scale)
        pivots = r.diagonal(dim1=1, dim2=2).abs()
        good = (pivots > _RANK * torch.finfo(r.dtype).eps * pivots.amax(1, keepdim=True)).all(dim=1) & (m > n)
        if m > n:
            newton = torch.linalg.solve_triangular(r, torch.bmm(q.mT, target[:, :, None]), upper=True)[:, :, 0]
    good = good & newton.isfinite().all(dim=1)
    if not bool(good.all()):
        bad = (~good).nonzero()[:, 0]
        pseudo = torch.linalg.pinv(model.matrix.index_select(0, bad), rtol=torch.finfo(target.dtype).eps ** 0.75)
        least = torch.bmm(pseudo, target.index_select(0, bad)[:, :, None])[:, :, 0]
        newton = newton.index_copy(0, bad, least)
    return newton


def _dogleg(model: DenseModel, target: Tensor, gradient: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The step of length `radius` at most, and whether it is Newton's."""
    newton = _newton(model, target)
    size = two(gradient)
    curvature = two(model.product(gradient))
    tiny = torch.finfo(target.dtype).tiny
    cauchy = (size / curvature.clamp_min(tiny)).square()[:, None] * gradient
    cauchy_length, newton_length = two(cauchy), two(newton)
    # |cauchy + τ (newton − cauchy)| = radius, the root in [0, 1] without cancellation.
    leg = newton - cauchy
    a, b = torch.linalg.vecdot(leg, leg), torch.linalg.vecdot(cauchy, leg)
    c = ((radius - cauchy_length) * (radius + cauchy_length)).clamp_min(0.0)
    root = (b * b + a * c).clamp_min(0.0).sqrt()
    tau = torch.where(b > 0, c / (b + root).clamp_min(tiny), (root - b) / a.clamp_min(tiny)).clamp(0.0, 1.0)
    between = cauchy + tau[:, None] * leg
    steepest = (radius / size.clamp_min(tiny))[:, None] * gradient
    whole = newton_length <= radius
    y = torch.where((cauchy_length >= radius)[:, None], steepest, between)
    return torch.where(whole[:, None], newton, y), whole
