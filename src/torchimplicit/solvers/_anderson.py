"""Anderson acceleration (type II) on an orthonormal history, with per-sample safeguard and restart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from ..linear import Inverse, LowRank
from ._anderson_history import LOOK, History
from ._base import Solver, Step, hold

_FEW_FIRST, _FEW = 6, 8
"""Plain steps to the tolerance for which acceleration is not begun, after the first step, and again after a rest."""
_MOST = 0.75
"""Share of the samples that have a history, above which those that rest keep theirs, unused."""
_SMALL = 2**15
"""Entries of the state up to which they do in any case: to leave them out would cost more than it saves."""


@dataclass(frozen=True, eq=False, repr=False)
class Anderson(Solver[History]):
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
       to the acceleration, `‖r − Q γ‖/‖r‖`, and how much to the map. Where the share is too small the sample drops its
       history and rests from acceleration for 8, 16, … steps: they cost nothing beside fn once all samples rest. Where
       a few plain steps reach the tolerance acceleration is not begun at all.

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

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> History:
        """An empty history."""
        batch, n = z.shape
        m = min(self.history, max(n, 1))
        norm = evaluation.norm
        count = torch.zeros(batch, dtype=torch.long, device=z.device)
        return History(
            pairs=z.new_empty(batch, m, 2 * n),  # no row is read before it is written
            gamma=z.new_zeros(batch, 1, 0),
            residual=evaluation.residual[:, None],
            plain=self._plain(problem, z, evaluation)[:, None],
            norm=norm,
            wait=count,
            pause=torch.ones_like(count),
            rest=count.clone(),
            longer=torch.full_like(count, 4 * LOOK),
            seen=norm,
        )

    def _undamped(self, problem: Problem) -> bool:
        """Whether the plain step is fn itself."""
        return self.mixing == 1.0 and problem.kind == "fixed_point"

    def _plain(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> Tensor:
        """The plain step from z."""
        if self._undamped(problem):
            return evaluation.value
        return torch.add(z, evaluation.residual, alpha=self.mixing)

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: History, active: Tensor | None, count: int
    ) -> Step[History]:
        """One step, or as many plain ones as nobody looks at while everyone rests."""
        if state.taken >= state.asleep:
            return self.step(problem, z, evaluation, state, active)
        count = min(count, state.asleep - state.taken)
        if self._undamped(problem):
            z, value = problem.repeat(evaluation.value, count)
            found = problem.evaluation(z, value, norm_only=True)
        else:
            count, z = 1, self._plain(problem, z, evaluation)
            found = problem.evaluate(z)
        state.taken += count
        if state.taken == state.asleep:
            self._look(problem, state, z, found, None, active)
        return Step(z, found, state, count=count)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: History, active: Tensor | None
    ) -> Step[History]:
        """A step of all samples, accelerated for those awake: leaving some out would cost more than it saves."""
        gamma = state.gamma
        state.taken += 1
        if state.taken <= state.waiting:
            gamma = torch.where((state.take(state.wait) < state.taken)[:, None, None], gamma, 0.0)
        if not state.filled:
            new = self._plain(problem, z, evaluation)
        elif state.awake is None:
            new = torch.baddbmm(state.plain, gamma, state.known[2], alpha=-1)[:, 0]
        else:
            change = torch.bmm(gamma, state.known[2])[:, 0]
            new = self._plain(problem, z, evaluation).index_add(0, state.awake, change, alpha=-1)
        found = problem.evaluate(new)
        mine = found if state.awake is None else found.select(state.awake)
        norm = mine.norm
        # No residual rose, in the usual case; the minimum with NaN is NaN, which equals nothing.
        if not torch.equal(norm, norm.minimum(state.norm)) and not float((norm / state.norm).max()) <= 2.0:
            refused = (norm <= 2.0 * state.norm).logical_not_()
            # A plain step is not taken back.
            refused &= (gamma != 0).flatten(1).any(dim=1)
            if active is not None:
                refused &= state.take(active)
            if bool(refused.any()):
                new, found = self._take_back(state, refused, (z, new), (evaluation, found))
                mine = found if state.awake is None else found.select(state.awake)
                norm = torch.where(refused, state.norm, norm)
        if self.adaptive and state.taken == state.ahead:
            here = self._look(problem, state, new, found, (gamma, norm), active)
            if state.taken < state.asleep:
                return Step(new, found, state)
            if here is not None:
                self._remember(state, *here)
                return Step(new, found, state)
        plain = mine.value if self._undamped(problem) else self._plain(problem, state.take(new), mine)
        self._remember(state, mine.residual, plain, norm)
        return Step(new, found, state)

    def inverse(self, state: History) -> Inverse | None:
        """`mixing·I − Wᵀ Q`, which makes the accelerated step of the residual."""
        if state.awake is not None or not state.filled:
            return None
        known, n = state.known[0], state.plain.shape[2]
        scale = torch.full_like(state.norm, self.mixing)
        return LowRank(scale, -known[:, :, n:], known[:, :, :n])

    @staticmethod
    def _take_back(
        state: History, refused: Tensor, iterates: tuple[Tensor, Tensor], evaluations: tuple[Evaluation, Evaluation]
    ) -> tuple[Tensor, Evaluation]:
        """Let some of the samples awake, `(A,)` bool, be where they were, without a history, and wait."""
        state.pairs.masked_fill_(refused[:, None, None], 0.0)
        keep = state.spread(~refused, torch.ones_like(state.rest, dtype=torch.bool))
        state.wait = torch.where(keep, state.wait, state.taken + state.pause)
        state.pause = torch.where(keep, state.pause, 4 * state.pause)
        state.waiting = int(state.wait.max())
        return hold(keep, iterates[1], iterates[0]), evaluations[1].where(keep, evaluations[0])

    def _remember(self, state: History, residual: Tensor, plain: Tensor, norm: Tensor) -> None:
        """Put the difference to the iterate before into the ring; one of length zero leaves an empty row."""
        pair, dr, dw = state.pair
        slot = state.next
        residual, plain = residual[:, None], plain[:, None]
        torch.sub(residual, state.residual, out=dr)
        torch.sub(plain, state.plain, out=dw)
        if state.filled:
            overlap, columns = state.overlap
            torch.bmm(dr, state.known[1], out=overlap)
            if slot < state.filled:
                columns[slot].zero_()  # the oldest row is about to go
            pair.baddbmm_(overlap, state.known[0], alpha=-1)
        size = torch.linalg.vector_norm(dr, dim=2, keepdim=True)
        if state.filled:
            drop = torch.finfo(dr.dtype).eps ** 0.5 if self.drop_tolerance is None else self.drop_tolerance
            old = torch.linalg.vector_norm(overlap, dim=2, keepdim=True)
            empty = torch.sub(size, old, alpha=drop) <= 0.0
        else:
            empty = size <= 0.0
        if state.dozing is not None:
            empty |= state.dozing[:, None, None]
        torch.div(pair, size.masked_fill_(empty, torch.inf), out=state.rows[slot])
        if slot == state.filled:
            state.filled += 1
            state.view()
        state.gamma = torch.bmm(residual, state.known[1])
        state.next = (slot + 1) % len(state.rows)
        state.residual, state.plain, state.norm = residual, plain, norm

    def _look(
        self,
        problem: Problem,
        state: History,
        z: Tensor,
        evaluation: Evaluation,
        last: tuple[Tensor, Tensor] | None,
        active: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Send the samples to rest for which acceleration does not pay, and rouse those that have rested.

        It is not begun where a few plain steps suffice.

        Args:
            problem: the equation.
            state: with the samples awake in the last step.
            z: the iterate after it.
            evaluation: there.
            last: the step's coefficients and its norms of the residual, of the samples awake; None if all rested.
            active: the samples that run.

        Returns:
            If others are awake now than before: their residual, plain step, and norm of the residual.
        """
        taken = state.taken
        first = taken == 1
        tired = last is not None and state.judges and state.tire(*last)
        # Who could begin now: everyone after the first step, and those whose rest is over.
        ended = (state.rest == (0 if first else taken)).nonzero()[:, 0]
        norm = evaluation.norm
        scale = problem.scale(evaluation, two) if len(ended) else None
        if scale is not None:
            rtol = problem.epsilon ** (2 / 3) if self.rtol is None else self.rtol
            state.put_off(ended, norm, rtol * scale, _FEW_FIRST if first else _FEW)
        state.seen, state.looked = norm, taken
        state.look_ahead()
        if not tired and not len(ended) and active is None:
            return None
        running = state.rest if active is None else state.rest.masked_fill(~active, torch.iinfo(state.rest.dtype).max)
        awake = running <= taken
        rows, mine = awake.nonzero()[:, 0], state.take(awake)
        if not len(rows):
            state.asleep = int(running.min())
        here = evaluation.residual, self._plain(problem, z, evaluation), norm
        most = 0.0 if norm.numel() * z.shape[1] <= _SMALL else _MOST
        if len(rows) and most * len(mine) <= len(rows) == int(mine.sum()):
            state.doze(mine, *here)
            return None
        return state.rouse(rows, *here)
