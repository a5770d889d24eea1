"""The loop's books: who runs, the best finite iterate of each sample, and what it returns when it is settled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._problem import Evaluation, Problem
from ._solution import Status
from ._tolerance import Tolerance
from .linear import Inverse
from .solvers import Stage

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
        clean: whether every sample converged, known to the host.
        inverse: what the solver knows of `A⁻¹` at `z`, where it was asked for.
    """

    z: Tensor
    residual: Tensor
    status: Tensor
    steps: Tensor
    trace: Tensor | None
    finite: Tensor
    clean: bool
    inverse: Inverse | None = None


class Books:
    """Per-sample bookkeeping: who runs, the best finite iterate, and what each sample returns.

    Fields of the loop have the rows at hand first, what is settled the whole batch.

    Attributes:
        active: bool, the rows that run; None while all do.
        left: how many run.
        first: the residual's norm at the start, of the rows at hand.
    """

    def __init__(
        self, tolerance: Tolerance, stage: Stage, z: Tensor, evaluation: Evaluation, norm: Tensor, only: Tensor | None
    ) -> None:
        solver = stage.solver
        self._patience = solver.patience if stage.patience is None else stage.patience
        self._progress = solver.progress if stage.progress is None else stage.progress
        self._tolerance = self._whole = tolerance
        self._step = 0
        self._norm = self.first = self._peak = norm
        # The start of a later stage is an iterate like any other: what it must have fallen from is where all began.
        self._later = only is not None
        if self._later:
            self._peak = torch.fmax(norm, tolerance.first)
        self._z = self._best_z = z
        self._best = norm
        self._reference, self._looked = self._best, 0
        self._samples: Tensor | None = None
        self._settled_z, self._settled, self._settled_peak = z.clone(), norm.clone(), norm.clone()
        self._ended = torch.zeros_like(norm, dtype=torch.long)
        self._status = torch.full_like(self._ended, _RUNNING)
        self._failures = False
        self.active = only
        self.left = norm.numel()
        if only is not None:
            self.active, self.left = only.clone(), int(only.sum())
            self._status = torch.where(only, _RUNNING, int(Status.CONVERGED))
        limit = tolerance.limit(evaluation, self._peak if self._later else None)
        if not bool(((norm > limit) & (norm < torch.inf)).all()):
            self._best = self._reference = torch.where(norm.isnan(), torch.inf, norm)
            within = norm <= limit
            if self._later and tolerance.asks_more:
                within &= tolerance.confirmed(z, evaluation, norm)
            status = torch.where(within, int(Status.CONVERGED), _RUNNING)
            self._settle(z, norm, torch.where(norm.isfinite(), status, int(Status.NONFINITE)))

    def worth_keeping(self, crowd: float) -> Tensor | None:
        """Indices of the rows that run, once there are `crowd` times as many at hand; else None."""
        if self.active is None or not 0 < crowd * self.left <= self._norm.numel():
            return None
        return self.active.nonzero()[:, 0]

    def select(self, rows: Tensor, problem: Problem) -> None:
        """Go on with some rows alone, by their indices: the ones that run."""
        self._samples = rows if self._samples is None else self._samples.index_select(0, rows)
        self._tolerance = self._tolerance.select(rows, problem)
        same = {"_best_z": self._best_z is self._z, "_best": self._best is self._norm}
        for name in ("_norm", "first", "_peak", "_z", "_best_z", "_best", "_reference"):
            if not same.get(name):
                setattr(self, name, getattr(self, name).index_select(0, rows))
        if same["_best_z"]:
            self._best_z = self._z
        if same["_best"]:
            self._best = self._norm
        self.active = None

    def spread(self, norm: Tensor) -> Tensor:
        """Norms of the rows at hand as norms of all samples."""
        return norm if self._samples is None else self._settled.index_copy(0, self._samples, norm)

    def current(self, norm: Tensor) -> Tensor:
        """What the residuals of all samples have come to, given those of the rows at hand."""
        return torch.where(self._status == _RUNNING, self.spread(norm), self._settled)

    def enter(self, step: int, z: Tensor, evaluation: Evaluation, norm: Tensor, failure: Tensor | None) -> None:
        """Take note of the iterate after `step`."""
        self._step, self._z = step, z
        within = norm <= self._tolerance.limit(evaluation, self._peak)
        if self._tolerance.asks_more:
            candidates = within if self.active is None else within & self.active
            if bool(candidates.any()):
                within = within & self._tolerance.confirmed(z, evaluation, norm)
        better = norm <= self._best
        look = step - self._looked >= self._patience
        quiet = better if self.active is None else better | ~self.active
        if failure is None and not look and bool(quiet.all()):
            # The usual case, no residual rose: the new iterate is the best one, nothing to sort out.
            self._best_z, self._best = z, norm
            finished = within if self.active is None else within & self.active
            rows = finished.nonzero()[:, 0]
            if rows.numel():
                self._end(rows, z, norm, int(Status.CONVERGED))
        else:
            failed = self._sort_out(z, norm, better, failure)
            if look:
                failed = torch.where(failed == _RUNNING, self._look(step, norm), failed)
            self._settle(z, norm, torch.where(within, int(Status.CONVERGED), failed))
        self._norm = norm

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

    def _end(self, rows: Tensor, z: Tensor, norm: Tensor, status: Tensor | int) -> None:
        """Some rows, by their indices, end here with this value, residual norm and status."""
        samples = rows if self._samples is None else self._samples.index_select(0, rows)
        self._settled_z.index_copy_(0, samples, z.index_select(0, rows))
        self._settled.index_copy_(0, samples, norm.index_select(0, rows))
        self._settled_peak.index_copy_(0, samples, self._peak.index_select(0, rows))
        self._ended.index_fill_(0, samples, self._step)
        if isinstance(status, Tensor):
            self._status.index_copy_(0, samples, status.index_select(0, rows))
        else:
            self._status.index_fill_(0, samples, status)
        if self.active is None:
            self.active = torch.ones_like(norm, dtype=torch.bool)
        self.active.index_fill_(0, rows, False)
        self.left -= rows.numel()

    def _sort_out(self, z: Tensor, norm: Tensor, better: Tensor, failure: Tensor | None) -> Tensor:
        """Keep the best iterate; returns the failure status of each sample, `_RUNNING` for none."""
        self._peak = torch.fmax(self._peak, norm)
        self._best_z = torch.where(better[:, None], z, self._best_z)
        self._best = torch.where(better, norm, self._best)
        failed = torch.where(norm > _DIVERGENCE * self.first, int(Status.DIVERGED), _RUNNING)
        # A sample that was running away overflowed; one that was not met a hole in fn's domain.
        nonfinite = torch.where(self._norm > _GROWN * self._best, int(Status.DIVERGED), int(Status.NONFINITE))
        failed = torch.where(norm.isfinite(), failed, nonfinite)
        return failed if failure is None else torch.where(failure >= 0, failure, failed)

    def _look(self, step: int, norm: Tensor) -> Tensor:
        """Who has stalled: whose best residual is hardly better than at the last look, `patience` steps ago."""
        stuck = ~(self._best < self._progress * self._reference)
        self._reference, self._looked = self._best, step
        kind = torch.where(norm > _GROWN * self._best, int(Status.DIVERGED), int(Status.STALLED))
        return torch.where(stuck, kind, _RUNNING)

    def close(self, problem: Problem, history: list[Tensor] | None) -> Outcome:
        """The final word on every sample."""
        if self.left:
            unfinished = torch.full_like(self._norm, int(Status.MAX_STEPS), dtype=torch.long)
            self._settle(self._z, self._norm, unfinished)
        z, residual, status = self._settled_z, self._settled, self._status
        peak = self._settled_peak
        clean = not self._failures
        credible = self._whole.credible(problem, z, peak) if self._step or self._later else None
        if credible is not None and not bool(credible.all()):
            moved = self._ended > (-1 if self._later else 0)
            doubtful = (status == int(Status.CONVERGED)) & moved & ~credible
            status = torch.where(doubtful, int(Status.DIVERGED), status)
            clean = False
        finite = residual.isfinite()
        if self._failures:
            spent = (status == int(Status.MAX_STEPS)) | (status == int(Status.STALLED))
            if bool(spent.any()):
                found = problem.evaluate(z)
                reached = spent & self._whole.reached(problem, z, residual, found, peak)
                status = torch.where(reached, int(Status.CONVERGED), status)
            # Nothing non-finite leaves the library, not even a start that was not finite.
            z = torch.where(z.isfinite(), z, 0.0)
            residual = torch.where(finite, residual, torch.inf)
        trace = None
        if history is not None:
            rows = torch.stack(history) if history else residual.new_zeros(0, residual.numel())
            after = torch.arange(1, len(rows) + 1, device=rows.device)[:, None] > self._ended
            trace = torch.where(after, residual, rows)
        return Outcome(z, residual, status, self._ended, trace, finite, clean)
