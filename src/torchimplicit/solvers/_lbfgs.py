"""L-BFGS: quasi-Newton minimisation with a limited memory."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from .._solution import Status
from ._base import Solver, Step
from ._descent import descend, objective


@dataclass(eq=False, repr=False)
class _Pairs:
    """The last steps and changes of the gradient of each sample, the oldest first; unused rows are zero.

    Attributes:
        s: steps, `(B, m, n)`.
        y: changes of the gradient, `(B, m, n)`.
        inverse: `1 / sᵀy` of each row, 0 where unused, `(B, m)`.
        scale: `sᵀy / yᵀy` of the last row, `(B,)`; 0 where there is none.
    """

    s: Tensor
    y: Tensor
    inverse: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LBFGS(Solver[_Pairs]):
    """Quasi-Newton minimisation (Liu & Nocedal 1989): the two-loop recursion over the last `history` pairs.

    For `minimize` and `least_squares`. Each sample has its own line search (backtracking from the full step); a pair
    without positive curvature, which that does not exclude, is left out. A sample that finds no lower point drops its
    pairs and tries steepest descent; if that fails too it is STALLED.

    Args:
        history: pairs kept.
    """

    history: int = 10

    max_steps: ClassVar[int] = 1000
    patience: ClassVar[int] = 200  # the gradient may rise for long while the objective falls

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_count("history", 1)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Pairs:
        """No pairs."""
        objective(evaluation)
        batch, n = z.shape
        s = z.new_zeros(batch, self.history, n)
        return _Pairs(s, s.clone(), z.new_zeros(batch, self.history), z.new_zeros(batch))

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Pairs, active: Tensor | None
    ) -> Step[_Pairs]:
        """One direction, one line search, one new pair."""
        residual = evaluation.residual
        running = torch.ones_like(state.scale, dtype=torch.bool) if active is None else active
        direction = _two_loops(state, residual)
        known = state.scale > 0
        uphill = known & ~(torch.linalg.vecdot(direction, residual) > 0)
        direction = torch.where((uphill | ~known)[:, None], residual, direction)
        # Without pairs there is no scale: a step of length one, or of the gradient if that is shorter.
        length = torch.where(known & ~uphill, 1.0, 1.0 / two(residual).clamp_min(1.0))
        moved = descend(problem, z, evaluation, direction, length, running)
        self._remember(state, moved.z - z, residual - moved.found.residual)
        failure = None
        if bool(moved.stuck.any()):
            failure = torch.where(moved.stuck & ~known, int(Status.STALLED), -1)
            dropped = ~moved.stuck
            state.inverse = torch.where(dropped[:, None], state.inverse, 0.0)
            state.scale = torch.where(dropped, state.scale, 0.0)
        return Step(moved.z, moved.found, state, failure)

    @staticmethod
    def _remember(state: _Pairs, s: Tensor, y: Tensor) -> None:
        """Append a pair of positive curvature."""
        curvature, square = torch.linalg.vecdot(s, y), torch.linalg.vecdot(y, y)
        fresh = curvature > torch.finfo(s.dtype).eps * two(s) * two(y)
        chosen = fresh[:, None, None]
        state.s = torch.where(chosen, torch.cat((state.s[:, 1:], s[:, None]), dim=1), state.s)
        state.y = torch.where(chosen, torch.cat((state.y[:, 1:], y[:, None]), dim=1), state.y)
        inverse = 1.0 / torch.where(fresh, curvature, 1.0)
        rows = torch.cat((state.inverse[:, 1:], inverse[:, None]), dim=1)
        state.inverse = torch.where(fresh[:, None], rows, state.inverse)
        state.scale = torch.where(fresh, curvature / torch.where(fresh, square, 1.0), state.scale)


def _two_loops(state: _Pairs, residual: Tensor) -> Tensor:
    """`H r` (Nocedal & Wright 2006, algorithm 7.4); rows without a pair have weight 0."""
    q, alphas = residual, []
    rows = range(state.s.shape[1])
    for i in reversed(rows):
        alpha = state.inverse[:, i] * torch.linalg.vecdot(state.s[:, i], q)
        q = q - alpha[:, None] * state.y[:, i]
        alphas.append(alpha)
    q = state.scale[:, None] * q
    for i in rows:
        beta = state.inverse[:, i] * torch.linalg.vecdot(state.y[:, i], q)
        q = q + (alphas.pop() - beta)[:, None] * state.s[:, i]
    return q
