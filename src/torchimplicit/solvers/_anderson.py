"""Anderson acceleration (type II) on an orthonormal history, with per-sample safeguard and restart."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._norms import two
from .._problem import Evaluation, Problem
from ._base import Solver, Step, hold

_LOOK = 4
"""Steps between two looks at whether acceleration pays; rests are multiples of it."""
_LEAST_GAIN = 0.1
"""Share of the fall of the residual (of its logarithm) that acceleration must have, relative to the map's own."""

_FAST = 0.25
"""Fall of the residual in the first step, below which acceleration is not begun with."""


@dataclass
class _History:
    """Differences of the last iterates of each sample, orthonormalised, in a ring of `m` rows; empty rows are zero.

    Attributes:
        pairs: rows `[q | w]`, `(A, m, 2n)`: `q` of the differences of r, `w` the same combination of `Δz + mixing·Δr`;
            of the samples that do not rest.
        gamma: `qᵀ r` of each row with the residual at the current iterate, `(A, m)`.
        norm: of that residual, `(B,)`.
        wait: plain steps to take before acceleration is tried again, after a refusal, `(B,)`.
        pause: length of the next wait, `(B,)`.
        rest: plain steps to take because acceleration did not pay, `(B,)`.
        longer: length of the next rest, `(B,)`.
        next: the row that the next difference overwrites.
        waiting: whether any sample waits.
        awake: the samples that do not rest, by their indices, `(A,)`; None while none does.
        plain: steps for which every sample that runs rests.
        taken: steps so far.
        rows: views of each row of the pairs.
        filled: how many rows have been written, and views of these: of the whole, and of the halves.
        pair: a row in the making, `(B, 2n)`, and its halves.
    """

    pairs: Tensor
    gamma: Tensor
    norm: Tensor
    wait: Tensor
    pause: Tensor
    rest: Tensor
    longer: Tensor
    next: int = 0
    waiting: bool = False
    awake: Tensor | None = None
    plain: int = 0
    taken: int = 0
    filled: int = 0
    rows: tuple[Tensor, ...] = field(init=False)
    known: tuple[Tensor, Tensor, Tensor] = field(init=False)
    pair: tuple[Tensor, Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Make the views, which every step needs, once."""
        batch, _, width = self.pairs.shape
        n = width // 2
        self.rows = self.pairs.unbind(1)
        self.view()
        pair = self.pairs.new_empty(batch, width)
        self.pair = pair, pair[:, :n], pair[:, n:]

    def take(self, t: Tensor) -> Tensor:
        """Of a tensor with a row for every sample those of the samples awake."""
        return t if self.awake is None else t.index_select(0, self.awake)

    def select(self, samples: Tensor) -> "_History":
        """The history of some samples alone, by their indices."""
        rows, awake = samples, None
        if self.awake is not None:
            place = torch.full_like(self.rest, -1)
            place.index_copy_(0, self.awake, torch.arange(len(self.awake), device=self.awake.device))
            place = place.index_select(0, samples)
            awake = (place >= 0).nonzero()[:, 0]
            rows = place.index_select(0, awake)
        return replace(
            self,
            pairs=self.pairs.index_select(0, rows),
            gamma=self.gamma.index_select(0, rows),
            norm=self.norm.index_select(0, samples),
            wait=self.wait.index_select(0, samples),
            pause=self.pause.index_select(0, samples),
            rest=self.rest.index_select(0, samples),
            longer=self.longer.index_select(0, samples),
            awake=awake,
        )

    def rouse(self, active: Tensor | None) -> Tensor | None:
        """Give a history to the samples that rest no more; which of them are new, `(A,)` bool, or None if none is."""
        before = self.awake
        fit = self.rest == 0
        now = (fit if active is None else fit & active).nonzero()[:, 0]
        self.awake = now if now.numel() < self.rest.numel() else None
        nobody = before is not None and not before.numel()
        if nobody or not self.filled:
            self.filled, self.next = 0, 0
            self.pairs = self.pairs.new_empty(now.numel(), *self.pairs.shape[1:])
            self.gamma = self.gamma.new_zeros(now.numel(), 0)
            self.__post_init__()
            return torch.ones_like(now, dtype=torch.bool) if nobody else None
        known = torch.ones_like(self.rest, dtype=torch.bool)
        place = torch.arange(known.numel(), device=known.device)
        if before is not None:
            known = torch.zeros_like(known).index_fill_(0, before, True)
            place = torch.zeros_like(place).index_copy_(0, before, place[: len(before)])
        known, place = known.index_select(0, now), place.index_select(0, now)
        self.pairs = torch.where(known[:, None, None], self.pairs.index_select(0, place), 0.0)
        self.gamma = torch.where(known[:, None], self.gamma.index_select(0, place), 0.0)
        self.__post_init__()
        return ~known

    def view(self) -> None:
        """Make the views of the rows that have been written."""
        known, n = self.pairs[:, : self.filled], self.pairs.shape[2] // 2
        self.known = known, known[:, :, :n], known[:, :, n:]


@dataclass(frozen=True)
class Anderson(Solver[_History]):
    """Anderson (1965) acceleration in the multisecant form of Walker & Ni (2011), eq. 2.2 (type II).

    With the last `m` differences `ΔR`, `ΔZ` as columns, `z ← z + β r − (ΔZ + β ΔR) γ`, `γ = argmin ‖r − ΔR γ‖`.

    1. Each new difference is made orthogonal to the history by Gram–Schmidt and both its halves are scaled to
       `‖q‖ = 1` (Tang, Xu, He, Saad & Xi 2024, "Anderson acceleration with truncated Gram–Schmidt"): `γ = Qᵀ r`, with
       no least-squares problem and nothing that has units. For a linear map with a symmetric Jacobian `m = 3` is as
       good as a history of everything: the steps are those of the conjugate residual method.
    2. A difference of which hardly anything is new is dropped: dependent columns are survived.
    3. Safeguard: a sample whose residual more than doubles in a step, or is no longer finite, goes back to where it
       was, drops its history, and takes 1, 4, 16, … plain steps before it is accelerated again: where plain steps
       converge, it does.
    4. `adaptive=True`: every fourth step it is measured, sample by sample, how much of the fall of the residual is due
       to the acceleration, `‖r − Q γ‖/‖r‖`, and how much to the map. Where that is less than a tenth the sample drops
       its history and rests from acceleration for 4, 8, 16, … steps: they cost nothing beside fn once all samples do.
       A sample whose first step cuts the residual to a quarter begins with a rest.

    Args:
        history: differences kept, `m`.
        mixing: β in (0, 2), the plain step's damping.
        drop_tolerance: the new part of a difference, relative to it, below which it is dropped; None is `√ε`.
        adaptive: whether to pause acceleration where it does not pay; `Auto` does.
    """

    history: int = 5
    mixing: float = 1.0
    drop_tolerance: float | None = None
    adaptive: bool = False

    max_steps: ClassVar[int] = 500
    patience: ClassVar[int] = 100

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_count("history", 1)
        self._require_number("mixing", 0.0, 2.0, inside=True)
        self._require_number("drop_tolerance", 0.0, 1.0, optional=True)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _History:
        """An empty history."""
        batch, n = z.shape
        m = min(self.history, max(n, 1))
        return _History(
            pairs=z.new_empty(batch, m, 2 * n),  # no row is read before it is written
            gamma=z.new_zeros(batch, 0),
            norm=two(evaluation.residual),
            wait=torch.zeros(batch, dtype=torch.long, device=z.device),
            pause=torch.ones(batch, dtype=torch.long, device=z.device),
            rest=torch.zeros(batch, dtype=torch.long, device=z.device),
            longer=torch.full((batch,), _LOOK, dtype=torch.long, device=z.device),
        )

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _History, active: Tensor | None, count: int
    ) -> Step[_History]:
        """One step, or as many plain ones as nobody looks at while everyone rests."""
        if not state.plain or problem.kind != "fixed_point" or self.mixing != 1.0:
            return self.step(problem, z, evaluation, state, active)
        count = min(count, state.plain)
        z, value = problem.repeat(evaluation.value, count)
        found = problem.evaluation(z, value)
        state.plain -= count
        state.taken += count
        state.rest = (state.rest - count).clamp_min_(0)
        state.norm = two(found.residual)
        return Step(z, found, state, count=count)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _History, active: Tensor | None
    ) -> Step[_History]:
        """One accelerated step of all samples: leaving some out would cost more than it saves."""
        residual = evaluation.residual
        if state.awake is not None and not state.plain and not state.filled:
            state.rouse(active)  # after steps in which everyone rested
        gamma, new_here = state.gamma, None
        resting = state.awake is not None or state.plain > 0
        state.taken += 1
        if state.waiting:
            gamma = torch.where(state.take(state.wait == 0)[:, None], gamma, 0.0)
            state.wait = (state.wait - 1).clamp_min(0)
        new = torch.add(z, residual, alpha=self.mixing)
        if state.filled and state.awake is None:
            new = torch.baddbmm(new[:, None], gamma[:, None], state.known[2], alpha=-1)[:, 0]
        elif state.filled and state.awake is not None:
            change = torch.bmm(gamma[:, None], state.known[2])[:, 0]
            new.index_add_(0, state.awake, change, alpha=-1)
        found = problem.evaluate(new)
        norm = two(found.residual)
        # Also true of NaN, in the residual or in the coefficients.
        refused = (norm <= 2.0 * state.norm).logical_not_()
        if bool(refused.any()):
            # At rest nothing matters, and a plain step is not taken back.
            if active is not None:
                refused &= active
            mine = state.take(refused) & (gamma != 0).any(dim=1)
            refused = mine if state.awake is None else torch.zeros_like(refused).index_copy_(0, state.awake, mine)
            keep = ~refused
            state.pairs[mine] = 0.0
            new, found = hold(keep, new, z), found.where(keep, evaluation)
            norm = torch.where(keep, norm, state.norm)
            state.wait = torch.where(keep, state.wait, state.pause)
            state.pause = torch.where(keep, state.pause, 4 * state.pause)
            state.waiting = True
        if resting:
            state.rest = (state.rest - 1).clamp_min_(0)
        if state.plain:
            state.plain -= 1
        else:
            if self.adaptive and (state.taken == 1 or state.taken % _LOOK == 0):
                new_here = _consider(state, gamma, norm, active)
            if not state.plain:
                parts = (state.take(t) for t in (z, residual, new, found.residual))
                self._remember(state, *parts, new_here=new_here)
        state.norm = norm
        return Step(new, found, state)

    def _remember(
        self, state: _History, z: Tensor, residual: Tensor, new: Tensor, found: Tensor, new_here: Tensor | None
    ) -> None:
        """Put a difference into the ring; one of length zero (a sample that was refused) leaves an empty row.

        So does one of a sample that has just been roused: the step was a plain one.
        """
        pair, dr, dz = state.pair
        torch.sub(found, residual, out=dr)
        torch.sub(new, z, out=dz)
        dz.add_(dr, alpha=self.mixing)
        n, slot = dr.shape[1], state.next
        length = two(dr)
        size, after = length.clone(), state.gamma
        if state.filled:
            known, q, _ = state.known
            after = torch.linalg.vecdot(q, found[:, None])
            # qᵀ Δr from what is known of both residuals; the oldest row is about to go.
            overlap = torch.sub(after, state.gamma)
            if slot < state.filled:
                overlap[:, slot] = 0.0
            pair = torch.baddbmm(pair[:, None], overlap[:, None], known, alpha=-1)[:, 0]
            size = two(pair[:, :n])
        drop = torch.finfo(dr.dtype).eps ** 0.5 if self.drop_tolerance is None else self.drop_tolerance
        row = state.rows[slot]
        size.masked_fill_(size <= drop * length, torch.inf)
        if new_here is not None:
            size.masked_fill_(new_here, torch.inf)
        torch.div(pair, size[:, None], out=row)
        newest = torch.linalg.vecdot(row[:, :n], found)
        if slot < state.filled:
            after[:, slot] = newest
        else:
            after = torch.cat((after, newest[:, None]), dim=1)
            state.filled += 1
            state.view()
        state.gamma = after
        state.next = (slot + 1) % len(state.rows)


def _consider(state: _History, gamma: Tensor, norm: Tensor, active: Tensor | None) -> Tensor | None:
    """Send the samples to rest for which the last step's acceleration did not pay, and rouse those that have rested.

    The step went from a residual of size `state.norm`, of which `g` was left by the acceleration, to `norm`: the map
    contracted by `c = norm / (g · state.norm)`. It pays if `ln g < 0.1 ln c`, both below 1. The first step has no
    history: after it only samples rest whose map contracts so fast that few steps are left.

    Returns:
        Which of the samples awake have just been roused, `(A,)` bool; None if none were.
    """
    before, after = state.take(state.norm), state.take(norm)
    share = torch.linalg.vecdot(gamma, gamma) / (before * before)
    left = (1.0 - share).clamp_min_(torch.finfo(norm.dtype).eps).sqrt_()
    contraction = after / (left * before)
    longer = state.take(state.longer)
    if state.taken == 1:
        idle, longer = contraction < _FAST, torch.full_like(longer, 2 * _LOOK - 1)
    else:
        idle = (contraction < 1.0) & (left.log() > _LEAST_GAIN * contraction.log()) & (gamma != 0).any(dim=1)
    tired = idle if state.awake is None else torch.zeros_like(norm, dtype=torch.bool).index_copy_(0, state.awake, idle)
    if state.awake is None and not bool(tired.any()):
        return None
    lengths = longer if state.awake is None else torch.zeros_like(state.rest).index_copy_(0, state.awake, longer)
    state.rest = torch.where(tired, lengths, state.rest)
    if state.taken > 1:
        state.longer = torch.where(tired, 2 * state.longer, state.longer)
    awake = (state.rest == 0) if active is None else active & (state.rest == 0)
    if bool(awake.any()):
        return state.rouse(active)
    resting = state.rest if active is None else state.rest[active]
    state.plain = int(resting.min())
    state.filled, state.next = 0, 0
    state.pairs, state.gamma = state.pairs[:0], state.gamma.new_zeros(0, 0)
    state.awake = torch.empty(0, dtype=torch.long, device=norm.device)
    state.__post_init__()
    return None
