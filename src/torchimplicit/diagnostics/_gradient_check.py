"""`GradientCheck`: backward beside finite differences in several directions, and the verdict as a sentence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Verdict = Literal["agree", "differ", "inconclusive"]


@dataclass(frozen=True)
class DirectionCheck:
    """One direction. Relative figures are to the larger of the two derivatives and their expected size.

    Attributes:
        backward: the derivative along the direction, `⟨∇, d⟩`, by the backward pass.
        finite_difference: the same by finite differences; NaN where the output was not finite nearby.
        error: relative distance of the two; infinite where one is not finite.
        uncertainty: relative error of the finite difference, estimated; infinite where nothing is known of it.
        step: of the finite difference, relative to the size of the tensors.
        unsolved: samples whose solve did not converge, as far as can be seen; then a direction cannot differ.
        verdict: `"agree"`, `"differ"`, or `"inconclusive"`.
        tightened: the same with the solvers of all layers at a tight tolerance; None where that was not needed or there
            are none.
    """

    backward: float
    finite_difference: float
    error: float
    uncertainty: float
    step: float
    unsolved: int
    verdict: Verdict
    tightened: "DirectionCheck | None" = None


@dataclass(frozen=True)
class GradientCheck:
    """The result of `check_gradients`; true if the gradients agree. `str()` is the verdict in one line.

    Attributes:
        verdict: `"differ"` if they do in one direction, else `"inconclusive"` if one is, else `"agree"`.
        directions: one `DirectionCheck` each; empty if the layer is not deterministic.
        tolerance: relative error up to which derivatives agree.
        repeatability: relative distance of two outputs at the same point; 0 for a deterministic layer.
        dtype: the coarsest among the tensors differentiated by.
    """

    verdict: Verdict
    directions: tuple[DirectionCheck, ...]
    tolerance: float
    repeatability: float
    dtype: torch.dtype

    @property
    def ok(self) -> bool:
        """Whether the derivatives agree in every direction."""
        return self.verdict == "agree"

    @property
    def worst(self) -> float:
        """The largest relative error; NaN without directions."""
        return max((d.error for d in self.directions), default=math.nan)

    @property
    def uncertainty(self) -> float:
        """The largest relative uncertainty of the finite differences; NaN without directions."""
        return max((d.uncertainty for d in self.directions), default=math.nan)

    @property
    def inconclusive(self) -> int:
        """In how many directions nothing can be said."""
        return sum(d.verdict == "inconclusive" for d in self.directions)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        """The verdict, in one line."""
        return _sentence(self)

    def table(self) -> str:
        """The directions, one a line."""
        lines = [f"{'backward':>15}  {'differences':>15}  {'error':>8}  {'uncertainty':>11}  {'step':>8}  verdict"]
        for d in self.directions:
            lines.append(
                f"{d.backward:15.8e}  {d.finite_difference:15.8e}  {d.error:8.1e}  {d.uncertainty:11.1e}  "
                f"{d.step:8.1e}  {d.verdict}"
            )
        return "\n".join(lines)


def _sentence(check: GradientCheck) -> str:
    """`str()` of a check."""
    name, number = str(check.dtype).removeprefix("torch."), len(check.directions)
    coarse = f"; {name} is too coarse for finite differences" if torch.finfo(check.dtype).eps > 1e-5 else ""
    apart = f"two evaluations at the same point differ by {check.repeatability:.0e} (relative)"
    if not check.directions:
        return (
            f"inconclusive: layer is not deterministic, {apart}; call eval() if it is a module, and fix what it draws "
            "or keeps between calls"
        )
    noise = f"; {apart}" if check.repeatability > 0 else ""
    told = [d for d in check.directions if d.verdict == check.verdict]
    direct = told
    if check.verdict != "inconclusive":
        told = [d.tightened or d for d in told]
    error, uncertainty = max(d.error for d in told), max(d.uncertainty for d in told)
    where = f"{len(told)} of {number} directions"
    figures = f"(uncertainty {uncertainty:.0e}, tolerance {check.tolerance:.0e})"
    if check.verdict == "agree":
        return (
            f"gradients agree with finite differences: worst relative error {error:.0e} in {number} "
            f"direction{'s' * (number != 1)} {figures}{coarse}{noise}"
        )
    if check.verdict == "differ":
        # Nothing else is known to be wrong where the solvers could be tightened.
        hint = "; a solver inside, if there is one, must have a tight rtol" if told == direct else ""
        return f"GRADIENTS DIFFER from finite differences: relative error {error:.0e} in {where} {figures}{hint}{noise}"
    return f"inconclusive in {where}: {_reason(told, check.tolerance)}{coarse}{noise}"


def _reason(told: Sequence[DirectionCheck], tolerance: float) -> str:
    """Why directions are inconclusive, and what to do."""
    tight = [d.tightened for d in told if d.tightened is not None]
    if len(tight) == len(told) and all(d.verdict == "agree" for d in tight):
        return (
            f"relative error {max(d.error for d in told):.0e} with the layers' own solvers, but "
            f"{max(d.error for d in tight):.0e} with tight ones: the gradient is right and the solves too loose to "
            "show it; tighten the solver's rtol"
        )
    if any(math.isnan(d.finite_difference) for d in told):
        return "the output is not finite near this point; check the inputs and the domain of layer"
    unsolved = max(d.unsolved for d in (*told, *tight))
    if unsolved:
        return f"{unsolved} samples of a solve did not converge; use another solver or more steps"
    return (
        f"finite differences are uncertain by {max(d.uncertainty for d in told):.0e}, more than the tolerance "
        f"{tolerance:.0e} or the error; tighten the solver's rtol, or use float64 and smooth functions"
    )
