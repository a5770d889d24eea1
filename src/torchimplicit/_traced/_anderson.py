"""The steps of `Anderson` (which see): orthonormal histories, in rings of rows that begin as zeros."""

from operator import index

import torch
from torch import Tensor

from ..solvers import Anderson
from ._equation import Evaluated, TracedEquation, scalar
from ._loop import State, TracedSteps


class AndersonSteps(TracedSteps):
    """Accelerated steps.

    The state: rows `q` and `w`, `(B, m, n)` both; `gamma = qᵀ r`, `(B, m)`; the plain step and the residual, `(B, n)`;
    its norm, the step up to which a sample waits, and the length of its next wait, `(B,)`.
    """

    def __init__(self, solver: Anderson) -> None:
        self.max_steps, self.patience, self.progress = solver.max_steps, solver.patience, solver.progress
        self.check_every = solver.check_every
        self._solver = solver

    def init(self, equation: TracedEquation) -> State:
        """An empty history."""
        z, solver = equation.start[0], self._solver
        self._undamped = solver.mixing == 1.0 and equation.kind == "fixed_point"
        self._mixing = scalar(solver.mixing, equation.first)
        drop = torch.finfo(z.dtype).eps ** 0.5 if solver.drop_tolerance is None else solver.drop_tolerance
        self._drop = scalar(drop, equation.first)
        batch, n = z.shape
        rows = z.new_zeros(batch, min(index(solver.history), max(n, 1)), n)
        residual = equation.residual(equation.start)
        norm = torch.linalg.vector_norm(residual, dim=1)
        wait = torch.zeros_like(norm, dtype=torch.long)
        plain = self._plain(equation, equation.start)
        return rows, rows.clone(), rows[:, :, 0].clone(), plain.clone(), residual, norm, wait, torch.ones_like(wait)

    def step(
        self, equation: TracedEquation, phase: int, taken: Tensor, at: Evaluated, state: State, active: Tensor
    ) -> tuple[Evaluated, State, Tensor | None]:
        """A step of all samples; those for which it was bad go back, without a history, and wait."""
        q, w, gamma, plain, residual, norm, wait, pause = state
        gamma = torch.where((wait <= taken)[:, None], gamma, 0.0)
        new = torch.baddbmm(plain[:, None], gamma[:, None], w, alpha=-1)[:, 0]
        found = new, equation.value(new)
        measured = torch.linalg.vector_norm(equation.residual(found), dim=1)
        refused = active & ~(measured <= 2.0 * norm) & (gamma != 0).any(dim=1)
        row = refused[:, None]
        found = torch.where(row, at[0], new), torch.where(row, at[1], found[1])
        measured = torch.where(refused, norm, measured)
        wait = torch.where(refused, taken + 1 + pause, wait)
        pause = torch.where(refused, 4 * pause, pause)
        after, ahead = equation.residual(found), self._plain(equation, found)
        slot = (torch.arange(q.shape[1], device=q.device) == taken % q.shape[1])[:, None]
        # The oldest row is about to go, and a refused sample's history is gone.
        gone = row[:, :, None] | slot
        q, w = torch.where(gone, 0.0, q), torch.where(gone, 0.0, w)
        dr, dw = (after - residual)[:, None], (ahead - plain)[:, None]
        overlap = torch.bmm(dr, q.mT)
        dr, dw = torch.baddbmm(dr, overlap, q, alpha=-1), torch.baddbmm(dw, overlap, w, alpha=-1)
        least = self._drop * torch.linalg.vector_norm(overlap, dim=2, keepdim=True)
        size = torch.linalg.vector_norm(dr, dim=2, keepdim=True)
        size = torch.where(size <= least, torch.inf, size)
        q, w = torch.where(slot, dr / size, q), torch.where(slot, dw / size, w)
        gamma = torch.bmm(after[:, None], q.mT)[:, 0]
        return found, (q, w, gamma, ahead.clone(), after, measured, wait, pause), None

    def _plain(self, equation: TracedEquation, at: Evaluated) -> Tensor:
        return at[1] if self._undamped else at[0] + self._mixing * equation.residual(at)
