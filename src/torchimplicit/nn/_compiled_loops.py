"""A whole solve of `z = tanh(W z + x)`, and a whole adjoint solve, as one loop each, to be compiled.

The decisions are those of `_books`, `_tolerance` and `Neumann` for what usually happens: steps until every sample has
converged. What else may happen is not decided here: such a sample is given up, and left to the loop that knows all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from .._norms import two
from .._tolerance import _REACH
from ._compiled_steps import Judged, PlainSteps, ShiftedAdjointSteps, ShiftedSteps, Steps
from ._rational_tanh import ERROR, tanh

Within = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Whether samples are done, given their residuals' norms, the map's values, and the largest norms so far."""
Form = tuple[Tensor, Tensor] | None
"""`Pᵀ` and c of `ShiftedTanh`, whose steps are taken then; None for plain ones."""


@dataclass(frozen=True)
class Pace:
    """When a loop looks, and when it gives up.

    Attributes:
        block: steps from one look to the next.
        extrapolate: whether plain steps are extrapolated after each block.
        patience: steps after which a sample must have come on.
        progress: factor by which its best residual must have fallen in that time.
    """

    block: int
    extrapolate: bool
    patience: int
    progress: float


class Found(NamedTuple):
    """What a loop found of each sample.

    Attributes:
        z: the state, `(B, n)`.
        value: the map's value there.
        norm: of the residual, `(B,)`.
        steps: taken, `(B,)`.
        done: whether it has converged, `(B,)` bool.
        peak: the largest norm at a look, `(B,)`.
        taken: steps of the loop, `()`.
        looks: of the loop, `()`.
    """

    z: Tensor
    value: Tensor
    norm: Tensor
    steps: Tensor
    done: Tensor
    peak: Tensor
    taken: Tensor
    looks: Tensor


class _Carried(NamedTuple):
    """What goes round beside the steps' own state: `Found`, who runs, who was given up, and how each has come on."""

    taken: Tensor
    looks: Tensor
    running: Tensor
    lost: Tensor
    z: Tensor
    value: Tensor
    norm: Tensor
    steps: Tensor
    peak: Tensor
    best: Tensor
    reference: Tensor
    looked: Tensor


_PARTS = len(_Carried._fields)


def solution(
    weight: Tensor, x: Tensor, start: Tensor, limits: Tensor, max_steps: Tensor, form: Form, pace: Pace
) -> Found:
    """`z = tanh(W z + x)` from a start.

    Args:
        weight: W.
        x: `(B, n)`.
        start: `(B, n)`.
        limits: rtol, atol, and atol in units of the first residual's norm, `(3,)`; norms are two-norms.
        max_steps: `()`, a multiple of the block.
        form: of the steps.
        pace: of the steps.
    """
    transposed = weight.t()
    eps, tiny = torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny
    above = 1 + _REACH * eps
    # The residual with the true tanh is larger than that with the quotient by no more than this part of the value.
    rtol = limits[0] - (ERROR * eps if x.dtype == torch.float32 else 0.0)

    def cell(z: Tensor) -> Tensor:
        return tanh(torch.addmm(x, z, transposed))

    def fallen(peak: Tensor) -> Tensor:
        return torch.maximum(0.5 * above * peak, limits[1].clamp_min(tiny))

    image = torch.mm(start, transposed)
    value = tanh(x + image)
    first = two(value - start)
    atol = (limits[1] + limits[2] * first).clamp_min(tiny)

    def within(norm: Tensor, value: Tensor, peak: Tensor) -> Tensor:
        return norm < torch.minimum(atol + rtol * two(value), fallen(peak))

    passed = first < atol + rtol * two(value)
    steps = PlainSteps(cell, pace.extrapolate) if form is None else ShiftedSteps(weight, *form, x, image)
    found = _loop(steps, start, value, first, passed, within, max_steps, pace)
    # Far enough out rounding hides any residual (see `Tolerance.credible`).
    credible = passed | (eps * two(found.z) <= fallen(found.peak))
    return found._replace(done=found.done & credible)


