"""Anderson acceleration (type II) with a relative ridge, per-sample safeguard and restart."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._norms import two
from .._problem import Evaluation, Problem
from ._base import Solver, Step, hold


@dataclass
class _History:
    """Differences of the last iterates of each sample, in a ring of `m` rows; empty rows are zero.

    Attributes:
        pairs: rows `[Δr | Δz + mixing·Δr] / ‖Δr‖`, `(B, m, 2n)`.
        gram: of the left halves, `(B, m, m)`, with the ridge on its diagonal of ones.
        norm: of the residual at the current iterate, `(B,)`.
        filled: whether a sample has any history, `(B,)`.
        wait: plain steps to take before acceleration is tried again, `(B,)`.
        pause: length of the next wait, `(B,)`.
        next: the row that the next difference overwrites.
        waiting: whether any sample waits.
    """

    pairs: Tensor
    gram: Tensor
    norm: Tensor
    filled: Tensor
    wait: Tensor
    pause: Tensor
    next: int = 0
    waiting: bool = False


@dataclass(frozen=True)
class Anderson(Solver[_History]):
    """Anderson (1965) acceleration in the multisecant form of Walker & Ni (2011), eq. 2.2 (type II).

    With the last `m` differences `ΔR`, `ΔZ` as columns, `z ← z + β r − (ΔZ + β ΔR) γ`, `γ = argmin ‖r − ΔR γ‖`.

    1. The least-squares problem is solved by normal equations whose columns are scaled to unit length first, with a
       ridge *relative* to them: a ridge in absolute units stalls once the residuals are smaller than it.
    2. The scaled Gram matrix has 1 + ridge on its diagonal, so dependent columns are survived; a column of length
       zero (a sample at rest) gets the coefficient 0.
    3. Safeguard: a sample whose residual more than doubles in a step, or is no longer finite, goes back to where it
       was, drops its history, and takes 1, 4, 16, … plain steps before it is accelerated again: where plain steps
       converge, it does.

    Args:
        history: differences kept, `m`.
        mixing: β in (0, 2), the plain step's damping.
        ridge: relative to the unit columns; None is `10 ε`.
    """

    history: int = 5
    mixing: float = 1.0
    ridge: float | None = None

    max_steps: ClassVar[int] = 500
    patience: ClassVar[int] = 100

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_count("history", 1)
        self._require_number("mixing", 0.0, 2.0, inside=True)
        self._require_number("ridge", 0.0, optional=True)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _History:
        """An empty history."""
        batch, n = z.shape
        m = min(self.history, max(n, 1))
        return _History(
            pairs=z.new_zeros(batch, m, 2 * n),
            gram=torch.eye(m, dtype=z.dtype, device=z.device).repeat(batch, 1, 1),
            norm=two(evaluation.residual),
            filled=torch.zeros(batch, dtype=torch.bool, device=z.device),
            wait=torch.zeros(batch, dtype=torch.long, device=z.device),
            pause=torch.ones(batch, dtype=torch.long, device=z.device),
        )

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _History, active: Tensor | None
    ) -> Step[_History]:
        """One accelerated step; see the class."""
        n = z.shape[1]
        residual = evaluation.residual
        moved = torch.add(z, residual, alpha=self.mixing)
        accelerated = state.filled
        if bool(accelerated.any()):
            projection = torch.bmm(residual[:, None], state.pairs[:, :, :n].mT)[:, 0]
            gamma, _ = torch.linalg.solve_ex(state.gram, projection)
            if state.waiting:
                accelerated = accelerated & (state.wait == 0)
                gamma = torch.where(accelerated[:, None], gamma, 0.0)
            # A solution in LAPACK's column order would send the product below through a loop over the batch.
            gamma = gamma.contiguous()
            moved = torch.baddbmm(moved[:, None], gamma[:, None], state.pairs[:, :, n:], alpha=-1)[:, 0]
        new = hold(active, moved, z)
        found = problem.evaluate(new)
        norm = two(found.residual)
        # Also true of NaN, in the residual or in the coefficients.
        refused = ~(norm <= 2.0 * state.norm) & accelerated
        if state.waiting:
            state.wait = (state.wait - 1).clamp_min(0)
        if bool(refused.any()):
            keep = ~refused
            _forget(state, keep)
            new = hold(keep, new, z)
            found = Evaluation(hold(keep, found.value, evaluation.value), residual=hold(keep, found.residual, residual))
            norm = torch.where(keep, norm, state.norm)
            state.wait = torch.where(keep, state.wait, state.pause)
            state.pause = torch.where(keep, state.pause, 4 * state.pause)
            state.waiting = True
        self._remember(state, new - z, found.residual - residual)
        state.norm = norm
        return Step(new, found, state)

    def _remember(self, state: _History, dz: Tensor, dr: Tensor) -> None:
        """Put a difference into the ring; one of length zero (a sample at rest, or refused) leaves an empty row."""
        n, row = dz.shape[1], state.next
        limits = torch.finfo(dr.dtype)
        length = two(dr)
        pair = torch.cat((dr, torch.add(dz, dr, alpha=self.mixing)), dim=1)
        torch.div(pair, length.clamp_min(limits.tiny)[:, None], out=state.pairs[:, row])
        products = torch.bmm(state.pairs[:, row, None, :n], state.pairs[:, :, :n].mT)[:, 0]
        products[:, row] = 1.0 + (10 * limits.eps if self.ridge is None else self.ridge)
        state.gram[:, row, :] = products
        state.gram[:, :, row] = products
        torch.gt(length, 0.0, out=state.filled)
        state.next = (row + 1) % state.gram.shape[1]


def _forget(state: _History, keep: Tensor) -> None:
    """Empty the history of the samples not in `keep`, `(B,)` bool."""
    zero = state.gram.new_zeros(())
    empty = torch.eye(state.gram.shape[1], dtype=state.gram.dtype, device=state.gram.device)
    state.pairs = torch.where(keep[:, None, None], state.pairs, zero)
    state.gram = torch.where(keep[:, None, None], state.gram, empty)
