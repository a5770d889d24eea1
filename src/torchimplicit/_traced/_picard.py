"""The steps of `Picard` (which see): plain or damped, extrapolated, and with a damping that each sample finds."""

import torch
from torch import Tensor

from ..solvers import Picard
from ..solvers._picard import _LONGEST, _SHORTEST
from ._equation import Evaluated, TracedEquation, scalar
from ._loop import State, TracedSteps


class PicardSteps(TracedSteps):
    """`z + damping·r`."""

    def __init__(self, solver: Picard) -> None:
        self.max_steps, self.patience, self.progress = solver.max_steps, solver.patience, solver.progress
        self.check_every = solver.check_every
        self._solver = solver

    def init(self, equation: TracedEquation) -> State:
        """No state."""
        self._undamped = self._solver.damping == 1.0 and equation.kind == "fixed_point"
        self._damping = scalar(self._solver.damping, equation.first)
        return ()

    def step(
        self, equation: TracedEquation, phase: int, taken: Tensor, at: Evaluated, state: State, active: Tensor
    ) -> tuple[Evaluated, State, Tensor | None]:
        """A plain step."""
        z = self._plain(equation, at)
        return (z, equation.value(z)), (), None

    def _plain(self, equation: TracedEquation, at: Evaluated) -> Tensor:
        return at[1] if self._undamped else at[0] + self._damping * equation.residual(at)


class ExtrapolatedSteps(PicardSteps):
    """A step along the last one to where the residual is least to first order, once in `period` steps.

    The state: where a plain step would have led in the place of the last extrapolation, the residual before the last
    step, its norm, and the samples that are not extrapolated any more.
    """

    def __init__(self, solver: Picard) -> None:
        super().__init__(solver)
        assert solver.extrapolate_every is not None
        self.period = solver.extrapolate_every

    def init(self, equation: TracedEquation) -> State:
        """Nothing has been extrapolated."""
        super().init(equation)
        self._longest, self._shortest = scalar(_LONGEST, equation.first), scalar(_SHORTEST, equation.first)
        first = equation.first
        residual = equation.residual(equation.start)
        return torch.zeros_like(residual), residual, torch.full_like(first, torch.inf), first.isnan()

    def step(
        self, equation: TracedEquation, phase: int, taken: Tensor, at: Evaluated, state: State, active: Tensor
    ) -> tuple[Evaluated, State, Tensor | None]:
        """By the phase: a plain step, after a look at what the last extrapolation was worth; or the extrapolated one.

        Before the first `period` steps are over there is nothing to look at, and nothing is extrapolated.
        """
        plain, before, norm, off = state
        if phase == 0:
            now = torch.linalg.vector_norm(equation.residual(at), dim=1)
            worse = active & ~(now <= norm) & ~off & (taken > 0)
            z = torch.where(worse[:, None], plain, at[0])
            at = z, torch.where(worse[:, None], equation.value(z), at[1])
            before = equation.residual(at)
            norm = torch.linalg.vector_norm(before, dim=1)
            norm = torch.where(taken > 0, norm, torch.inf)
            off = off | worse
            z = self._plain(equation, at)
        elif phase == 1:
            residual = equation.residual(at)
            change = residual - before
            square = torch.linalg.vecdot(change, change).clamp_min(torch.finfo(change.dtype).tiny)
            length = (torch.linalg.vecdot(change, residual) / square).clamp(self._longest, self._shortest)
            length = torch.where(off | (taken < self.period), 0.0, length)
            plain = self._plain(equation, at)
            z = plain - (self._damping * length)[:, None] * residual
        else:
            z = self._plain(equation, at)
        return (z, equation.value(z)), (plain.clone(), before, norm.clone(), off.clone()), None


class DampedSteps(PicardSteps):
    """A damping that is halved where no new best residual comes.

    The state: its factor, that residual's norm, and its age, `(B,)` each.
    """

    def __init__(self, solver: Picard) -> None:
        super().__init__(solver)
        assert solver.damping_patience is not None
        self._patient = solver.damping_patience

    def init(self, equation: TracedEquation) -> State:
        """Every sample begins with the solver's damping."""
        super().init(equation)
        norm = torch.linalg.vector_norm(equation.residual(equation.start), dim=1)
        return self._damping.expand_as(norm).clone(), norm, torch.zeros_like(norm, dtype=torch.long)

    def step(
        self, equation: TracedEquation, phase: int, taken: Tensor, at: Evaluated, state: State, active: Tensor
    ) -> tuple[Evaluated, State, Tensor | None]:
        """A step, and what it says about the damping."""
        factor, best, since = state
        z = torch.addcmul(at[0], factor[:, None], equation.residual(at))
        at = z, equation.value(z)
        norm = torch.linalg.vector_norm(equation.residual(at), dim=1)
        better = norm < best
        since = torch.where(better, 0, since + 1)
        tired = since >= self._patient
        factor = torch.where(tired, 0.5 * factor, factor)
        return at, (factor, torch.where(better | tired, norm, best), torch.where(tired, 0, since)), None
