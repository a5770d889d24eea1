"""The search along a direction, sample by sample: full step, plain step, halvings."""

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from ._base import hold

_ARMIJO = 1e-4


class Search:
    """The search for an acceptable point from `start`, sample by sample.

    Attributes:
        z: the points so far, `(B, n)`.
        found: fn there.
        norm: of the residual there, `(B,)`.
        moving: samples on a Newton direction.
        refused: samples that took the plain step in its place; None for none.
    """

    def __init__(
        self,
        problem: Problem,
        start: Tensor,
        evaluation: Evaluation,
        merit: Tensor,
        direction: Tensor,
        moving: Tensor,
        waiting: Tensor | None,
    ) -> None:
        self._problem = problem
        self._start, self._evaluation, self._merit, self._direction = start, evaluation, merit, direction
        self.moving = moving
        self.refused: Tensor | None = None
        self._length: Tensor | None = None  # of all steps: 1
        # A sample that does not move has the direction zero.
        target = start + direction
        if waiting is not None:
            target = hold(waiting, start + evaluation.residual, target)
        self._go(target)

    def run(self, halvings: int, plain: bool, unless: Tensor | None = None) -> Tensor | None:
        """Search; returns the samples that found no point and are back at the start, or None if all did.

        Args:
            halvings: of the Newton step, at most; 0 takes the full step unless fn is not finite there.
            plain: whether the plain step may replace Newton's.
            unless: samples that are not to be searched for; None for none.
        """
        if not halvings:
            stuck = self.moving & ~self.norm.isfinite()
        else:
            stuck = self._worse()
            if not bool(stuck.any()):
                return None
            if plain:
                self._plain(stuck)
                stuck = self._worse()
            searching = stuck if unless is None else stuck & ~unless
            for _ in range(halvings):
                if not bool(searching.any()):
                    break
                self._halve(searching)
                stuck = self._worse()
                searching = stuck if unless is None else stuck & ~unless
        if not bool(stuck.any()):
            return None
        if plain:
            # A fixed point is never stuck: the plain step, uphill or not.
            self._plain(stuck, at_all_costs=True)
            return None
        self._back(stuck)
        return stuck

    def _go(self, z: Tensor) -> None:
        self.z = z
        self.found = self._problem.evaluate(z)
        self.norm = self.found.norm

    def _worse(self) -> Tensor:
        length = 1.0 if self._length is None else self._length
        worse = (self.norm <= self._merit * (1 - _ARMIJO * length)).logical_not_() & self.moving
        return worse if self.refused is None else worse & ~self.refused

    def _plain(self, samples: Tensor, at_all_costs: bool = False) -> None:
        """The plain step for some samples; refuses their Newton step where that is an improvement, or at all costs."""
        self._go(hold(samples, self._start + self._evaluation.residual, self.z))
        refused = samples if at_all_costs else samples & (self.norm < self._merit)
        self.refused = refused if self.refused is None else self.refused | refused

    def _halve(self, samples: Tensor) -> None:
        """Half the step for some samples."""
        length = torch.ones_like(self._merit) if self._length is None else self._length
        self._length = torch.where(samples, 0.5 * length, length)
        self._go(hold(samples, torch.addcmul(self._start, self._length[:, None], self._direction), self.z))

    def _back(self, samples: Tensor) -> None:
        """Some samples back to where they were."""
        old, new = self._evaluation, self.found
        self.z = hold(samples, self._start, self.z)
        self.norm = torch.where(samples, self._merit, self.norm)
        self.found = old.where(samples, new)
