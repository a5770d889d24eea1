"""The derivative of a function of one variable by extrapolated central differences, with an estimate of its error."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

_LEVELS = 12
_COLUMN = 2
"""Of the tableau, in which the scatter is measured: two powers of the step are out of it."""


@dataclass(frozen=True)
class Derivative:
    """What was found.

    Attributes:
        value: the derivative at 0; NaN where no difference was finite.
        error: an estimate of its absolute error; infinite where nothing is known.
        step: the step at which the estimate was smallest.
    """

    value: float
    error: float
    step: float


def derivative(f: Callable[[float], float], step: float, enough: float, noise: float) -> Derivative:
    """`f'(0)` by Ridders' method, twice, from `step` and from `step/√2`.

    Central differences `(f(h) − f(−h)) / 2h` with halved steps are extrapolated to h = 0 (Richardson); the value taken
    is that in the tableau with the smallest error, estimated by its distance from the two that it was made of (C. J. F.
    Ridders, "Accurate computation of F'(x) and F'(x)F''(x)", Adv. Eng. Softw. 4(2), 1982). Large steps lose to
    curvature, small ones to the noise in f, and this finds the step in between.

    Three differences to the published method. The smallest of many estimates is too optimistic where f is noisy: the
    second sequence, whose noise is another, is a judge of it; and so is the scatter at steps below the one chosen,
    where noise is all there is to see. And all steps are tried until the error is small enough, instead of giving up
    when it grows: f may be smooth only near 0.

    Args:
        f: finite near 0; where it is not, smaller steps are taken.
        step: the largest step.
        enough: the absolute error that suffices.
        noise: rounding in f; no error is taken to be less than `noise/h`. Where f cannot see a step at all, its
            differences are zero, and agree.
    """
    first = _sequence(f, step, enough, noise)
    second = _sequence(f, step / math.sqrt(2.0), enough, noise)
    best = min(first, second, key=lambda found: found.error)
    error = max(best.error, abs(first.value - second.value))
    return Derivative(best.value, math.inf if math.isnan(error) else error, best.step)


def _sequence(f: Callable[[float], float], step: float, enough: float, noise: float) -> Derivative:
    best = Derivative(math.nan, math.inf, step)
    row: list[float] = []
    rows: list[tuple[float, float]] = []
    for _ in range(_LEVELS):
        quotient = (f(step) - f(-step)) / (2.0 * step)
        if math.isfinite(quotient):
            # Each column removes the next even power of the step.
            following = [quotient]
            for column, coarser in enumerate(row):
                finer = following[column]
                value = finer + (finer - coarser) / (4.0 ** (column + 1) - 1.0)
                error = max(abs(value - finer), abs(value - coarser), noise / step)
                if error <= best.error:
                    best = Derivative(value, error, step)
                following.append(value)
            row = following
            rows.append((step, row[min(_COLUMN, len(row) - 1)]))
        else:
            row, rows = [], []
        step /= 2.0
        if best.error <= max(enough, noise / step):
            break
    # Noise of size η in f is one of η/h in a difference.
    below = [(step, value) for step, value in rows if step < best.step]
    scatter = max((step * abs(value - coarser) for (_, coarser), (step, value) in pairwise(below)), default=0.0)
    return replace(best, error=max(best.error, scatter / best.step))
