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
_LEAST_PROGRESS = 1e-5
"""Relative fall of the best residual, over a solver's patience, without which a sample has stalled."""


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
        check = step % solver.check_every == 0 or step == max_steps or taken.failure is not None
        if check or keep_trace:
            norm = tolerance.norm(evaluation.residual)
            if keep_trace:
                history.append(norm)
            if check:
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
        self._first = self._peak = norm
        self._norm = norm
        self._z = self._best_z = z
        self._evaluation = evaluation
        self._best = torch.where(norm.isnan(), torch.inf, norm)
        self._ended = torch.zeros_like(norm, dtype=torch.long)
        self._step = 0
        self._reference, self._looked = self._best, 0
        status = torch.where(norm <= tolerance.limit(evaluation), int(Status.CONVERGED), _RUNNING)
        self._status = torch.where(norm.isfinite(), status, int(Status.NONFINITE))
        self.active: Tensor | None = None
        self._left = norm.numel()
        self._count(self._status == _RUNNING)

    @property
    def running(self) -> bool:
        """Whether a sample still runs."""
        return self._left > 0

    def _count(self, running: Tensor) -> None:
        """Take note of who is left; `active` stays None while nobody has ended."""
        left = int(running.sum())
        if left < self._left:
            if self.active is not None or self._step:
                before = torch.ones_like(running) if self.active is None else self.active
                self._ended = torch.where(before & ~running, self._step, self._ended)
            self.active, self._left = running, left

    def enter(
        self, step: int, z: Tensor, evaluation: Evaluation, norm: Tensor, failure: Tensor | None, patience: int
    ) -> None:
        """Take note of the iterate after `step`."""
        self._step, self._z, self._evaluation = step, z, evaluation
        above = (norm <= self._tolerance.limit(evaluation, self._peak)).logical_not_()
        better = norm <= self._best
        look = step - self._looked >= patience
        if failure is None and not look and bool(better.all()):
            # The usual case, no residual rose: the new iterate is the best one, nothing to sort out.
            self._best_z, self._best = z, norm
        else:
            failed = self._sort_out(z, norm, better, failure)
            if look:
                failed = torch.where(failed == _RUNNING, self._look(step, norm), failed)
            self._status = torch.where((self._status == _RUNNING) & above, failed, self._status)
        self._norm = norm
        running = above & (self._status == _RUNNING)
        if int(running.sum()) < self._left:
            finished = (self._status == _RUNNING) & ~above
            self._status = torch.where(finished, int(Status.CONVERGED), self._status)
            self._count(running)

    def _sort_out(self, z: Tensor, norm: Tensor, better: Tensor, failure: Tensor | None) -> Tensor:
        """Keep the best iterate; returns the failure status of each sample, `_RUNNING` for none."""
        self._peak = torch.fmax(self._peak, norm)
        self._best_z = torch.where(better[:, None], z, self._best_z)
        self._best = torch.where(better, norm, self._best)
        failed = torch.where(norm > _DIVERGENCE * self._first, int(Status.DIVERGED), _RUNNING)
        # A sample that was running away overflowed; one that was not met a hole in fn's domain.
        nonfinite = torch.where(self._norm > _GROWN * self._best, int(Status.DIVERGED), int(Status.NONFINITE))
        failed = torch.where(norm.isfinite(), failed, nonfinite)
        return failed if failure is None else torch.where(failure >= 0, failure, failed)

    def _look(self, step: int, norm: Tensor) -> Tensor:
        """Who has stalled: whose best residual is no better than at the last look, `patience` steps ago."""
        stuck = ~(self._best < (1 - _LEAST_PROGRESS) * self._reference)
        self._reference, self._looked = self._best, step
        kind = torch.where(norm > _GROWN * self._best, int(Status.DIVERGED), int(Status.STALLED))
        return torch.where(stuck, kind, _RUNNING)

    def close(self, problem: Problem) -> Outcome:
        """The final word on every sample."""
        steps = torch.where(self._status == _RUNNING, self._step, self._ended)
        status = torch.where(self._status == _RUNNING, int(Status.MAX_STEPS), self._status)
        if self._step:
            doubtful = (status == int(Status.CONVERGED)) & (self._ended > 0)
            doubtful &= ~self._tolerance.credible(self._evaluation, self._peak)
            status = torch.where(doubtful, int(Status.DIVERGED), status)
        converged = status == int(Status.CONVERGED)
        z, residual = self._z, self._norm
        if not bool(converged.all()):
            z = torch.where(converged[:, None], z, self._best_z)
            residual = torch.where(converged, residual, self._best)
            spent = (status == int(Status.MAX_STEPS)) | (status == int(Status.STALLED))
            if bool(spent.any()):
                found = problem.evaluate(z)
                reached = spent & self._tolerance.reached(z, residual, found, self._peak)
                status = torch.where(reached, int(Status.CONVERGED), status)
            # Nothing non-finite leaves the library, not even a start that was not finite.
            z = torch.where(z.isfinite(), z, 0.0)
        finite = residual.isfinite()
        return Outcome(z, torch.where(finite, residual, torch.inf), status, steps, None, finite)
