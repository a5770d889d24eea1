"""Neumann series of a batch of systems: the cheapest step there is where `I − A` is a contraction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._solver import LinearOperator, LinearSolution, LinearSolver

_CHECK_EVERY = 4


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """`x = Σₖ (I − A)ᵏ b` (Richardson's iteration with unit step), which converges where `ρ(I − A) < 1`.

    A step is one product, one addition and, every fourth time, one norm; GMRES needs fewer steps, but each costs
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
    patience: int = 3

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("max_steps", 1)
        self._require_number("slowest", 0.0, 1.0, open_low=True)
        self._require_count("patience", 1)

    def solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool = True) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        size = two(b)
        target = rtol * size
        active = size.isfinite() & (size > target)
        found = _Found(torch.zeros_like(b), size, torch.zeros_like(size, dtype=torch.long))
        rest, index = operator, active.nonzero()[:, 0]
        if index.numel() < b.shape[0]:
            b = torch.where(active[:, None], b, 0.0)
        run = _Run(torch.zeros_like(b), b, target, size, active, index.numel())
        samples: Tensor | None = None
        taken = 0
        while run.left and taken < self.max_steps:
            # One addition in place a step; norms are looked at every few steps, always the same ones.
            for _ in range(min(_CHECK_EVERY, self.max_steps - taken)):
                run.value += run.residual
                run.residual = rest.richardson(run.residual)
                taken += 1
            norm = two(run.residual)
            # A sample that has ended has no residual left here; NaN counts as above the target.
            above = (norm <= run.target).logical_not_()
            if taken % (_CHECK_EVERY * self.patience) == 0:
                above &= norm <= self.slowest ** (_CHECK_EVERY * self.patience) * run.reference
                run.reference = norm
            going = int(above.sum()) if taken < self.max_steps else 0
            if going < run.left:
                ended = run.active & ~above if going else run.active
                found.enter(ended, samples, run.value, norm, taken)
                run.residual = torch.where(above[:, None], run.residual, 0.0)
                run.active, run.left = above, going
                smaller = rest.select(above) if 0 < 2 * going <= norm.numel() else None
                if smaller is not None:
                    # Most are done: go on with the others alone.
                    rest = smaller
                    samples = above.nonzero()[:, 0] if samples is None else samples[above]
                    run = run.select(above)
        if verify and taken:
            found.norm = two(b - operator.mv(found.value))
        return _report(found.value, found.norm, size, target, found.steps)


@dataclass
class _Found:
    """What has been found of every sample: solution, residual norm and steps."""

    value: Tensor
    norm: Tensor
    steps: Tensor

    def enter(self, ended: Tensor, samples: Tensor | None, value: Tensor, norm: Tensor, taken: int) -> None:
        """Enter the samples that have ended; `samples` maps the rows at hand to the batch's."""
        if samples is None:
            self.value = torch.where(ended[:, None], value, self.value)
            self.norm = torch.where(ended, norm, self.norm)
            self.steps = torch.where(ended, taken, self.steps)
        else:
            rows = samples[ended]
            self.value[rows] = value[ended]
            self.norm[rows] = norm[ended]
            self.steps[rows] = taken


@dataclass
class _Run:
    """The samples still at hand; every tensor has them first."""

    value: Tensor
    residual: Tensor
    target: Tensor
    reference: Tensor
    active: Tensor
    left: int

    def select(self, chosen: Tensor) -> "_Run":
        return _Run(
            self.value[chosen],
            self.residual[chosen],
            self.target[chosen],
            self.reference[chosen],
            self.active[chosen],
            self.left,
        )


def _report(value: Tensor, final: Tensor, size: Tensor, target: Tensor, steps: Tensor) -> LinearSolution:
    status = torch.where(final <= target, int(Status.CONVERGED), int(Status.MAX_STEPS))
    finite = final.isfinite()
    status = torch.where(finite, status, int(Status.NONFINITE))
    relative = torch.where(size > 0, final / size, 0.0)
    return LinearSolution(
        torch.where(finite[:, None], value, 0.0), status, torch.where(finite, relative, torch.inf), steps
    )
