"""Anderson acceleration (type II) on an orthonormal history, with per-sample safeguard and restart."""

from dataclasses import dataclass, field
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
        pairs: rows `[q | w]`, `(B, m, 2n)`: `q` of the differences of r, `w` the same combination of `Δz + mixing·Δr`.
        gamma: `qᵀ r` of each row with the residual at the current iterate, `(B, m)`.
        norm: of that residual, `(B,)`.
        wait: plain steps to take before acceleration is tried again, after a refusal, `(B,)`.
        pause: length of the next wait, `(B,)`.
        rest: plain steps to take because acceleration did not pay, `(B,)`.
        longer: length of the next rest, `(B,)`.
        next: the row that the next difference overwrites.
        waiting: whether any sample waits.
        resting: whether any sample rests.
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
    resting: bool = False
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
        residual, gamma = evaluation.residual, state.gamma
        rested = state.rest > 0 if state.resting else None
        state.taken += 1
        if state.waiting:
            gamma = torch.where((state.wait == 0)[:, None], gamma, 0.0)
            state.wait = (state.wait - 1).clamp_min(0)
        plain = torch.add(z, residual, alpha=self.mixing)
        new = plain
        if state.filled:
            new = torch.baddbmm(plain[:, None], gamma[:, None], state.known[2], alpha=-1)[:, 0]
        found = problem.evaluate(new)
        norm = two(found.residual)
        # Also true of NaN, in the residual or in the coefficients.
        refused = (norm <= 2.0 * state.norm).logical_not_()
        if bool(refused.any()):
            # At rest nothing matters, and a plain step is not taken back.
            refused &= (gamma != 0).any(dim=1)
            if active is not None:
                refused &= active
            keep = ~refused
            state.pairs[refused] = 0.0
            new, found = hold(keep, new, z), found.where(keep, evaluation)
            norm = torch.where(keep, norm, state.norm)
            state.wait = torch.where(keep, state.wait, state.pause)
            state.pause = torch.where(keep, state.pause, 4 * state.pause)
            state.waiting = True
        if state.plain:
            state.plain -= 1
        else:
            if self.adaptive and (state.taken == 1 or state.taken % _LOOK == 0):
                _consider(state, gamma, norm, active)
            if not state.plain:
                self._remember(state, z, residual, new, found.residual)
        if rested is not None:
            state.rest = state.rest - rested.to(state.rest.dtype)
        state.norm = norm
        return Step(new, found, state)

    def _remember(self, state: _History, z: Tensor, residual: Tensor, new: Tensor, found: Tensor) -> None:
        """Put a difference into the ring; one of length zero (a sample that was refused) leaves an empty row."""
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
        if state.resting:
            # A sample at rest has no history, whether or not others make one meanwhile.
            size.masked_fill_(state.rest > 0, torch.inf)
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


def _consider(state: _History, gamma: Tensor, norm: Tensor, active: Tensor | None) -> None:
    """Send the samples to rest for which the last step's acceleration did not pay.

    The step went from a residual of size `state.norm`, of which `g` was left by the acceleration, to `norm`: the map
    contracted by `c = norm / (g · state.norm)`. It pays if `ln g < 0.1 ln c`, both below 1. The first step has no
    history: after it only samples rest whose map contracts so fast that few steps are left.
    """
    share = torch.linalg.vecdot(gamma, gamma) / (state.norm * state.norm)
    left = (1.0 - share).clamp_min_(torch.finfo(norm.dtype).eps).sqrt_()
    contraction = norm / (left * state.norm)
    if state.taken == 1:
        idle = contraction < _FAST
        state.rest = torch.where(idle, 2 * _LOOK - 1, state.rest)
    else:
        idle = (contraction < 1.0) & (left.log() > _LEAST_GAIN * contraction.log()) & (gamma != 0).any(dim=1)
        state.rest = torch.where(idle, state.longer, state.rest)
        state.longer = torch.where(idle, 2 * state.longer, state.longer)
    tired = state.rest > 0
    state.resting = bool(tired.any())
    if not state.resting:
        return
    awake = ~tired if active is None else active & ~tired
    if bool(awake.any()):
        state.pairs[idle, : state.filled] = 0.0
        state.gamma = torch.where(tired[:, None], 0.0, state.gamma)
    else:
        resting = state.rest if active is None else state.rest[active]
        state.plain = int(resting.min())
        state.filled, state.next, state.gamma = 0, 0, state.gamma[:, :0]
        state.view()
