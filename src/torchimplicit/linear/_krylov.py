"""The frame of the Krylov solvers: cycles, each from a recomputed residual, on the samples that still need one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._preconditioner import Checked, Preconditioner
from ._solver import LinearOperator, LinearSolution

_GAIN = 0.99
"""A cycle that leaves more than this of the residual has stagnated, and so will the next one."""

_WORTHWHILE = 8192
"""Entries `(rows, n)` from which on it pays to take rows out: below that, an operation costs the same for one row."""


@dataclass(eq=False, repr=False)
class Rows:
    """The samples that a cycle works on, the first dim of every tensor here. A cycle updates them in place.

    Attributes:
        operator: `A` of each.
        precondition: `p ↦ M⁻¹ p`; None is the identity.
        value: `x` so far, `(rows, n)`.
        residual: `b − A x`, `(rows, n)`.
        norm: of the residual, `(rows,)`.
        target: what the norm is to come down to; infinite for a row that rests.
        steps: taken, over all cycles.
        singular: whether the matrix has shown itself singular.
        limit: steps that each row may take in this cycle; None if that is the same for all.
        parent: the rows that these were selected from, and go back to.
        samples: which of the parent's they are, by their indices.
    """

    operator: LinearOperator
    precondition: Checked | None
    value: Tensor
    residual: Tensor
    norm: Tensor
    target: Tensor
    steps: Tensor
    singular: Tensor
    limit: Tensor | None = None
    parent: "Rows | None" = None
    samples: Tensor | None = None

    def apply(self, p: Tensor) -> Tensor:
        """`M⁻¹ p`."""
        return p if self.precondition is None else self.precondition(p)

    def rest(self, taken: int) -> None:
        """Rows that may take no more than `taken` steps rest from now on."""
        if self.limit is not None:
            self.target = self.target.masked_fill(self.limit <= taken, torch.inf)

    def may_shrink(self, count: int) -> bool:
        """Whether to go on with `count` of the rows alone: at most half of many, and the preconditioner can."""
        few = 2 * count <= self.norm.shape[0] and self.value.numel() >= _WORTHWHILE
        return few and (self.precondition is None or self.precondition.splits)

    def select(self, left: Tensor) -> "Rows":
        """Some of the rows, by their indices."""
        parts = (self.value, self.residual, self.norm, self.target, self.steps, self.singular)
        return Rows(
            self.operator.select(left),
            None if self.precondition is None else self.precondition.select(left),
            *(part.index_select(0, left) for part in parts),
            limit=None if self.limit is None else self.limit.index_select(0, left),
            parent=self,
            samples=left,
        )

    def back(self) -> "Rows":
        """The rows that these were selected from, with what has become of these."""
        parent, samples = self.parent, self.samples
        assert parent is not None
        assert samples is not None
        for name in ("value", "residual", "norm", "steps", "singular"):
            setattr(parent, name, getattr(parent, name).index_copy(0, samples, getattr(self, name)))
        return parent

    def back_to(self, whole: "Rows") -> None:
        """Back to the rows that a cycle was given."""
        rows = self
        while rows is not whole:
            rows = rows.back()


Cycle = Callable[[Rows, int, int], None]
"""Takes steps, at most the given number, until no row is above its target; last comes the number of earlier cycles.

It leaves `value`, `residual` and `norm` as they have become, adds the `steps` that each row took, and says which rows
were found `singular`. A row whose norm is within its target, the infinite one of a row that rests too, is not touched.
"""


def solve_in_cycles(
    cycle: Cycle,
    operator: LinearOperator,
    b: Tensor,
    rtol: float | Tensor,
    verify: bool,
    *,
    max_steps: int,
    preconditioner: Preconditioner | None,
    spare: int = 0,
    rise: float = 1.0,
) -> LinearSolution:
    """Solve `A x = b`, `b` `(B, n)` of moderate size or zero, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample.

    A sample goes into cycle after cycle while it is above its tolerance, its steps are not used up, and the last cycle
    made progress; it has its own count of steps, so that how the others fare does not matter to it.

    Args:
        cycle: the method.
        operator: `A`.
        b: right-hand sides.
        rtol: one tolerance, or one per sample.
        verify: judge by the residual of the value, recomputed after each cycle, and not by the updated one.
        max_steps: of each sample, over all cycles.
        preconditioner: the solver's option.
        spare: cycles that need not make progress.
        rise: a cycle that ends with no less than this times the residual that it began with is undone, so that no
            value is worse than x = 0.
    """
    size = two(b)
    target = rtol * size
    none = torch.zeros_like(size, dtype=torch.long)
    precondition = Checked.build(preconditioner, operator)
    batch = Rows(operator, precondition, torch.zeros_like(b), b, size, target, none.clone(), none.bool())
    active = size > target
    count, length, taken, limit = int(torch.count_nonzero(active)), max_steps, 0, None
    while count:
        value, residual, previous = batch.value, batch.residual, batch.norm
        batch.target = target if count == b.shape[0] else torch.where(active, target, torch.inf)
        batch.limit = limit
        rows = batch.select(active.nonzero()[:, 0]) if batch.may_shrink(count) else batch
        cycle(rows, length, taken)
        taken += 1
        if verify:
            wanted = b if rows.samples is None else b.index_select(0, rows.samples)
            rows.residual = wanted - rows.operator.mv(rows.value)
            rows.norm = two(rows.residual)
        rows.back_to(batch)
        within = batch.norm <= target
        if bool(within.all()):
            return LinearSolution(batch.value, none, _relative(batch.norm, size), batch.steps, True)
        # What has gone wrong is undone, unless what it met is the matrix's own NaN.
        lost, finite = ~(batch.norm < rise * previous), batch.norm.isfinite()
        if not bool(finite.all()):
            lost &= finite | operator.mv(b).isfinite().all(dim=1)
        batch.value = torch.where(lost[:, None], value, batch.value)
        batch.residual = torch.where(lost[:, None], residual, batch.residual)
        batch.norm = torch.where(lost, previous, batch.norm)
        active = (batch.norm > target) & ~batch.singular & (batch.steps < max_steps)
        if taken > spare:
            active &= batch.norm < _GAIN * previous
        left = max_steps - batch.steps
        bounds = (active.sum(), left.masked_fill(~active, 0).amax(), left.masked_fill(~active, max_steps).amin())
        count, length, least = torch.stack(bounds).tolist()
        limit = None if least == length else left
    return _report(batch, size, target, max_steps)


def _relative(norm: Tensor, size: Tensor) -> Tensor:
    return norm / size.clamp_min(torch.finfo(size.dtype).tiny)


def _report(batch: Rows, size: Tensor, target: Tensor, max_steps: int) -> LinearSolution:
    status = torch.where(batch.steps < max_steps, int(Status.STALLED), int(Status.MAX_STEPS))
    status = torch.where(batch.singular, int(Status.SINGULAR), status)
    status = torch.where(batch.norm <= target, int(Status.CONVERGED), status)
    finite = batch.norm.isfinite() & batch.value.isfinite().all(dim=1)
    status = torch.where(finite, status, int(Status.NONFINITE))
    usable = status < int(Status.DIVERGED)
    # Without a usable value the answer is x = 0, whose residual is b.
    relative = torch.where(usable, _relative(batch.norm, size), torch.where(finite, 1.0, torch.inf))
    value = torch.where(usable[:, None], batch.value, 0.0)
    return LinearSolution(value, status, relative, batch.steps, not bool(status.any()))
