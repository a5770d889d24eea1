"""The one loop: every solver runs in it, and convergence and failure are decided in it, sample by sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._problem import Evaluation, Problem
from ._solution import Status
from ._tolerance import Tolerance
from .solvers import Solver

_RUNNING = -1
_DIVERGENCE = 1e8
"""Growth of the residual over the initial one that counts as divergence."""
_GROWN = 10.0
"""Growth over the best residual that tells a sample on its way out from one that hovers."""


@dataclass(frozen=True)
class Outcome:
    """What the loop found: everything but `z` and `trace` is `(B,)`.

    Attributes:
        z: `(B, n)`; always finite: the converged iterate, else the best one.
        residual: norm of the residual at `z`, infinity where it is not finite.
        status: members of `Status`.
        steps: updates applied.
        trace: residual norms after each step, `(steps, B)`, or None.
        finite: whether fn's value at `z` is finite.
    """

    z: Tensor
    residual: Tensor
    status: Tensor
    steps: Tensor
    trace: Tensor | None
    finite: Tensor


def iterate(problem: Problem, solver: Solver, z: Tensor, max_steps: int, keep_trace: bool) -> Outcome:
    """Run `solver` on `problem` from `z`, `(B, n)`, for at most `max_steps` steps.

    Between two checks (every `solver.check_every` steps) nothing is read back from the device. A sample that has
    converged or failed is frozen at the check that finds it so.
    """
    evaluation = problem.evaluate(z)
    tolerance = Tolerance(problem, solver, evaluation)
    books = _Books(tolerance, z, evaluation)
    state = solver.init(problem, z, evaluation)
    history: list[Tensor] = []
    for step in range(1, max_steps + 1):
        if not books.running:
            break
        taken = solver.step(problem, z, evaluation, state, books.active)
        z, evaluation, state = taken.z, taken.evaluation, taken.state
        norm = tolerance.norm(evaluation.residual)
        if keep_trace:
            history.append(norm)
        if step % solver.check_every == 0 or step == max_steps or taken.failure is not None:
            books.enter(step, z, evaluation, norm, taken.failure, solver.patience)
    outcome = books.close(problem)
    if keep_trace:
        trace = torch.stack(history) if history else outcome.residual.new_zeros(0, z.shape[0])
        return Outcome(**{**vars(outcome), "trace": trace})
    return outcome


class _Books:
    """Per-sample bookkeeping: who runs, the best finite iterate, and how each sample ended.

    Attributes:
        active: `(B,)` bool, or None while all samples run.
        running: whether any does.
    """

    def __init__(self, tolerance: Tolerance, z: Tensor, evaluation: Evaluation) -> None:
        norm = tolerance.norm(evaluation.residual)
        self._tolerance = tolerance
        self._first = norm
        self._norm = norm
        self._z = z
        self._evaluation = evaluation
        self._best_z = z
        self._best = torch.where(norm.isnan(), torch.inf, norm)
        self._steps = torch.zeros_like(norm, dtype=torch.long)
        self._step = 0
        self._improved = torch.zeros_like(self._steps)
        finished = norm <= tolerance.limit(evaluation)
        self._status = torch.where(finished, int(Status.CONVERGED), _RUNNING)
        broken = ~norm.isfinite()
        self._status = torch.where(broken, int(Status.NONFINITE), self._status)
        self.active: Tensor | None = None
        self.running = norm.numel() > 0
        if bool((finished | broken).any()):
            self._refresh()

    def _refresh(self) -> None:
        """Bring `active` and `running` up to date with the status."""
        self.active = self._status == _RUNNING
        self.running = bool(self.active.any())

    def enter(
        self,
        step: int,
        z: Tensor,
        evaluation: Evaluation,
        norm: Tensor,
        failure: Tensor | None,
        patience: int,
    ) -> None:
        """Take note of the iterate after `step`."""
        taken, self._step = step - self._step, step
        self._steps += taken if self.active is None else self.active * taken
        self._z, self._evaluation = z, evaluation
        finished = norm <= self._tolerance.limit(evaluation)
        better = norm <= self._best
        quiet = failure is None and bool(better.all())
        if quiet:
            # The usual case, every residual fell: the new iterate is the best one, nothing to sort out.
            self._best_z, self._best = z, norm
            self._improved.fill_(step)
        else:
            self._sort_out(step, z, norm, better, failure, patience)
        self._norm = norm
        if not quiet or bool(finished.any()):
            running = self._status == _RUNNING
            self._status = torch.where(running & finished, int(Status.CONVERGED), self._status)
            self._refresh()

    def _sort_out(
        self, step: int, z: Tensor, norm: Tensor, better: Tensor, failure: Tensor | None, patience: int
    ) -> None:
        """Keep the best iterate and end the samples that failed."""
        self._best_z = torch.where(better[:, None], z, self._best_z)
        self._best = torch.where(better, norm, self._best)
        self._improved = torch.where(better, step, self._improved)
        running = self._status == _RUNNING
        grown = torch.where(self._norm.isnan(), torch.inf, self._norm) > _GROWN * self._best
        stalled = step - self._improved >= patience
        ended = torch.where(
            stalled, torch.where(grown, int(Status.DIVERGED), int(Status.STALLED)), _RUNNING
        )
        ended = torch.where(norm > _DIVERGENCE * self._first, int(Status.DIVERGED), ended)
        # A sample that was running away overflowed; one that was not met a hole in fn's domain.
        nonfinite = torch.where(grown, int(Status.DIVERGED), int(Status.NONFINITE))
        ended = torch.where(norm.isfinite(), ended, nonfinite)
        if failure is not None:
            ended = torch.where(failure >= 0, failure, ended)
        self._status = torch.where(running, ended, self._status)

    def close(self, problem: Problem) -> Outcome:
        """The final word on every sample."""
        status = torch.where(self._status == _RUNNING, int(Status.MAX_STEPS), self._status)
        converged = status == int(Status.CONVERGED)
        z, residual = self._z, self._norm
        if not bool(converged.all()):
            z = torch.where(converged[:, None], z, self._best_z)
            residual = torch.where(converged, residual, self._best)
            spent = (status == int(Status.MAX_STEPS)) | (status == int(Status.STALLED))
            if bool(spent.any()):
                found = problem.evaluate(z)
                reached = spent & self._tolerance.reached(z, residual, found)
                status = torch.where(reached, int(Status.CONVERGED), status)
            # Nothing non-finite leaves the library, not even a start that was not finite.
            z = torch.where(z.isfinite(), z, 0.0)
        finite = residual.isfinite()
        return Outcome(z, torch.where(finite, residual, torch.inf), status, self._steps, None, finite)
