"""When a residual counts as zero: the tolerance of each sample, and what the dtype can reach."""

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from ._evaluation import Evaluation
from ._norms import norm_function, two
from ._precision import COARSE
from ._problem import Kind, Problem
from .solvers import Method

_REACH = 4.0
"""Rounding units of fn's value below which a residual is noise."""
_FURTHER = 64.0
"""So many times further a smooth function changes so many times more."""


def default_rtol(kind: Kind, epsilon: float) -> float:
    """The relative tolerance where none is given.

    Roots are compared with where they began, and solved superlinearly: to ask for more costs no more than a step.
    """
    if kind != "fixed_point":
        return epsilon ** (3 / 4)
    return epsilon if epsilon > COARSE else epsilon ** (2 / 3)


def least_rtol(epsilon: float) -> float:
    """The relative tolerance below which residuals are rounding."""
    return epsilon if epsilon > COARSE else _REACH * epsilon


class Tolerance:
    """The test `‖r(z)‖ ≤ atol + rtol·scale` of one solve.

    Norms are kept in the unit in which they cost least: the root mean square is the two-norm but for a factor.

    Attributes:
        norm: the solver's norm but for that factor, `(B, n) -> (B,)`.
        unit: the factor.
        first: the initial residual's norm, `(B,)`.
        asks_more: whether a residual within the limit must be `confirmed` too.
    """

    def __init__(self, problem: Problem, method: Method, z0: Tensor, start: Evaluation) -> None:
        self._euclidean = method.norm in ("rms", "two")
        self.norm: Callable[[Tensor], Tensor] = two if self._euclidean else norm_function(method.norm)
        self.unit = max(z0.shape[1], 1) ** -0.5 if method.norm == "rms" else 1.0
        self._problem = problem
        epsilon = problem.epsilon
        self._rtol = default_rtol(problem.kind, epsilon) if method.rtol is None else method.rtol
        first = self.first = self.of(start)
        # Without an absolute tolerance of the user's a residual reduced by 1/ε counts as zero: it has no units.
        # To be below the next number above is to be no larger; and none of these limits is zero.
        self._above, least = 1 + 4 * torch.finfo(first.dtype).eps, torch.finfo(first.dtype).tiny
        self._least = max((method.atol or 0.0) / self.unit * self._above, least)
        if method.atol is None:
            self._atol = (epsilon * self._above * _finite(first)).clamp_min_(least)
        else:
            self._atol = first.new_full((), self._least)
        self._z0 = z0
        self.asks_more = problem.kind != "fixed_point" and method.rtol is None

    def select(self, samples: Tensor, problem: Problem) -> "Tolerance":
        """The tolerance of some samples alone, by their indices."""
        part = copy(self)
        part._problem = problem
        if self._atol.ndim:
            part._atol = self._atol.index_select(0, samples)
        if problem.kind != "fixed_point":  # whose tolerance does not look back
            part.first = self.first.index_select(0, samples)
            part._z0 = self._z0.index_select(0, samples)
        return part

    def resumed(self, start: Evaluation) -> "Tolerance":
        """That of the same solve where it goes on: what has not passed at the start must have fallen from there."""
        part = copy(self)
        part.first = torch.where(self.first < self.limit(start), torch.inf, self.first)
        return part

    def of(self, evaluation: Evaluation) -> Tensor:
        """The residual's norm at an evaluation, `(B,)`."""
        return evaluation.norm if self._euclidean else self.norm(evaluation.residual)

    def limit(self, evaluation: Evaluation, fallen: Tensor | None = None) -> Tensor:
        """What the residual's norm must be below at this evaluation, `(B,)` or one for all; never zero.

        Args:
            evaluation: where.
            fallen: what it must have fallen below on the way here, `(B,)`; None at the start.
        """
        if self._rtol == 0.0:
            return self._atol
        epsilon = self._problem.epsilon
        rtol = max(self._rtol, least_rtol(epsilon))
        scale = self._problem.scale(evaluation, self.norm)
        if scale is None:
            return self._atol + rtol * _finite(self.first)
        limit = torch.add(self._atol, scale, alpha=rtol)
        # A residual that has not fallen is no evidence, however far z has run: z ← z + c passes any relative test.
        return limit if fallen is None else torch.minimum(limit, fallen)

    def confirmed(self, z: Tensor, evaluation: Evaluation, norm: Tensor) -> Tensor:
        """Whether a root is as near as its residual is small, `(B,)`; asked of the default tolerance only.

        Far from a root fn may be so large that anything is small beside it: what matters then is that z need move by
        no more than `ε^(2/3)` of its size, or of the way it has come, for fn to change by as much as is left of it.
        """
        size = torch.maximum(z.abs(), (z - self._z0).square().mean(dim=1, keepdim=True).sqrt())
        change = self._noise(self._problem, z, evaluation, self._problem.epsilon ** (2 / 3) * size)
        return (norm <= self.norm(change)) | (norm <= self._least)

    def credible(self, problem: Problem, z: Tensor, fallen: Tensor) -> Tensor | None:
        """Whether a fixed point's rounding is small beside the fall of its residual, `(B,)`; None for a root.

        Far enough out `z + c` rounds to z, and the residual of a map without a fixed point to zero.
        """
        if problem.kind == "root":
            return None
        return problem.epsilon * self.norm(z) <= fallen

    def fallen(self, peak: Tensor) -> Tensor:
        """What a residual must have fallen below from its peak, `(B,)`, to be evidence: about half, or `atol`."""
        return (0.5 * self._above * peak).clamp_min_(self._least)

    def reached(self, problem: Problem, z: Tensor, norm: Tensor, evaluation: Evaluation, peak: Tensor) -> Tensor:
        """Whether a residual is no more than rounding, `(B,)`: nothing smaller can be reached in this dtype.

        For a fixed point: `‖r‖ ≤ 4ε‖fn(z)‖`. For a root: no component of fn is larger than it changes, to first
        order, when every component of z moves by a few rounding units (a componentwise backward error, Oettli &
        Prager 1964): z is then an exact root of a function that the dtype cannot tell from fn. Unless that change is
        a jump's, which is no smaller for a smaller move, and as large as fn ever was.
        """
        epsilon = problem.epsilon
        scale = problem.scale(evaluation, self.norm)
        if scale is not None:
            return (norm <= _REACH * epsilon * scale) & (_REACH * epsilon * scale <= self.fallen(peak))
        noise = self._noise(problem, z, evaluation, _REACH * epsilon * z)
        within = (evaluation.residual.abs() <= noise).all(dim=1)
        small = norm <= epsilon**0.5 * torch.maximum(peak, _finite(self.first))
        if bool((within & ~small).any()):
            further = self._noise(problem, z, evaluation, _FURTHER * _REACH * epsilon * z)
            small |= self.norm(further) >= 0.5 * _FURTHER * self.norm(noise)
        return within & small

    @staticmethod
    def _noise(problem: Problem, z: Tensor, evaluation: Evaluation, size: Tensor) -> Tensor:
        """How much each component of fn changes, to first order, when z moves by `size`, `(B, n)` both."""
        noise = torch.zeros_like(z)
        signs = torch.ones(z.shape[1], dtype=z.dtype, device=z.device)
        for pattern in (signs, signs.cumsum(0).remainder(2) * 2 - 1):
            moved = problem.evaluate(z + size * pattern)
            noise = torch.maximum(noise, (moved.residual - evaluation.residual).abs())
        return noise


def _finite(norm: Tensor) -> Tensor:
    """The norm where it is finite, else 0: an infinite start must not make everything small."""
    return norm.nan_to_num(0.0, 0.0, 0.0)
