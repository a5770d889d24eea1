"""The loop's books as tensors alone: what `Books` (which see) decides by looking at values, decided by `where`."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._books import _DIVERGENCE, _GROWN, _RUNNING
from .._solution import Status
from ._equation import Evaluated, TracedEquation, scalar


class Pace(NamedTuple):
    """When a sample is given up.

    Attributes:
        patience: steps between two looks at its progress.
        progress: factor below which its best norm must have fallen in that time, `()`.
        divergence: growth of the norm over the initial one that counts as divergence, `()`.
        grown: growth over the best one that tells a sample on its way out from one that hovers, `()`.
    """

    patience: int
    progress: Tensor
    divergence: Tensor
    grown: Tensor

    @staticmethod
    def of(patience: int, progress: float, like: Tensor) -> "Pace":
        """From a solver's figures."""
        return Pace(patience, scalar(progress, like), scalar(_DIVERGENCE, like), scalar(_GROWN, like))


class Ledger(NamedTuple):
    """What is known of each sample, `(B,)` or `(B, n)`; new at every entry.

    Attributes:
        z: what it returns, once it is settled.
        norm: of the residual there.
        status: members of `Status`, or `_RUNNING`.
        ended: steps taken when it was settled.
        best_z: the best iterate so far.
        best: the norm there.
        peak: the largest norm so far.
        latest: the norm at the last entry.
        reference: the best norm at the last look at its progress.
        looked: when that was, `()`.
    """

    z: Tensor
    norm: Tensor
    status: Tensor
    ended: Tensor
    best_z: Tensor
    best: Tensor
    peak: Tensor
    latest: Tensor
    reference: Tensor
    looked: Tensor

    @property
    def active(self) -> Tensor:
        """Which samples run."""
        return self.status == _RUNNING


def opened(equation: TracedEquation) -> Ledger:
    """The books at the start: who is done before the first step."""
    z, value = equation.start
    norm = equation.first
    status = torch.where(norm < equation.limit(value, None), int(Status.CONVERGED), _RUNNING)
    status = torch.where(norm.isfinite(), status, int(Status.NONFINITE))
    best = torch.where(norm.isnan(), torch.inf, norm)
    zero = torch.zeros_like(status)
    # Copies: no two of what a loop carries may be the same tensor.
    return Ledger(
        z=z.clone(),
        norm=norm.clone(),
        status=status,
        ended=zero,
        best_z=z.clone(),
        best=best,
        peak=norm.clone(),
        latest=norm.clone(),
        reference=best.clone(),
        looked=torch.zeros((), dtype=torch.long, device=z.device),
    )


def entered(
    equation: TracedEquation,
    books: Ledger,
    step: Tensor,
    at: Evaluated,
    failure: Tensor | None,
    pace: Pace,
) -> Ledger:
    """The books after `step`, `()`, that led to the states and values `at`.

    Args:
        equation: what is solved.
        books: as they were.
        step: taken so far.
        at: the iterates and fn there.
        failure: a failure `Status` of the solver's per sample, or `_RUNNING`; None if it has none.
        pace: when a sample is given up.
    """
    z, value = at
    active = books.active
    norm = equation.norm(equation.residual(at))
    within = norm < equation.limit(value, equation.fallen(books.peak))
    if equation.asks_more:
        within = within & equation.confirmed(at, norm)
    better = norm <= books.best
    best_z, best = torch.where(better[:, None], z, books.best_z), torch.where(better, norm, books.best)
    peak = torch.where(active & (norm > books.peak), norm, books.peak)
    failed = torch.where(norm > pace.divergence * equation.first, int(Status.DIVERGED), _RUNNING)
    # A sample that was running away overflowed; one that was not met a hole in fn's domain.
    nonfinite = torch.where(books.latest > pace.grown * best, int(Status.DIVERGED), int(Status.NONFINITE))
    failed = torch.where(norm.isfinite(), failed, nonfinite)
    if failure is not None:
        failed = torch.where(failure != _RUNNING, failure, failed)
    look = step - books.looked >= pace.patience
    stalled = torch.where(norm > pace.grown * best, int(Status.DIVERGED), int(Status.STALLED))
    stuck = look & ~(best < pace.progress * books.reference) & (failed == _RUNNING)
    failed = torch.where(stuck, stalled, failed)
    status = torch.where(active, torch.where(within, int(Status.CONVERGED), failed), books.status)
    ends = active & (status != _RUNNING)
    return Ledger(
        z=torch.where(ends[:, None], torch.where(within[:, None], z, best_z), books.z),
        norm=torch.where(ends, torch.where(within, norm, best), books.norm),
        status=status,
        ended=torch.where(ends, step, books.ended),
        best_z=best_z,
        best=best,
        peak=peak,
        latest=norm,
        reference=torch.where(look, best, books.reference),
        looked=torch.where(look, step, books.looked),
    )


def closed(equation: TracedEquation, books: Ledger, step: Tensor) -> Ledger:
    """The final word on every sample; norms are those of residuals evaluated at what is returned."""
    active = books.active
    z = torch.where(active[:, None], books.best_z, books.z)
    norm = torch.where(active, books.best, books.norm)
    ended = torch.where(active, step, books.ended)
    status = torch.where(active, int(Status.MAX_STEPS), books.status)
    converged = status == int(Status.CONVERGED)
    doubtful = converged & (ended > 0) & ~equation.credible(z, equation.fallen(books.peak))
    spent = (status == int(Status.MAX_STEPS)) | (status == int(Status.STALLED))
    status = torch.where(doubtful, int(Status.DIVERGED), status)
    z = torch.where(z.isfinite(), z, 0.0)
    at = z, equation.value(z)
    reached = spent & equation.reached(at, norm, books.peak)
    status = torch.where(reached, int(Status.CONVERGED), status)
    norm = torch.where(norm < torch.inf, norm, torch.inf)
    return books._replace(z=z, norm=norm, status=status, ended=ended)
