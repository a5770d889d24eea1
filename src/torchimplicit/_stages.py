"""A solve in stages: what one solver leaves unsolved, the next one takes up."""

from dataclasses import replace

import torch
from torch import Tensor

from ._books import Outcome
from ._iterate import iterate
from ._problem import Problem
from ._solution import Status
from ._tolerance import Tolerance
from .solvers import Method, Stage


def solve(problem: Problem, method: Method, start: Tensor, max_steps: int | None, keep_trace: bool) -> Outcome:
    """Run the stages of a method from `start`, `(B, n)`, each on the samples that those before it left unsolved.

    A sample goes from stage to stage by itself: where it begins is its own best iterate, or its own start. It ends as
    the stage that brought it furthest left it.

    Args:
        problem: the equation.
        method: a solver, or several in succession.
        start: z0.
        max_steps: of all stages together; None is what the stages say.
        keep_trace: keep the residuals of every step.
    """
    first, *others = method.stages(problem)
    tolerance = Tolerance(problem, method, problem.evaluate(start)) if others else None
    outcome = iterate(problem, first, start, _within(first, max_steps, 0), keep_trace, tolerance)
    if outcome.clean:
        return outcome
    for stage in others:
        left = outcome.status != int(Status.CONVERGED)
        steps = _within(stage, max_steps, int(outcome.steps.max()))
        if not steps or not bool(left.any()):
            break
        z = start if stage.start == "z0" else outcome.z
        outcome = _merge(outcome, iterate(problem, stage, z, steps, keep_trace, tolerance, only=left), left)
    return outcome


def _within(stage: Stage, max_steps: int | None, taken: int) -> int:
    return stage.max_steps if max_steps is None else min(stage.max_steps, max_steps - taken)


def _merge(old: Outcome, new: Outcome, left: Tensor) -> Outcome:
    """The outcome of a stage for the samples left to it, where it is no worse."""
    better = (new.status == int(Status.CONVERGED)) | (new.residual <= old.residual)
    taken = left & better
    steps = torch.where(left, old.steps + new.steps, old.steps)
    status = torch.where(taken, new.status, old.status)
    residual = torch.where(taken, new.residual, old.residual)
    trace = None
    if old.trace is not None and new.trace is not None:
        trace = torch.cat((old.trace, torch.where(left, new.trace, old.residual)))
    return replace(
        old,
        z=torch.where(taken[:, None], new.z, old.z),
        residual=residual,
        status=status,
        steps=steps,
        trace=trace,
        finite=torch.where(taken, new.finite, old.finite),
        clean=bool((status == int(Status.CONVERGED)).all()),
    )
