"""A solve in stages: what one solver leaves unsolved, the next one takes up."""

from dataclasses import replace

import torch
from torch import Tensor

from ._books import Outcome
from ._evaluation import Evaluation
from ._iterate import iterate
from ._mixed import approach
from ._norms import two
from ._problem import Problem
from ._progress import Progress
from ._solution import Status
from ._tolerance import Tolerance
from .linear import Cascade
from .solvers import Method, Stage

_FAR = 3.0
"""Sizes of the start from it, beyond which a root is looked at again."""
_SHORT = 1e-2
"""Part of the way, above which a Newton step is long."""
_STARTS = ((0.1, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.0, -1.0))
"""Factors and shifts that make another start of one."""


def solve(
    problem: Problem,
    method: Method,
    start: Tensor,
    max_steps: int | None,
    keep_trace: bool,
    progress: Progress | None = None,
) -> Outcome:
    """Run the stages of a method from `start`, `(B, n)`, each on the samples that those before it left unsolved.

    A sample goes from stage to stage by itself: where it begins is its own best iterate, or its own start. It ends as
    the stage that brought it furthest left it.

    Args:
        problem: the equation.
        method: a solver, or several in succession.
        start: z0.
        max_steps: of all stages together; None is what the stages say.
        keep_trace: keep the residuals of every step.
        progress: told of every step.
    """
    first, *others = method.stages(problem)
    evaluation = problem.evaluate(start)
    if others:
        start, evaluation = _finite_start(problem, start, evaluation)
    tolerance = Tolerance(problem, method, start, evaluation)
    steps = _within(first, max_steps, 0) if others or max_steps is None else max_steps
    z, rough = start, None
    coarse = problem.coarse() if method.mixed_precision and problem.kind == "fixed_point" and steps else None
    if coarse is not None:
        tolerance = tolerance.resumed(evaluation)
        rough = approach(problem, coarse, method, first, start, steps, keep_trace, evaluation, tolerance, progress)
        z, evaluation = rough.z, rough.evaluation
        steps = max(steps - int(rough.steps.max()), 0)
    outcome = iterate(
        problem,
        first,
        z,
        steps,
        keep_trace,
        tolerance,
        evaluation=evaluation,
        progress=progress,
        resumed=rough is not None,
    )
    if rough is not None:
        trace = None if rough.trace is None or outcome.trace is None else torch.cat((rough.trace, outcome.trace))
        outcome = replace(outcome, steps=rough.steps + outcome.steps, trace=trace)
    for turn, stage in enumerate(others):
        if outcome.clean:
            break
        left = outcome.status != int(Status.CONVERGED)
        steps = _within(stage, max_steps, int(outcome.steps.max()))
        if not steps or not bool(left.any()):
            break
        z = start if stage.start == "z0" else outcome.z
        if stage.spread:
            z = z + stage.spread * _size(start) * _direction(z, turn)
        found = iterate(problem, stage, z, steps, keep_trace, tolerance, only=left, progress=progress)
        outcome = _merge(outcome, found, left)
    if others and problem.kind == "root":
        outcome = _without_escapes(problem, start, outcome)
    problem.conclude(outcome.z)
    return outcome


def _without_escapes(problem: Problem, start: Tensor, outcome: Outcome) -> Outcome:
    """Take back the success of samples that ran away to where fn only decays to zero, as `exp(−z)` does.

    What tells them from roots is Newton's step, which for them is still long beside the way they have come. It is
    looked at where that way is far longer than the start is large.
    """
    way = two(outcome.z - start)
    far = (outcome.status == int(Status.CONVERGED)) & (way > _FAR * (two(start) + start.shape[1] ** 0.5))
    if not bool(far.any()):
        return outcome
    evaluation = problem.evaluate(outcome.z)
    residual = torch.where(far[:, None], evaluation.residual, 0.0)
    step = Cascade().solve(problem.linearize(outcome.z, evaluation.value), residual, 0.1, verify=False)
    escaped = far & (step.status == int(Status.CONVERGED)) & (two(step.value) > _SHORT * way)
    status = torch.where(escaped, int(Status.DIVERGED), outcome.status)
    return replace(outcome, status=status, clean=outcome.clean and not bool(escaped.any()))


def _finite_start(problem: Problem, start: Tensor, evaluation: Evaluation) -> tuple[Tensor, Evaluation]:
    """A start at which fn is finite, in the place of one at which it is not, where one of a few is."""
    for factor, shift in _STARTS:
        if bool(evaluation.norm.isfinite().all()):
            break
        lost = ~evaluation.norm.isfinite()
        # A start that is not finite itself counts as 1.
        other = torch.where(lost[:, None], torch.where(start.isfinite(), start, 1.0) * factor + shift, start)
        trial = problem.evaluate(other)
        found = lost & trial.norm.isfinite()
        start, evaluation = torch.where(found[:, None], other, start), trial.where(found, evaluation)
    return start, evaluation


def _size(start: Tensor) -> Tensor:
    """The size of each unknown at the start, `(B, n)`: its own, or where it is small that of all; 1 where all are 0."""
    typical = start.square().mean(dim=1, keepdim=True).sqrt()
    return torch.maximum(start.abs(), torch.where(typical > 0, typical, 1.0))


def _direction(z: Tensor, turn: int) -> Tensor:
    """Numbers in [−1, 1] without a pattern, `(n,)`, the same for every sample and on every machine."""
    random = torch.Generator().manual_seed(turn)
    return (2 * torch.rand(z.shape[1], generator=random, dtype=torch.float64) - 1).to(z)


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
        value=None,
        clean=bool((status == int(Status.CONVERGED)).all()),
    )
