"""The chord method: Newton's, with a Jacobian that is kept for as long as it serves."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from .._solution import Status
from ..linear import Factors, Inverse
from ._base import Solver, Step
from ._line_search import Search


@dataclass(eq=False, repr=False)
class _Factors:
    """The factorised Jacobian of each sample, and how well it serves.

    Attributes:
        factors: LU of `A`, `(B, n, n)`.
        pivots: of it, `(B, n)`.
        regular: whether that could be had, `(B,)`.
        stale: whether the next step needs a new one, `(B,)`.
        norm: of the residual, `(B,)`.
    """

    factors: Tensor
    pivots: Tensor
    regular: Tensor
    stale: Tensor
    norm: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Chord(Solver[_Factors]):
    """`z ← z + A₀⁻¹ r` with the Jacobian of an earlier iterate (simplified Newton; Kelley 1995, §5.4).

    Linear convergence, at the rate at which the Jacobian has changed; a step costs O(n²) where Newton's costs O(n³)
    and n products. Each sample gets a new Jacobian once a step no longer cuts its residual to `refresh`: with a small
    `refresh` this is Newton's method, with 1 the Jacobian is kept while the residual falls at all. A step that an old
    Jacobian spoils is taken back; one that a new one spoils is halved, as Newton's are.

    Args:
        refresh: fall of the residual in a step, in (0, 1], above which the Jacobian is made anew.
        max_backtracks: halvings tried with a new Jacobian.
    """

    refresh: float = 0.3
    max_backtracks: int = 12

    max_steps: ClassVar[int] = 200
    patience: ClassVar[int] = 30

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_number("refresh", 0.0, 1.0)
        self._require_count("max_backtracks", 0)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Factors:
        """No Jacobian yet."""
        batch, n = z.shape
        stale = torch.ones(batch, dtype=torch.bool, device=z.device)
        pivots = torch.ones(batch, n, dtype=torch.int32, device=z.device)
        return _Factors(z.new_zeros(batch, n, n), pivots, stale, stale.clone(), evaluation.norm)

    def inverse(self, state: _Factors) -> Inverse:
        """The kept factors."""
        scaling = torch.ones_like(state.factors[:, :, 0])
        return Factors(state.factors, state.pivots, scaling, state.regular)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Factors, active: Tensor | None
    ) -> Step[_Factors]:
        """A new Jacobian for those who need one, and the step that the kept ones give."""
        running = torch.ones_like(state.stale) if active is None else active
        fresh = state.stale & running
        if bool(fresh.any()):
            matrix = problem.linearize(z, evaluation.value).dense()
            usable = fresh & matrix.isfinite().all(dim=2).all(dim=1)
            factors, pivots, info = torch.linalg.lu_factor_ex(torch.where(usable[:, None, None], matrix, 1.0))
            state.factors = torch.where(fresh[:, None, None], factors, state.factors)
            state.pivots = torch.where(fresh[:, None], pivots, state.pivots)
            state.regular = torch.where(fresh, usable & (info == 0), state.regular)
        direction = torch.linalg.lu_solve(state.factors, state.pivots, evaluation.residual[:, :, None])[:, :, 0]
        regular = state.regular & direction.isfinite().all(dim=1)
        moving = running & regular
        direction = torch.where(moving[:, None], direction, 0.0)
        search = Search(problem, z, evaluation, state.norm, direction, moving, None)
        stuck = search.run(self.max_backtracks, plain=False, unless=~fresh)
        failure = None
        singular = running & ~regular
        if stuck is not None or bool(singular.any()):
            failure = torch.where(singular, int(Status.SINGULAR), -1)
            if stuck is not None:
                failure = torch.where(stuck & fresh, int(Status.STALLED), failure)
        # A quotient that is NaN, at rest, is no fall.
        state.stale = ~(search.norm <= self.refresh * state.norm)
        state.norm = search.norm
        return Step(search.z, search.found, state, failure, look=True)
