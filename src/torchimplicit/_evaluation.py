"""What is known of a state once fn was evaluated there."""

import torch
from torch import Tensor

from ._norms import two


class Evaluation:
    """One evaluation at a state: fn's `value` and the `residual`, both `(B, n)`.

    The residual is computed when it is first looked at: a plain Picard step between two checks never does.
    """

    __slots__ = ("_norm", "_residual", "_room", "_start", "_target", "objective", "value")

    def __init__(
        self,
        value: Tensor,
        start: Tensor | None = None,
        residual: Tensor | None = None,
        objective: Tensor | None = None,
        target: Tensor | None = None,
        room: Tensor | None = None,
    ) -> None:
        self.value = value
        self.objective = objective
        self._start = start
        self._residual = residual
        self._target = target
        self._norm: Tensor | None = None
        self._room = room

    @property
    def residual(self) -> Tensor:
        """`fn(z) − z` for a fixed point, `−fn(z)` for a root."""
        if self._residual is None:
            self._residual = -self.value if self._start is None else self.value - self._start
        return self._residual

    @property
    def norm(self) -> Tensor:
        """`‖r‖₂` of each sample, `(B,)`: the loop and most solvers look at it, and it is computed once.

        Where there is room for it, the residual itself is not kept: to fill new memory takes longer than to subtract.
        """
        if self._norm is None:
            if self._room is None or self._residual is not None or self._start is None:
                self._norm = two(self.residual)
            else:
                self._norm = two(torch.sub(self.value, self._start, out=self._room))
        return self._norm

    @property
    def target(self) -> Tensor:
        """What methods of least squares make small, `(B, m)`: the negative residuals of `least_squares`, else `r`."""
        return self.residual if self._target is None else self._target

    def select(self, samples: Tensor) -> "Evaluation":
        """The evaluation of some samples, by their indices."""
        start = self._start if self._residual is None else None  # it serves to compute the residual only
        parts = (start, self._residual, self.objective, self._target)
        return Evaluation(
            self.value.index_select(0, samples), *(None if t is None else t.index_select(0, samples) for t in parts)
        )

    def where(self, samples: Tensor, other: "Evaluation") -> "Evaluation":
        """This evaluation for some samples, `(B,)` bool, and another one for the rest."""

        def choose(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            return torch.where(samples if mine.ndim == 1 else samples[:, None], mine, theirs)

        return Evaluation(
            torch.where(samples[:, None], self.value, other.value),
            residual=torch.where(samples[:, None], self.residual, other.residual),
            objective=choose(self.objective, other.objective),
            target=choose(self._target, other._target),
        )
