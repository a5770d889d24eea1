"""Anderson acceleration (type II) on an orthonormal history, with per-sample safeguard and restart."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._norms import two
from .._problem import Evaluation, Problem
from ._base import Solver, Step, hold


@dataclass
class _History:
    """Differences of the last iterates of each sample, orthonormalised, in a ring of `m` rows; empty rows are zero.

    Attributes:
        pairs: rows `[q | w]`, `(B, m, 2n)`: `q` of the differences of r, `w` the same combination of `Δz + mixing·Δr`.
        norm: of the residual at the current iterate, `(B,)`.
        wait: plain steps to take before acceleration is tried again, `(B,)`.
        pause: length of the next wait, `(B,)`.
        rows: how many rows have been written.
        next: the row that the next difference overwrites.
        waiting: whether any sample waits.
    """

    pairs: Tensor
    norm: Tensor
    wait: Tensor
    pause: Tensor
    rows: int = 0
    next: int = 0
    waiting: bool = False


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

    Args:
        history: differences kept, `m`.
        mixing: β in (0, 2), the plain step's damping.
        drop_tolerance: the new part of a difference, relative to it, below which it is dropped; None is `√ε`.
    """

    history: int = 5
    mixing: float = 1.0
    drop_tolerance: float | None = None

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
        return _History(
            pairs=z.new_zeros(batch, min(self.history, max(n, 1)), 2 * n),
            norm=two(evaluation.residual),
            wait=torch.zeros(batch, dtype=torch.long, device=z.device),
            pause=torch.ones(batch, dtype=torch.long, device=z.device),
        )

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _History, active: Tensor | None
    ) -> Step[_History]:
        """One accelerated step; see the class."""
        n = z.shape[1]
        residual, known = evaluation.residual, state.pairs[:, : state.rows]
        moved = torch.add(z, residual, alpha=self.mixing)
        if state.rows:
            gamma = torch.linalg.vecdot(known[:, :, :n], residual[:, None])
            if state.waiting:
                gamma = torch.where((state.wait == 0)[:, None], gamma, 0.0)
            moved = torch.baddbmm(moved[:, None], gamma[:, None], known[:, :, n:], alpha=-1)[:, 0]
        new = hold(active, moved, z)
        found = problem.evaluate(new)
        norm = two(found.residual)
        if state.waiting:
            state.wait = (state.wait - 1).clamp_min(0)
        if state.rows:
            # Also true of NaN, in the residual or in the coefficients.
            refused = (norm <= 2.0 * state.norm).logical_not_()
            if state.waiting:
                refused &= known.any(dim=2).any(dim=1)
            if bool(refused.any()):
                refused &= known.any(dim=2).any(dim=1)
                keep = ~refused
                state = replace(state, pairs=torch.where(keep[:, None, None], state.pairs, 0.0))
                new = hold(keep, new, z)
                found = found.where(keep, evaluation)
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
        pair = torch.cat((dr, torch.add(dz, dr, alpha=self.mixing)), dim=1)
        length = two(dr)
        size = length
        if state.rows:
            known = state.pairs[:, : state.rows]
            overlap = torch.linalg.vecdot(known[:, :, :n], dr[:, None])
            if row < state.rows:
                overlap[:, row] = 0.0  # the oldest, which goes
            pair = torch.baddbmm(pair[:, None], overlap[:, None], known, alpha=-1)[:, 0]
            size = two(pair[:, :n])
        drop = limits.eps**0.5 if self.drop_tolerance is None else self.drop_tolerance
        scale = torch.where(size > drop * length, size, torch.inf).clamp_min_(limits.tiny)
        torch.div(pair, scale[:, None], out=state.pairs[:, row])
        state.rows = max(state.rows, row + 1)
        state.next = (row + 1) % state.pairs.shape[1]