def gradient(
    weight: Tensor,
    z: Tensor,
    value: Tensor,
    v: Tensor,
    rtol: Tensor,
    max_steps: Tensor,
    form: Form,
    pace: Pace,
    of_weight: bool,
) -> tuple[Found, Tensor, Tensor | None]:
    """The gradients of x and W for the gradient `v` of z: `u = v + Wᵀ D u`, then `D u` and `Σ D u zᵀ`.

    Args:
        weight: W.
        z: the solution, `(B, n)`.
        value: `tanh(W z + x)`, shaped like it, as all that follows.
        v: the gradient.
        rtol: what `‖v − Aᵀ u‖` must come down to, beside `‖v‖`.
        max_steps: `()`.
        form: of the steps.
        pace: of the steps.
        of_weight: whether that of W is asked for.

    Returns:
        What was found, with u for z; the gradient of x; that of W, or None.
    """
    slope = 1.0 - value * value
    target = rtol * two(v)

    def step(u: Tensor) -> Tensor:
        return torch.addmm(v, slope * u, weight)

    def within(norm: Tensor, value: Tensor, peak: Tensor) -> Tensor:
        return norm <= target

    image = step(v)
    first = two(image - v)
    steps = PlainSteps(step, pace.extrapolate) if form is None else ShiftedAdjointSteps(weight, *form, slope, v)
    found = _loop(steps, v, image, first, first <= target, within, max_steps, pace)
    scaled = slope * found.z
    return found, scaled, torch.mm(scaled.t(), z) if of_weight else None


def _loop(
    steps: Steps,
    start: Tensor,
    value: Tensor,
    first: Tensor,
    passed: Tensor,
    within: Within,
    max_steps: Tensor,
    pace: Pace,
) -> Found:
    """Steps from a start, where the map's value and the residual's norm are known, until all are done or given up.

    Who has `passed` is done before the first step. What a sample returns is where the look found it that judged it.
    """

    def going(*carried: Tensor) -> Tensor:
        c = _Carried(*carried[:_PARTS])
        return c.running.any() & (c.taken < max_steps)

    def block(*carried: Tensor) -> Any:
        c, state = _Carried(*carried[:_PARTS]), carried[_PARTS:]
        arrived = steps.walk(state, pace.block)
        z, value, _ = arrived
        norm = two(value - z)
        peak = torch.where(c.running, torch.maximum(c.peak, norm), c.peak)
        best = torch.minimum(c.best, norm)
        taken = c.taken + pace.block
        due = taken - c.looked >= pace.patience
        stuck = due & ~(best < pace.progress * c.reference)
        done = c.running & within(norm, value, peak)
        lost = c.running & ~done & (stuck | ~norm.isfinite())
        row = c.running[:, None]
        following = _Carried(
            taken=taken,
            looks=c.looks + 1,
            running=c.running & ~done & ~lost,
            lost=c.lost | lost,
            z=torch.where(row, z, c.z),
            value=torch.where(row, value, c.value),
            norm=torch.where(c.running, norm, c.norm),
            steps=torch.where(c.running, taken, c.steps),
            peak=peak,
            best=best,
            reference=torch.where(due, best, c.reference),
            looked=torch.where(due, taken, c.looked),
        )
        return (*following, *steps.go_on(state, arrived, Judged(norm, c.norm, c.taken)))

    nobody = torch.zeros_like(passed)
    none = torch.zeros((), dtype=torch.int64, device=start.device)
    c = _Carried(
        taken=none,
        looks=none.clone(),
        running=~passed,
        lost=nobody,
        z=start.clone(),
        value=value.clone(),
        norm=first,
        steps=torch.zeros_like(passed, dtype=torch.int64),
        peak=first.clone(),
        best=first.clone(),
        reference=first.clone(),
        looked=none.clone(),
    )
    c = _Carried(*while_loop(going, block, (*c, *steps.begin(start, value)))[:_PARTS])
    return Found(c.z, c.value, c.norm, c.steps, ~c.running & ~c.lost, c.peak, c.taken, c.looks)
