"""The loop's books: who runs, the best finite iterate of each sample, and what it returns when it is settled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._problem import Problem
from ._solution import Status
from ._tolerance import Tolerance
from .linear import Inverse
from .solvers import Stage

_RUNNING = -1
_DIVERGENCE = 1e8
"""Growth of the residual over the initial one that counts as divergence."""
_FAR, _TRUSTED = 8.0, 8
"""Multiple of the tolerance above which it is not computed anew, for so many looks."""
_GROWN = 10.0
"""Growth over the best residual that tells a sample on its way out from one that hovers."""


@dataclass(frozen=True, eq=False, repr=False)
class Outcome:
    """What the loop found: everything but `z` and `trace` is `(B,)`.

    Attributes:
        z: `(B, n)`; always finite: the converged iterate, else the best one.
        residual: norm of the residual at `z`, infinity where it is not finite.
        status: members of `Status`.
        steps: updates applied.
        trace: residual norms after each step, `(steps, B)`, or None.
        finite: whether fn's value at `z` is finite.
        clean: whether every sample converged, known to the host.
        inverse: what the solver knows of `A⁻¹` at `z`, where it was asked for.
        value: fn at `z`, `(B, n)`, where it is known of every sample.
    """

    z: Tensor
    residual: Tensor
    status: Tensor
    steps: Tensor
    trace: Tensor | None
    finite: Tensor
    clean: bool
    inverse: Inverse | None = None
    value: Tensor | None = None


class Books:
    """Per-sample bookkeeping: who runs, the best finite iterate, and what each sample returns.

    Tensors of the loop, and of what changes in it, have the rows at hand first; those of what is settled, or seldom
    looked at, have the whole batch: to go on with some rows alone is then little work.

    Attributes:
        active: bool, the rows that run; None while all do.
        left: how many run.
        together: whether all samples converged at the last look, none before.
    """

    def __init__(
        self,
        tolerance: Tolerance,
        stage: Stage,
        z: Tensor,
        evaluation: Evaluation,
        norm: Tensor,
        only: Tensor | None,
        later: bool,
    ) -> None:
        solver = stage.solver
        self._patience = solver.patience if stage.patience is None else stage.patience
        self._progress = solver.progress if stage.progress is None else stage.progress
        self._tolerance = self._whole = tolerance
        self._step = 0
        # The start of a later stage is an iterate like any other: what it must have fallen from is where all began.
        self._later = later
        self._samples: Tensor | None = None
        self._z = self._best_z = z
        self._norm = self._best = norm
        self._first = self._reference = norm
        self._looked = 0
        self._peak = torch.fmax(norm, tolerance.first) if self._later else norm
        self._fallen = self._fallen_at_first = tolerance.fallen(self._peak)
        self._risen = False
        self._settled_z, self._settled = z.clone(), norm.clone()
        self._ended = torch.zeros_like(norm, dtype=torch.long)
        self._status = torch.zeros_like(self._ended)
        self._failures = False
        self.active = None if only is None else only.clone()
        self.left = norm.numel() if only is None else int(only.sum())
        self.together = False
        limit = tolerance.limit(evaluation, self._fallen if self._later else None)
        self._far: Tensor | None = None
        self._trusted = 0
        self._trust(limit)
        if not bool(((norm >= limit) & (norm < torch.inf)).all()):
            self._best = self._reference = torch.where(norm.isnan(), torch.inf, norm)
            within = norm < limit
            if self._later and tolerance.asks_more:
                within &= tolerance.confirmed(z, evaluation, norm)
            status = torch.where(within, int(Status.CONVERGED), _RUNNING)
            self._settle(z, norm, torch.where(norm.isfinite(), status, int(Status.NONFINITE)))

    @property
    def first(self) -> Tensor:
        """The residual's norm at the start, of the rows at hand."""
        return self._of(self._first)

    def worth_keeping(self, crowd: float) -> Tensor | None:
        """Indices of the rows that run, once there are `crowd` times as many at hand; else None."""
        if self.active is None or not 0 < crowd * self.left <= self._norm.numel():
            return None
        return self.active.nonzero()[:, 0]

    def select(self, rows: Tensor, problem: Problem, z: Tensor) -> None:
        """Go on with some rows alone, by their indices: the ones that run, whose states are `z`."""
        self._samples = rows if self._samples is None else self._samples.index_select(0, rows)
        self._tolerance = self._tolerance.select(rows, problem)
        self._best_z = z if self._best_z is self._z else self._best_z.index_select(0, rows)
        self._z = z
        norm = self._norm.index_select(0, rows)
        self._best = norm if self._best is self._norm else self._best.index_select(0, rows)
        self._norm = norm
        self._fallen = self._fallen.index_select(0, rows)
        self._far, self._trusted = None, -1
        self.active = None

    def spread(self, norm: Tensor) -> Tensor:
        """Norms of the rows at hand as norms of all samples, in the unit of the tolerance."""
        norm = norm if self._samples is None else self._settled.index_copy(0, self._samples, norm)
        return norm * self._tolerance.unit

    def current(self, norm: Tensor) -> Tensor:
        """What the residuals of all samples have come to, given those of the rows at hand."""
        if self.active is not None:
            norm = torch.where(self.active, norm, self._of(self._settled))
        return self.spread(norm)

    def enter(self, step: int, z: Tensor, evaluation: Evaluation, norm: Tensor, failure: Tensor | None) -> None:
        """Take note of the iterate after `step`."""
        self._step, self._z = step, z
        look = step - self._looked >= self._patience
        simple = failure is None and self.active is None
        # The usual case: nobody is done, no residual rose, and the new iterate is the best one. NaN equals nothing,
        # and no limit is zero, so that a residual of zero is not overlooked.
        usual, limit = simple and self._is_far(norm), None
        if not usual:
            limit = self._tolerance.limit(evaluation, self._fallen)
            usual = simple and torch.equal(norm, norm.clamp(limit, self._best))
            if usual and self._trusted == 0:
                self._trust(limit)
        if usual:
            self._best_z, self._best, self._norm = z, norm, norm
            if look:
                self._settle(z, norm, self._look(step, norm))
            return
        assert limit is not None
        within = norm < limit
        if self._tolerance.asks_more:
            candidates = within if self.active is None else within & self.active
            if bool(candidates.any()):
                within = within & self._tolerance.confirmed(z, evaluation, norm)
        better = norm <= self._best
        quiet = better if self.active is None else better | ~self.active
        if failure is None and bool(quiet.all()):
            # No residual rose: the new iterate is the best one, nothing to sort out.
            self._best_z, self._best = z, norm
            finished = within if self.active is None else within & self.active
            self._end(finished.nonzero()[:, 0], z, norm, None)
            if look and self.left:
                self._settle(z, norm, self._look(step, norm))
        else:
            failed = self._sort_out(z, norm, better, failure)
            if look:
                failed = torch.where(failed == _RUNNING, self._look(step, norm), failed)
            self._settle(z, norm, torch.where(within, int(Status.CONVERGED), failed))
        self._norm = norm

    def _trust(self, limit: Tensor) -> None:
        """Rely for some looks on the tolerance, `(B,)`, not to become much larger: it takes a pass over the state."""
        self._far, self._trusted = _FAR * limit, _TRUSTED

    def _is_far(self, norm: Tensor) -> bool:
        """Whether no residual rose, and none is near the tolerance as it was last seen; if not, look no more."""
        if self._far is None or not self._trusted:
            return False
        self._trusted -= 1
        far = torch.equal(norm, norm.clamp(self._far, self._best))
        if not far:
            self._far, self._trusted = None, -1
        return far

    def _of(self, whole: Tensor) -> Tensor:
        """Of the rows at hand."""
        return whole if self._samples is None else whole.index_select(0, self._samples)

    def _put(self, whole: Tensor, rows: Tensor) -> Tensor:
        """`whole`, with the values of the rows at hand."""
        return rows if self._samples is None else whole.index_copy(0, self._samples, rows)

    def _settle(self, z: Tensor, norm: Tensor, status: Tensor) -> None:
        """Settle what the rows return that run and whose `status` is no longer `_RUNNING`."""
        ended = status != _RUNNING
        if self.active is not None:
            ended &= self.active
        rows = ended.nonzero()[:, 0]
        if rows.numel():
            converged = status == int(Status.CONVERGED)
            self._failures = self._failures or not bool(converged[rows].all())
            value = torch.where(converged[:, None], z, self._best_z)
            self._end(rows, value, torch.where(converged, norm, self._best), status)

    def _end(self, rows: Tensor, z: Tensor, norm: Tensor, status: Tensor | None) -> None:
        """Some rows, by their indices, end here with this value, residual norm and status; None is CONVERGED."""
        count, everyone = rows.numel(), self._norm.numel()
        if not count:
            return
        samples = rows if self._samples is None else self._samples
        self.together = status is None and count == everyone and self._samples is None
        if count < everyone:
            samples = rows if self._samples is None else self._samples.index_select(0, rows)
            z, norm = z.index_select(0, rows), norm.index_select(0, rows)
            status = None if status is None else status.index_select(0, rows)
            if self.active is None:
                self.active = torch.ones_like(self._norm, dtype=torch.bool)
            self.active.index_fill_(0, rows, False)
        self._settled_z.index_copy_(0, samples, z)
        self._settled.index_copy_(0, samples, norm)
        self._ended.index_fill_(0, samples, self._step)
        if status is not None:
            self._status.index_copy_(0, samples, status)
        self.left -= count

    def _sort_out(self, z: Tensor, norm: Tensor, better: Tensor, failure: Tensor | None) -> Tensor:
        """Keep the best iterate; returns the failure status of each sample, `_RUNNING` for none."""
        before = self._of(self._peak)
        peak = torch.fmax(before, norm)
        if self.active is not None:
            peak = torch.where(self.active, peak, before)
        self._peak, self._fallen, self._risen = self._put(self._peak, peak), self._tolerance.fallen(peak), True
        self._best_z = torch.where(better[:, None], z, self._best_z)
        self._best = torch.where(better, norm, self._best)
        failed = torch.where(norm > _DIVERGENCE * self.first, int(Status.DIVERGED), _RUNNING)
        # A sample that was running away overflowed; one that was not met a hole in fn's domain.
        nonfinite = torch.where(self._norm > _GROWN * self._best, int(Status.DIVERGED), int(Status.NONFINITE))
        failed = torch.where(norm.isfinite(), failed, nonfinite)
        return failed if failure is None else torch.where(failure >= 0, failure, failed)

    def _look(self, step: int, norm: Tensor) -> Tensor:
        """Who has stalled: whose best residual is hardly better than at the last look, `patience` steps ago."""
        stuck = ~(self._best < self._progress * self._of(self._reference))
        self._reference, self._looked = self._put(self._reference, self._best), step
        kind = torch.where(norm > _GROWN * self._best, int(Status.DIVERGED), int(Status.STALLED))
        return torch.where(stuck, kind, _RUNNING)

    def close(self, problem: Problem, history: list[Tensor] | None) -> Outcome:
        """The final word on every sample."""
        if self.left:
            unfinished = torch.full_like(self._norm, int(Status.MAX_STEPS), dtype=torch.long)
            self._settle(self._z, self._norm, unfinished)
        z, residual, status = self._settled_z, self._settled, self._status
        peak = self._peak
        clean = not self._failures
        credible = None
        if self._step or self._later:
            fallen = self._whole.fallen(peak) if self._risen else self._fallen_at_first
            credible = self._whole.credible(problem, z, fallen)
        if credible is not None and not bool(credible.all()):
            moved = self._ended > (-1 if self._later else 0)
            doubtful = (status == int(Status.CONVERGED)) & moved & ~credible
            status = torch.where(doubtful, int(Status.DIVERGED), status)
            clean = False
        finite = residual < torch.inf
        if self._failures:
            spent = (status == int(Status.MAX_STEPS)) | (status == int(Status.STALLED))
            if bool(spent.any()):
                found = problem.evaluate(z)
                reached = spent & self._whole.reached(problem, z, residual, found, peak)
                status = torch.where(reached, int(Status.CONVERGED), status)
            # Nothing non-finite leaves the library, not even a start that was not finite.
            z = torch.where(z.isfinite(), z, 0.0)
            residual = torch.where(finite, residual, torch.inf)
        residual = residual * self._whole.unit
        trace = None
        if history is not None:
            rows = torch.stack(history) if history else residual.new_zeros(0, residual.numel())
            after = torch.arange(1, len(rows) + 1, device=rows.device)[:, None] > self._ended
            trace = torch.where(after, residual, rows)
        return Outcome(z, residual, status, self._ended, trace, finite, clean)
