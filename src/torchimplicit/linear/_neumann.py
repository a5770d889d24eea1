"""Neumann series of a batch of systems: the cheapest step there is where `I − A` is a contraction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from .._refinement import ROUGH_SYSTEM, WORTH, Pace
from .._solution import Status
from ._operator import ResidualJacobian
from ._solver import LinearOperator, LinearSolution, LinearSolver

_TINY = torch.finfo(torch.float32).tiny
_BLOCK = 16
"""Products between two looks, at least, where each look costs two more."""


@dataclass(frozen=True, eq=False, repr=False)
class Neumann(LinearSolver):
    """`x = Σₖ (I − A)ᵏ b` (Richardson's iteration with unit step), which converges where `ρ(I − A) < 1`.

    A step is one product and one addition. After the first twelve, and then after every eight, the norms are looked
    at, samples that are done leave the batch, and the next step is as long as makes the residual least: by then little
    is left of it but the slowest mode, which that step removes if it is real (a minimal residual step; Saad 2003,
    §5.3.2).
    `GMRES` needs fewer steps, but each costs several times as much beside the product. A sample whose residual does not
    fall by `slowest` per step, measured over `patience` looks at it, is given up as STALLED; one that runs out of steps
    is MAX_STEPS. Either has what was summed for its value, or zero if that is no better.

    Args:
        max_steps: products at most.
        slowest: factor per step that is still worth waiting for.
        patience: looks over which it is measured.
        first_look: products before the norms are looked at for the first time.
        look_every: products from one look to the next; larger values save time where products are cheap.
        mixed_precision: in the adjoint solve of a layer in float32, solve roughly with products of fn's derivative in
            bfloat16 (recorded once more, under autocast), compute the residual in full, and again: an iterative
            refinement (Wilkinson 1963; Higham & Mary 2022, §5), as exact, where it converges, as without. Nothing
            changes where the device has no bfloat16 units.
    """

    max_steps: int = 500
    slowest: float = 0.99
    patience: int = 1
    first_look: int = 12
    look_every: int = 8
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("max_steps", 1)
        self._require_number("slowest", 0.0, 1.0, inside=True)
        self._require_count("patience", 1)
        self._require_count("first_look", 1)
        self._require_count("look_every", 1)
        self._require("mixed_precision", isinstance(self.mixed_precision, bool), "True or False")

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        size = two(b)
        target = rtol * size
        coarse = operator.coarse() if self.mixed_precision and isinstance(operator, ResidualJacobian) else None
        if coarse is not None:
            return self._refine(operator, coarse, b, size, target)
        return self._sum(operator, b, size, target, verify, self.first_look)

    def _refine(
        self, operator: LinearOperator, coarse: LinearOperator, b: Tensor, size: Tensor, target: Tensor
    ) -> LinearSolution:
        """Refine what sums in reduced precision come to; those in full finish what does not converge so."""
        found = _Found(torch.zeros_like(b), size, torch.zeros_like(size, dtype=torch.long))
        residual, pace = b, Pace()
        going = size > target
        while bool(going.any()):
            # Of the others nothing is asked.
            goal = torch.where(going, torch.maximum(ROUGH_SYSTEM * found.norm, target), found.norm)
            first = pace.products(float((goal / found.norm.clamp_min(_TINY)).min()))
            part = self._sum(coarse, residual, found.norm, goal, False, first)
            pace.note(float(torch.where(going, part.residual, 0.0).max()), int(part.steps.max()))
            value = found.value + part.value
            rest = b - operator.mv(value)
            norm = two(rest)
            found.steps += part.steps
            fell = going & (norm <= WORTH * found.norm)
            if bool(fell.all()):
                residual, found.value = rest, value
            else:
                residual = torch.where(fell[:, None], rest, residual)
                found.value = torch.where(fell[:, None], value, found.value)
            found.norm = torch.where(fell, norm, found.norm)
            going = fell & (found.norm > target)
        if bool((found.norm <= target).all()):
            return _report(found, size, target, self.max_steps)
        rest = self._sum(operator, residual, found.norm, target, True, self.first_look)
        found.value, found.steps = found.value + rest.value, found.steps + rest.steps
        found.norm = torch.where(rest.steps > 0, rest.residual * found.norm, found.norm)
        return _report(found, size, target, self.max_steps)

    def _sum(
        self, operator: LinearOperator, b: Tensor, size: Tensor, target: Tensor, verify: bool, first: int
    ) -> LinearSolution:
        """Sum the series until `‖b − A x‖ ≤ target`, where `size = ‖b‖`, both `(B,)`; look after the `first` terms."""
        found = _Found(torch.zeros_like(b), size.clone(), torch.zeros_like(size, dtype=torch.long))
        rows = _Rows(operator, None, b, size, target, size)
        left = (size > target).nonzero()[:, 0]
        divisible = getattr(operator, "divisible", True)
        least = _BLOCK if isinstance(operator, ResidualJacobian) and operator.quick else 1
        taken = looked = looks = 0
        if left.numel() < len(b):
            rows = rows.select(left) if divisible else rows.rest(size > target)
        while left.numel():
            # Norms are looked at every few steps, always the same ones.
            terms = min(max(self.look_every if taken else first, least), self.max_steps - taken)
            rows.advance(terms, first=not taken)
            taken += terms
            looks += 1
            # NaN is not above: what is found of such a row says what it is.
            above = rows.norm > rows.target
            if taken >= self.max_steps:
                above.zero_()
            elif looks == self.patience:
                above &= rows.norm <= self.slowest ** (taken - looked) * rows.reference
                rows.reference, looked, looks = rows.norm, taken, 0
            if rows.running is not None:
                above &= rows.running
            left = above.nonzero()[:, 0]
            if left.numel() < len(above):
                found.add(rows, taken)
                if left.numel():
                    rows = rows.select(left) if divisible else rows.rest(above)
        if verify and taken:
            found.norm = two(b - operator.mv(found.value))
        return _report(found, size, target, self.max_steps)


@dataclass(eq=False, repr=False)
class _Rows:
    """The samples that the iteration goes on with.

    Attributes:
        operator: `A` of each.
        sum: what has come to the solution since it was last added to what was found, `(rows, n)`; None for nothing.
        residual: what is left, `(rows, n)`.
        norm: of the residual, `(rows,)`.
        target: what the norm is to come down to, `(rows,)`.
        reference: the norm when its fall was last looked at, `(rows,)`.
        samples: which samples they are, by their indices; None for all.
        running: where rows that are done stay, those that are not; None while all run.
    """

    operator: LinearOperator
    sum: Tensor | None
    residual: Tensor
    norm: Tensor
    target: Tensor
    reference: Tensor
    samples: Tensor | None = None
    running: Tensor | None = None

    def advance(self, terms: int, first: bool) -> None:
        """That many steps, the first of which is of unit length only in the very beginning."""
        if not first:
            change = self.operator.mv(self.residual)
            length = _length(self.residual, change)
            if self.sum is None:
                self.sum = length * self.residual
            else:
                self.sum = torch.addcmul(self.sum, length, self.residual)
            self.residual = torch.addcmul(self.residual, length, change, value=-1)
            terms -= 1
        if terms:
            operator = self.operator
            step = operator.approach if isinstance(operator, ResidualJacobian) else operator.neumann
            total, self.residual = step(self.residual, terms)
            self.sum = total if self.sum is None else self.sum + total
        self.norm = two(self.residual)

    def select(self, left: Tensor) -> "_Rows":
        """Some of the rows, by their indices; their sums have been added to what was found."""
        norm = self.norm.index_select(0, left)
        return _Rows(
            self.operator.select(left),
            None,
            self.residual.index_select(0, left),
            norm,
            self.target.index_select(0, left),
            norm if self.reference is self.norm else self.reference.index_select(0, left),
            samples=left if self.samples is None else self.samples.index_select(0, left),
        )

    def rest(self, running: Tensor) -> "_Rows":
        """The same rows, of which only some run, `(rows,)` bool."""
        self.sum, self.running = None, running
        return self


@dataclass(eq=False, repr=False)
class _Found:
    """What is known of every sample: its solution `(B, n)`, its residual's norm and its steps `(B,)`."""

    value: Tensor
    norm: Tensor
    steps: Tensor

    def add(self, rows: _Rows, taken: int) -> None:
        """Take over what some rows have come to; those that go on will add to it."""
        assert rows.sum is not None
        if rows.running is not None:
            going = rows.running
            self.value = torch.where(going[:, None], self.value + rows.sum, self.value)
            self.norm = torch.where(going, rows.norm, self.norm)
            self.steps = torch.where(going, taken, self.steps)
        elif rows.samples is None:
            self.value, self.norm = self.value.add_(rows.sum), rows.norm
            self.steps.fill_(taken)
        else:
            self.value.index_add_(0, rows.samples, rows.sum)
            self.norm = self.norm.index_copy(0, rows.samples, rows.norm)
            self.steps.index_fill_(0, rows.samples, taken)


def _length(residual: Tensor, change: Tensor) -> Tensor:
    """Of the step along the residual that makes the next one smallest, `(rows, 1)`, where `change = A residual`."""
    square = torch.linalg.vecdot(change, change).clamp_min_(torch.finfo(change.dtype).tiny)
    return torch.linalg.vecdot(residual, change).div_(square)[:, None]


def _report(found: _Found, size: Tensor, target: Tensor, max_steps: int) -> LinearSolution:
    within = found.norm <= target
    solved = bool(within.all())
    relative = found.norm / size.clamp_min(torch.finfo(size.dtype).tiny)
    if solved:
        return LinearSolution(found.value, torch.zeros_like(found.steps), relative, found.steps, True)
    finite = found.norm.isfinite()
    status = torch.where(found.steps < max_steps, int(Status.STALLED), int(Status.MAX_STEPS))
    status = torch.where(within, int(Status.CONVERGED), status)
    status = torch.where(finite, status, int(Status.NONFINITE))
    value = torch.where((within | (found.norm < size))[:, None], found.value, 0.0)
    # x = 0 has the residual 1.
    return LinearSolution(value, status, torch.where(finite, relative.clamp_max(1.0), torch.inf), found.steps, False)
