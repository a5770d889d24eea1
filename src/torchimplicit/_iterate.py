"""The one loop: every solver runs in it, and convergence and failure are decided in it, sample by sample."""

from dataclasses import replace

from torch import Tensor

from ._books import Books, Outcome
from ._evaluation import Evaluation
from ._problem import Problem
from ._progress import Progress
from ._tolerance import Tolerance
from .solvers import Stage


def iterate(
    problem: Problem,
    stage: Stage,
    z: Tensor,
    max_steps: int,
    keep_trace: bool,
    tolerance: Tolerance,
    only: Tensor | None = None,
    evaluation: Evaluation | None = None,
    progress: Progress | None = None,
    resumed: bool = False,
) -> Outcome:
    """Run a stage's solver on `problem` from `z`, `(B, n)`, for at most `max_steps` steps.

    Between two checks (every `solver.check_every` steps) nothing is read back from the device. What a sample returns is
    settled at the check that finds it converged or failed, whatever the solver does with its row afterwards. Where fn
    can be split, the iteration goes on without the settled samples once they are many.

    Args:
        problem: the equation.
        stage: the solver, and when it gives up.
        z: the start.
        max_steps: at most.
        keep_trace: look at the residuals after every step, and keep them.
        tolerance: of the solve that this stage is a part of.
        only: `(B,)` bool, the samples to solve; None for all. Of the others the outcome says nothing.
        evaluation: fn at `z`, where it is known.
        progress: told of every step.
        resumed: whether `z` is an iterate of the solve already, and not its start.
    """
    whole, solver = problem, stage.solver
    every = keep_trace or progress is not None
    evaluation = problem.evaluate(z) if evaluation is None else evaluation
    norm = tolerance.of(evaluation)
    books = Books(tolerance, stage, z, evaluation, norm, only, resumed or only is not None)
    rows = None if only is None else books.worth_keeping(problem.crowd)
    part = None if rows is None else problem.select(rows, z, evaluation, books.first)
    if rows is not None and part is not None:
        # Of a later stage, which has only a few of the samples to solve.
        problem, z, evaluation = part, z.index_select(0, rows), evaluation.select(rows)
        books.select(rows, part, z)
    state = solver.init(problem, z, evaluation)
    history: list[Tensor] = []
    step = 0
    while books.left and step < max_steps:
        # As many steps at once as nobody looks at.
        count = 1 if every else min(solver.check_every - step % solver.check_every, max_steps - step)
        taken = solver.steps(problem, z, evaluation, state, books.active, count)
        z, evaluation, state = taken.z, taken.evaluation, taken.state
        step += taken.count
        check = step % solver.check_every == 0 or step == max_steps or taken.failure is not None or taken.look
        if check or every:
            norm = tolerance.of(evaluation)
            if keep_trace:
                history.append(books.spread(norm))
            if check:
                books.enter(step, z, evaluation, norm, taken.failure)
            if progress is not None:
                progress.step(solver, books.current(norm), books.left)
            if check:
                rows = books.worth_keeping(problem.crowd)
                part = None if rows is None else problem.select(rows, z, evaluation, books.first)
                if rows is not None and part is not None:
                    problem, state = part, solver.select(state, rows)
                    z, evaluation = z.index_select(0, rows), evaluation.select(rows)
                    books.select(rows, part, z)
    outcome = books.close(whole, history if keep_trace else None)
    if books.together:
        outcome = replace(outcome, value=evaluation.value)
    return replace(outcome, inverse=solver.inverse(state)) if problem.keeps_inverse and step else outcome
