"""`check_gradients`: directional derivatives by backward beside finite differences, and a verdict in one line."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Never

import torch
from torch import Tensor, nn

from .._options import refuse_unknown
from .._solution import PyTree
from ._gradient_check import DirectionCheck, GradientCheck, Verdict
from ._ridders import derivative
from ._subject import Subject, as_real, check_seed, inner, random_like

_OPTIONS = ("directions", "seed", "tolerance")
_STEP = 0.125
"""The largest step, relative to the size of a tensor."""
_SURE = 5.0
"""Times its uncertainty that a difference must be to count."""
_ENOUGH = 1e-3
"""Part of the tolerance to which finite differences are wanted."""


def check_gradients(
    layer: nn.Module | Callable[..., PyTree],
    *inputs: PyTree,
    directions: int = 8,
    seed: int = 0,
    tolerance: float | None = None,
    **unknown: Never,
) -> GradientCheck:
    """Compare backward with finite differences along random directions, for any module or function.

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.TanhEquilibrium(6, dtype=torch.float64)
    >>> print(ti.check_gradients(layer, torch.randn(4, 6, dtype=torch.float64)))  # doctest: +ELLIPSIS
    gradients agree with finite differences: worst relative error ... in 8 directions (uncertainty ..., tolerance 6e-06)
    >>> assert ti.check_gradients(layer, torch.randn(6, dtype=torch.float64))  # in a test

    For each direction d, standard normal and scaled in each tensor by its root mean square (1 where that is zero), and
    for a standard normal cotangent v, `⟨∇, d⟩` is compared with the derivative of `⟨v, layer(θ + h d)⟩` at h = 0, found
    by Ridders' method: central differences with a step that shrinks from 1/8, extrapolated, and an estimate of what
    they are worth. θ is everything that `gradient_error` differentiates by: parameters, inputs, leaves of a closure. A
    direction

    - *agrees* if the error and the uncertainty are both within the tolerance,
    - *differs* if the error is beyond it and more than 5 times the uncertainty,
    - is *inconclusive* otherwise.

    An implicit layer solves up to a tolerance, which finite differences see and the gradient does not. A direction that
    does not agree is therefore tried again with the solvers of the layers of a module at `rtol` near rounding. If it
    agrees then, it was inconclusive; if it still differs, it differs. If samples are not solved even then, it is
    inconclusive. A solver inside a function cannot be reached: tighten its `rtol` yourself.

    Takes some 20 evaluations of the whole batch for a direction, up to 50 where they are noisy. Parameters are moved in
    place and put back, bit for bit; so are modes, buffers, `.grad` and torch's random numbers, which are the same for
    every evaluation, so that a layer with dropout can be checked. Use float64: in float32 errors below some 1e-3
    go unnoticed, and below that precision there is hardly anything to be seen.

    Args:
        layer: a module; or a function of the inputs. It returns a tensor, a pytree of tensors, or a `Solution`.
        inputs: handed to layer; every floating-point or complex tensor is differentiated by.
        directions: how many.
        seed: of directions and cotangents.
        tolerance: relative error up to which derivatives agree; None is `ε^(1/3)`: 6e-6 in float64, 5e-3 in float32.

    Returns:
        A `GradientCheck`, true if all directions agree; print it for the verdict, and its `table()` for the directions.

    Raises:
        TypeError: unknown option; layer is not callable, or returns no tensors.
        ValueError: an option out of range; nothing to differentiate by, or an output that does not depend on it.
    """
    refuse_unknown("check_gradients", unknown, _OPTIONS)
    _check(directions, tolerance)
    check_seed("check_gradients", seed)
    subject = Subject.of("check_gradients", layer, inputs, {})
    within = subject.epsilon ** (1 / 3) if tolerance is None else float(tolerance)
    dtype = max((t.dtype for t in subject.leaves.values()), key=lambda d: torch.finfo(d).eps)
    probe = _Probe(subject, within)
    repeatability = probe.repeatability()
    # An error δ of the output is one of δ/h of the difference; a NaN is no obstacle here, and seen in each direction.
    if repeatability > _STEP * within:
        return GradientCheck("inconclusive", (), within, repeatability, dtype)
    generator = torch.Generator().manual_seed(seed)
    checks = tuple(probe.check(generator) for _ in range(directions))
    found = {check.verdict for check in checks}
    verdict: Verdict = "differ" if "differ" in found else "inconclusive" if "inconclusive" in found else "agree"
    return GradientCheck(verdict, checks, within, repeatability, dtype)


class _Probe:
    """Evaluates a subject at `θ + h d`."""

    def __init__(self, subject: Subject, tolerance: float) -> None:
        self._subject = subject
        self._tolerance = tolerance
        self._leaves = list(subject.leaves.values())
        self._saved = [leaf.detach().clone() for leaf in self._leaves]
        sizes = [float(as_real(leaf).square().mean().sqrt()) if leaf.numel() else 0.0 for leaf in self._leaves]
        self._scales = [size if 0.0 < size < math.inf else 1.0 for size in sizes]

    def repeatability(self) -> float:
        """Relative distance of two outputs at the same point."""
        first, second = self._outputs(), self._outputs()
        size = inner(first, first) ** 0.5
        difference = [as_real(a) - as_real(b) for a, b in zip(first, second, strict=True)]
        apart = inner(difference, difference) ** 0.5
        return apart / size if size > 0 else math.inf if apart > 0 else 0.0

    def check(self, generator: torch.Generator) -> DirectionCheck:
        """The next random direction."""
        normal = random_like(self._leaves, generator)
        direction = [d * scale for d, scale in zip(normal, self._scales, strict=True)]
        seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        check = self._compare(direction, seed)
        if check.verdict == "agree" or not self._subject.layers:
            return check
        with self._subject.with_tolerance(self._subject.epsilon ** (5 / 6)):
            tightened = self._compare(direction, seed)
        verdict = "differ" if tightened.verdict == "differ" else "inconclusive"
        return replace(check, verdict=verdict, tightened=tightened)

    def _compare(self, direction: list[Tensor], seed: int) -> DirectionCheck:
        """Backward beside finite differences."""
        subject = self._subject
        with subject.untouched(), subject.with_options(on_failure="ignore"):
            run = subject.run({})
            cotangents = random_like(run.outputs, torch.Generator().manual_seed(seed))
            gradients = list(subject.gradients(run.outputs, cotangents).values())
        unsolved = sum(int((~s.converged).sum()) for s in run.solutions)
        spread = math.hypot(
            *(float((as_real(v) * as_real(y)).norm()) for v, y in zip(cotangents, run.outputs, strict=True))
        )
        del run
        backward = inner(gradients, direction)
        # The square root of the mean of ⟨∇, d⟩² over all d: an accidental zero is no reason for a large relative error.
        expected = math.hypot(
            *(scale * inner([g], [g]) ** 0.5 for g, scale in zip(gradients, self._scales, strict=True))
        )
        size = max(abs(backward), expected)
        # What one rounding of every entry of the outputs, and of θ, does to ⟨v, layer(θ)⟩, as a root mean square.
        known = size if math.isfinite(size) else 0.0
        noise = subject.epsilon * math.hypot(known, spread)
        found = derivative(
            lambda step: inner(cotangents, self._outputs(direction, step)),
            _STEP,
            _ENOUGH * self._tolerance * known,
            noise,
        )
        if not math.isfinite(found.value):
            error = uncertainty = math.inf
        elif not math.isfinite(size):
            error, uncertainty = math.inf, _ratio(found.error, abs(found.value))
        else:
            size = max(size, abs(found.value))
            error, uncertainty = _ratio(abs(backward - found.value), size), _ratio(found.error, size)
        verdict = _judge(error, uncertainty, self._tolerance)
        return DirectionCheck(
            backward=backward,
            finite_difference=found.value,
            error=error,
            uncertainty=uncertainty,
            step=found.step,
            unsolved=unsolved,
            verdict="inconclusive" if unsolved and verdict == "differ" else verdict,
        )

    def _outputs(self, direction: Sequence[Tensor] = (), step: float = 0.0) -> list[Tensor]:
        """The outputs at `θ + h d`."""
        subject = self._subject
        moved = zip(self._leaves, self._saved, direction, strict=True) if direction else ()
        with subject.untouched(), subject.with_options(on_failure="ignore"):
            try:
                for leaf, saved, d in moved:
                    # `.data`: to a graph of the caller's this is no in-place change, and is none once it is undone.
                    leaf.data.copy_(saved + step * d)
                return [t.detach() for t in subject.run({}).outputs]
            finally:
                for leaf, saved in zip(self._leaves, self._saved, strict=True):
                    leaf.data.copy_(saved)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else part


def _judge(error: float, uncertainty: float, tolerance: float) -> Verdict:
    if max(error, uncertainty) <= tolerance:
        return "agree"
    return "differ" if error > tolerance and error > _SURE * uncertainty else "inconclusive"


def _check(directions: Any, tolerance: Any) -> None:
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
        raise ValueError(f"check_gradients: directions={directions!r} is not valid; give an integer >= 1.")
    if tolerance is None:
        return
    ok = isinstance(tolerance, int | float) and not isinstance(tolerance, bool) and 0 < tolerance < 1
    if not ok:
        raise ValueError(f"check_gradients: tolerance={tolerance!r} is not valid; give a number in (0, 1), or None.")
