"""Neumann series of a batch of systems: the cheapest step there is where `I − A` is a contraction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._solver import LinearOperator, LinearSolution, LinearSolver

_CHECK_EVERY = 6
_CROWD = 2
"""Samples that are done leave once no more than one row in so many is left."""


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """`x = Σₖ (I − A)ᵏ b` (Richardson's iteration with unit step), which converges where `ρ(I − A) < 1`.

    A step is one product, one addition and, every sixth time, one norm; GMRES needs fewer steps, but each costs
    several times as much beside the product. A sample whose residual does not fall by `slowest` per step, measured over
    `patience` looks at it, is given up as MAX_STEPS with what it has. Where the operator can be split, samples that are
    done leave the batch.

    Args:
        max_steps: products at most.
        slowest: factor per step that is still worth waiting for.
        patience: looks over which it is measured.
    """

    max_steps: int = 500
    slowest: float = 0.99
    patience: int = 2

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("max_steps", 1)
        self._require_number("slowest", 0.0, 1.0, inside=True)
        self._require_count("patience", 1)

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        size = two(b)
        target = rtol * size
        active = size > target
        left = int(active.sum())
        found = _Rows(torch.zeros_like(b), size.clone(), torch.zeros_like(size, dtype=torch.long))
        rows, samples = found, None
        rest, residual, reference, goal = operator, b, size, target
        zero = b.new_zeros(())
        taken = 0
        while left and taken < self.max_steps:
            # One addition in place a step; norms are looked at every few steps, always the same ones.
            for _ in range(min(_CHECK_EVERY, self.max_steps - taken)):
                rows.value += residual
                residual = rest.richardson(residual)
                taken += 1
            norm = two(residual)
            # NaN counts as above the goal. A row that has ended has no residual left, and its value stays.
            above = (norm <= goal).logical_not_()
            if taken % (_CHECK_EVERY * self.patience) == 0:
                above &= norm <= self.slowest ** (_CHECK_EVERY * self.patience) * reference
                reference = norm
            if taken >= self.max_steps:
                above = torch.zeros_like(above)
            going = int(above.sum())
            if going < left:
                ended = active & ~above
                rows.norm = torch.where(ended, norm, rows.norm)
                rows.steps.masked_fill_(ended, taken)
                active, left = above, going
                chosen = above.nonzero()[:, 0] if 0 < _CROWD * going <= norm.numel() else None
                smaller = None if chosen is None else rest.select(chosen)
                if chosen is None or smaller is None:
                    residual = torch.where(above[:, None], residual, zero)
                else:
                    # Few are left: go on with them alone.
                    rest = smaller
                    if samples is not None:
                        found.put(samples, rows)
                    samples = chosen if samples is None else samples.index_select(0, chosen)
                    rows = rows.select(chosen)
                    residual, active = residual.index_select(0, chosen), torch.ones_like(chosen, dtype=torch.bool)
                    reference, goal = reference.index_select(0, chosen), goal.index_select(0, chosen)
        if samples is not None:
            found.put(samples, rows)
        if verify and taken:
            found.norm = two(b - operator.mv(found.value))
        return _report(found, size, target)


@dataclass
class _Rows:
    """Solution, residual norm and steps of some samples; every tensor has them first."""

    value: Tensor
    norm: Tensor
    steps: Tensor

    def select(self, chosen: Tensor) -> "_Rows":
        """Some of the rows, by their indices."""
        return _Rows(*(t.index_select(0, chosen) for t in (self.value, self.norm, self.steps)))

    def put(self, samples: Tensor, rows: "_Rows") -> None:
        """Write rows back to the samples they are."""
        self.value.index_copy_(0, samples, rows.value)
        self.norm.index_copy_(0, samples, rows.norm)
        self.steps.index_copy_(0, samples, rows.steps)


def _report(found: _Rows, size: Tensor, target: Tensor) -> LinearSolution:
    within = found.norm <= target
    solved = bool(within.all())
    relative = found.norm / size.clamp_min(torch.finfo(size.dtype).tiny)
    if solved:
        return LinearSolution(found.value, torch.zeros_like(found.steps), relative, found.steps, True)
    finite = found.norm.isfinite()
    status = torch.where(within, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(finite, status, int(Status.NONFINITE))
    value = torch.where(finite[:, None], found.value, 0.0)
    return LinearSolution(value, status, torch.where(finite, relative, torch.inf), found.steps, False)
