"""A solve in mixed precision: roughly under autocast, then Newton steps whose linear systems are solved under it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._iterate import iterate
from ._problem import Problem
from ._progress import Progress
from ._refinement import ROUGH, ROUGH_SYSTEM, WORTH, Pace
from ._tolerance import Tolerance
from .linear import Neumann
from .solvers import Method, Stage

_PATIENCE, _PROGRESS = 12, 0.8
"""In reduced precision: steps between two looks, and what the residual must fall by to go on."""
_MARGIN = 0.5
"""Part of the tolerance that the linear systems aim at: what they leave out is of second order."""


@dataclass(eq=False, repr=False)
class Rough:
    """Where a solve in full precision may begin.

    Attributes:
        z: `(B, n)`.
        evaluation: fn there, in full precision.
        steps: of each sample, `(B,)`: evaluations and products.
        trace: residual norms after each step of the rough stage and each refinement, `(rows, B)`, or None.
    """

    z: Tensor
    evaluation: Evaluation
    steps: Tensor
    trace: Tensor | None


def approach(
    problem: Problem,
    coarse: Problem,
    method: Method,
    stage: Stage,
    start: Tensor,
    steps: int,
    keep_trace: bool,
    evaluation: Evaluation,
    tolerance: Tolerance,
    progress: Progress | None,
) -> Rough:
    """Solve a fixed point as far as reduced precision leads: an iterative refinement.

    Wilkinson 1963; Higham & Mary 2022, §5. Residuals are computed in full, what they are to be corrected by is not.
    Each sample keeps what has made its residual smaller; what does not converge so is left as it is.

    Args:
        problem: the equation.
        coarse: the same in reduced precision.
        method: its tolerances.
        stage: who steps.
        start: where, `(B, n)`.
        steps: at most.
        keep_trace: keep the residuals of every step.
        evaluation: fn at the start.
        tolerance: of the solve, resumed.
        progress: told of every step.
    """
    # One context around all of it keeps the weights that were cast.
    with coarse.casts(), coarse.exact():
        judge = Tolerance(coarse, replace(method, rtol=max(method.rtol or 0.0, ROUGH)), start, evaluation)
        stage = replace(stage, patience=_PATIENCE, progress=_PROGRESS)
        found = iterate(coarse, stage, start, steps, keep_trace, judge, evaluation=evaluation, progress=progress)
        better = found.residual < tolerance.first * tolerance.unit
        z = torch.where(better[:, None], found.z, start)
        evaluation, trace = problem.evaluate(z), found.trace
        if trace is not None and len(trace):  # what it ended with, in full precision
            trace = torch.cat((trace[:-1], tolerance.of(evaluation)[None] * tolerance.unit))
        rough = Rough(z, evaluation, found.steps, trace)
        return _refine(problem, coarse, rough, steps, tolerance, stage, progress)


def _refine(
    problem: Problem,
    coarse: Problem,
    rough: Rough,
    max_steps: int,
    tolerance: Tolerance,
    stage: Stage,
    progress: Progress | None,
) -> Rough:
    """Newton steps, for as long as each makes the residual of some sample fall."""
    norm, fallen = tolerance.of(rough.evaluation), tolerance.fallen(tolerance.first)
    limit = tolerance.limit(rough.evaluation, fallen)
    going = (norm >= limit) & norm.isfinite()
    pace = Pace()
    while bool(going.any()):
        left = max_steps - int(rough.steps.max()) - 1
        operator = coarse.linearize_forward(rough.z, rough.evaluation.value) if left > 0 else None
        if operator is None:
            break
        needed = torch.where(going, (_MARGIN * limit / norm).clamp(ROUGH_SYSTEM, 1.0), 1.0)
        residual = rough.evaluation.residual
        if not bool(going.all()):
            residual = torch.where(going[:, None], residual, 0.0)
        linear = Neumann(max_steps=left, first_look=pace.products(float(needed.min())))
        step = linear.solve(operator, residual, needed, verify=False)
        pace.note(float(step.residual.max()), int(step.steps.max()))
        z = rough.z + step.value
        found = problem.evaluate(z)
        after = tolerance.of(found)
        better = going & (after < norm)
        rough.steps = rough.steps + torch.where(going, step.steps + 1, 0)
        if bool(better.all()):
            rough.z, rough.evaluation = z, found
        else:
            rough.z = torch.where(better[:, None], z, rough.z)
            rough.evaluation = found.where(better, rough.evaluation)
        going = better & (after <= WORTH * norm)
        norm = torch.where(better, after, norm)
        limit = tolerance.limit(rough.evaluation, fallen)
        going &= norm >= limit
        if rough.trace is not None:
            rough.trace = torch.cat((rough.trace, norm[None] * tolerance.unit))
        if progress is not None:
            progress.step(stage.solver, norm * tolerance.unit, int(going.sum()))
    return rough
