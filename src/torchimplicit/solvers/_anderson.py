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
        step: `Δz + mixing·Δr`, `(B, m, n)`.
        residual: `Δr`, `(B, m, n)`.
        gram: `Δr Δrᵀ`, `(B, m, m)`.
        filled: rows in use, `(B,)`.
        next: the row that the next difference overwrites.
    """

    step: Tensor
    residual: Tensor
    gram: Tensor
    filled: Tensor
    next: int = 0


@dataclass(frozen=True)
class Anderson(Solver[_History]):
    """Anderson (1965) acceleration in the multisecant form of Walker & Ni (2011), eq. 2.2 (type II).

    With the last `m` differences `ΔR`, `ΔZ` as columns, `z ← z + β r − (ΔZ + β ΔR) γ`, `γ = argmin ‖r − ΔR γ‖`.

    1. The least-squares problem is solved by normal equations whose columns are scaled to unit length first, with a
       ridge *relative* to them: a ridge in absolute units stalls once the residuals are smaller than it.
    2. A column of length zero (a sample at rest) is left out, and a sample whose Gram matrix cannot be factorised
       takes the plain step: a singular history is survived.
    3. Safeguard: a sample whose residual more than doubles, or is no longer finite, goes back to where it was, drops its history and
       continues with a plain step from there.

    Args:
        history: differences kept, `m`.
        mixing: β in (0, 2), the plain step's damping.
        ridge: relative to the unit columns; None is `10 ε`.
    """

    history: int = 5
    mixing: float = 1.0
    ridge: float | None = None

    max_steps: ClassVar[int] = 500
    patience: ClassVar[int] = 50

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_count("history", 1)
        self._require_number("mixing", 0.0, 2.0, open_low=True)
        self._require_number("ridge", 0.0, optional=True)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _History:
        """An empty history."""
        batch, n = z.shape
        m = min(self.history, max(n, 1))
        return _History(
            step=z.new_zeros(batch, m, n),
            residual=z.new_zeros(batch, m, n),
            gram=z.new_zeros(batch, m, m),
            filled=torch.zeros(batch, dtype=torch.long, device=z.device),
        )

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _History, active: Tensor | None
    ) -> Step[_History]:
        """One accelerated step; see the class."""
        residual = evaluation.residual
        moved = torch.add(z, residual, alpha=self.mixing)
        gamma = self._coefficients(state, residual)
        moved = torch.baddbmm(moved[:, None], gamma[:, None], state.step, alpha=-1)[:, 0]
        new = hold(active, moved, z)
        found = problem.evaluate(new)
        refused = (two(found.residual) <= 2.0 * two(residual)).logical_not_() & (state.filled > 0)
        if bool(refused.any()):
            _forget(state, refused)
            keep = ~refused
            new = hold(keep, new, z)
            found = Evaluation(
                hold(keep, found.value, evaluation.value), hold(keep, found.residual, residual)
            )
        self._remember(state, new - z, found.residual - residual, refused)
        return Step(new, found, state)

    def _coefficients(self, state: _History, residual: Tensor) -> Tensor:
        """`γ`, `(B, m)`; zero for an empty history."""
        length = state.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = torch.where(length > 0, length, torch.inf).reciprocal()
        scaled = state.gram * inverse[:, :, None] * inverse[:, None, :]
        ridge = 10 * torch.finfo(residual.dtype).eps if self.ridge is None else self.ridge
        # Unit diagonal plus ridge; an empty row has nothing but the diagonal, so its coefficient comes out 0.
        scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0 + ridge)
        projection = torch.bmm(residual[:, None], state.residual.mT)[:, 0] * inverse
        gamma, info = torch.linalg.solve_ex(scaled, projection)
        sound = (info == 0) & gamma.isfinite().all(dim=1)
        return torch.where(sound[:, None], gamma * inverse, 0.0)

    def _remember(self, state: _History, dz: Tensor, dr: Tensor, refused: Tensor) -> None:
        row = state.next
        state.step[:, row] = torch.add(dz, dr, alpha=self.mixing)
        state.residual[:, row] = dr
        products = torch.bmm(dr[:, None], state.residual.mT)[:, 0]
        state.gram[:, row, :] = products
        state.gram[:, :, row] = products
        state.filled += ~refused
        state.next = (row + 1) % state.gram.shape[1]


def _forget(state: _History, samples: Tensor) -> None:
    """Empty the history of some samples, `(B,)` bool."""
    keep = ~samples
    state.step = torch.where(keep[:, None, None], state.step, 0.0)
    state.residual = torch.where(keep[:, None, None], state.residual, 0.0)
    state.gram = torch.where(keep[:, None, None], state.gram, 0.0)
    state.filled = torch.where(keep, state.filled, 0)
