"""Bracketed scalar equations, the whole batch at once: bisection, and Chandrupatla's hybrid with interpolation."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from .._solution import Status
from ._base import Solver, Step

_BLOCK = 2**15
"""Rows per thread that a CPU takes through all of a step's passes at a time, so that they stay in its cache."""
_CLOSED_EVERY = 16
"""Looks of the loop between two at whether a bracket can still be divided: few ever cannot, and none soon."""


@dataclass(eq=False, repr=False)
class _Bracket:
    """One bracket per sample, `(B, 1)` each; `f` is the residual, up to one sign for all.

    Attributes:
        z: the newest end.
        f: there.
        other_z: the other end, where f has the other sign.
        other_f: there, at most a quarter of the largest number.
        best_z: where `|f|` was smallest so far.
        best_f: there.
        trial: where the next step evaluates.
        t: the place of `trial` on the way from `z` to `other_z`.
        past: `|f − other_f|`; bisection lets this and `t` be.
        failure: `(B,)`, what is wrong with the brackets given; None if nothing is, and after the first step.
        step: steps taken.
    """

    z: Tensor
    f: Tensor
    other_z: Tensor
    other_f: Tensor
    best_z: Tensor
    best_f: Tensor
    trial: Tensor
    t: Tensor
    past: Tensor
    failure: Tensor | None = None
    step: int = 0

    def blocks(self) -> Iterator["_Bracket"]:
        """Views of some rows at a time."""
        size = _BLOCK * torch.get_num_threads() if self.z.device.type == "cpu" else self.z.shape[0]
        if self.z.shape[0] <= size:
            yield self
            return
        tensors = [getattr(self, f.name) for f in fields(self)][:-2]  # not failure and step
        for rows in zip(*(x.split(size) for x in tensors), strict=True):
            yield _Bracket(*rows)


@dataclass(frozen=True, eq=False, repr=False)
class _Bracketing(Solver[_Bracket]):
    """What both have in common: a bracket whose ends differ in the sign of f, and which a trial point divides."""

    lower: float | Tensor
    upper: float | Tensor

    max_steps: ClassVar[int] = 2200
    patience: ClassVar[int] = 128

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        for name in ("lower", "upper"):
            bound = getattr(self, name)
            if isinstance(bound, Tensor):
                ok = not bound.is_complex() and bound.dtype != torch.bool and bool(bound.isfinite().all())
                object.__setattr__(self, name, bound.detach())  # its graph is of no use, and in the way of a copy
            else:
                ok = isinstance(bound, int | float) and not isinstance(bound, bool) and math.isfinite(bound)
            self._check(ok, f"{name}={_short(bound)} is not valid; give a finite number or a real tensor of them")
        both = f"lower={_short(self.lower)} and upper={_short(self.upper)}"
        try:
            ordered = bool(torch.as_tensor(self.lower < self.upper).all())
        except RuntimeError as error:
            raise ValueError(f"{type(self).__name__}: {both} do not go together: {error}.") from None
        self._check(ordered, f"{both} are no bracket; give lower < upper, for every sample")

    def __eq__(self, other: object) -> bool:
        """Whether all hyper-parameters are equal, tensors in every entry."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((type(self), self.rtol, self.atol, self.norm, self.check_every))

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Bracket:
        """Evaluate fn at both ends.

        Raises:
            ValueError: more than one unknown per sample, bounds that do not broadcast, or z0 outside of them.
        """
        low, high = self._ends(problem, z)
        f, other_f = (_bounded(_signed(problem, problem.evaluate(end))) for end in (low, high))
        best_z, best_f = z, _bounded(_signed(problem, evaluation))
        for end, there in ((low, f), (high, other_f)):
            better = _smaller(there, best_f)
            best_z, best_f = torch.lerp(best_z, end, better), torch.lerp(best_f, there, better)
        past, half = (f - other_f).abs_(), torch.full_like(f, 0.5)
        # The other end is narrowed in place, and fn may have kept its argument.
        bracket = _Bracket(low, f, high.clone(), other_f, best_z, best_f, torch.lerp(low, high, 0.5), half, past)
        defined = ~past.isnan()
        sound = ((f < 0) != (other_f < 0)) & defined
        if not bool(sound.all()):
            kind = torch.where(defined, int(Status.STALLED), int(Status.NONFINITE))
            bracket.failure = torch.where(sound, -1, kind)[:, 0]
        return bracket

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Bracket, active: Tensor | None
    ) -> Step[_Bracket]:
        """Evaluate the trial points, narrow the brackets, and hand over the best points so far."""
        f = _signed(problem, problem.evaluate(state.trial))
        # The loop keeps what it is handed, and fn its argument: these three may not be written over.
        best_z, best_f, trial = (torch.empty_like(f) for _ in range(3))
        new = replace(state, z=state.trial, f=f, best_z=best_z, best_f=best_f, trial=trial, failure=None)
        new.step += 1
        for old, narrowed in zip(state.blocks(), new.blocks(), strict=True):
            self._narrow(old, narrowed)
        if problem.kind == "root":
            found = Evaluation(best_f)
        else:
            found = Evaluation(problem.layout.rounded(best_z) + best_f, residual=best_f)
        return Step(best_z, found, new, self._closed(new, active) if state.failure is None else state.failure)

    def _narrow(self, old: _Bracket, new: _Bracket) -> None:
        """Keep the part of the bracket in which f changes its sign, and aim at the next trial point; in place.

        `torch.lerp` with weights 0.0 and 1.0 selects exactly what is finite. `torch.where` has a branch per entry,
        which a CPU predicts wrongly half of the time. A NaN of fn is NaN in the best value from then on, which is how
        the loop learns of it.
        """
        f, old_f = _bounded(new.f), _bounded(old.f)
        same = (f.sign() * old_f.sign()).ge_(0.0)
        torch.lerp(old.z, old.other_z, same, out=new.other_z)
        torch.lerp(old_f, old.other_f, same, out=new.other_f)
        better = _smaller(f, old.best_f)
        torch.lerp(old.best_z, new.z, better, out=new.best_z)
        torch.lerp(old.best_f, f, better, out=new.best_f)
        torch.lerp(new.z, new.other_z, self._fraction(f, new, same), out=new.trial)

    @abstractmethod
    def _fraction(self, f: Tensor, bracket: _Bracket, same: Tensor) -> Tensor | float:
        """Where between the newest end, 0, and the other, 1, to evaluate next.

        Args:
            f: at the newest end.
            bracket: the new one, with what `t` and `past` were; both are brought up to date.
            same: 1.0 where the newest end took the place of the one before, 0.0 where that is now the other end.
        """

    def _closed(self, bracket: _Bracket, active: Tensor | None) -> Tensor | None:
        """The failures of brackets without a number between their ends, `(B,)`; None if there are none."""
        if bracket.step % (_CLOSED_EVERY * self.check_every):
            return None
        closed = (torch.nextafter(bracket.z, bracket.other_z) == bracket.other_z)[:, 0]
        if active is not None:
            closed &= active
        return torch.where(closed, int(Status.STALLED), -1) if bool(closed.any()) else None

    def _ends(self, problem: Problem, z: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds as `(B, 1)` of the state's dtype."""
        layout = problem.layout
        self._check(
            z.shape[1] == 1,
            f"brackets one real unknown per sample, but z0 of shape {tuple(layout.shapes[0])} has {z.shape[1]} with "
            f"batch_dims={len(layout.batch_shape)} (a complex entry counts as two); give a real z0 and "
            "batch_dims=z0.ndim, so that every entry is a problem of its own",
        )
        shape = layout.shapes[layout.sizes.index(1)]
        ends = []
        for name in ("lower", "upper"):
            end = torch.as_tensor(getattr(self, name), dtype=z.dtype, device=z.device)
            try:
                ends.append(end.expand(shape).reshape(z.shape).contiguous())
            except RuntimeError:
                self._check(
                    False,
                    f"{name} of shape {tuple(end.shape)} does not broadcast to that of z0, {tuple(shape)}; "
                    "give a number, or a tensor that does",
                )
        low, high = ends
        narrow = bool((high - low < torch.inf).all())
        self._check(narrow, f"upper - lower overflows in {z.dtype}; give a narrower bracket, or a z0 of more range")
        inside = not bool(((z < low) | (z > high)).any())
        # It may be the solution already, or a wrong scale for the tolerance.
        self._check(inside, "z0 is not between lower and upper; start (init= of a layer) at (lower + upper) / 2, say")
        return low, high

    def _check(self, ok: bool, otherwise: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}: {otherwise}.")


@dataclass(frozen=True, eq=False, repr=False)
class Bisection(_Bracketing):
    """Halve a bracket `[lower, upper]` at whose ends the residual has different signs; the slowest and surest method.

    Every sample is one equation in one real unknown, so `batch_dims` is `z0.ndim`. A step evaluates fn at the middle
    of the bracket and keeps the half in which the sign changes: one binary digit of z per step, whatever fn is like.

    A sample whose residual has the same sign at both ends is STALLED, and disturbs no other. So is one whose bracket
    has shrunk to two neighbouring floating-point numbers, or has been divided 128 times, with a residual that did not
    fall: a jump, or a pole. One where fn is NaN, at an end or on the way, is NONFINITE; an infinite value is as good as
    any other of its sign. What is handed to the loop is the point with the smallest residual so far, z0 included. z0
    has no other influence but on the scale of the relative tolerance: anywhere in the bracket will do where fn is
    finite.

    Args:
        lower: lower ends, in the units of z; a number, or a tensor that broadcasts to the shape of z0.
        upper: upper ends, likewise; z0 must lie between the two.
    """

    def _fraction(self, f: Tensor, bracket: _Bracket, same: Tensor) -> float:
        return 0.5


@dataclass(frozen=True, eq=False, repr=False)
class Chandrupatla(_Bracketing):
    """Divide a bracket by inverse quadratic interpolation where that is safe, else in the middle: Chandrupatla (1997).

    >>> import torch, torchimplicit as ti
    >>> a = torch.tensor([2.0, 10.0, 30.0], dtype=torch.float64, requires_grad=True)
    >>> solver = ti.Chandrupatla(lower=0.0, upper=4.0)
    >>> sol = ti.root(lambda z, a: z**3 + z - a, torch.zeros_like(a), a, solver=solver, batch_dims=1)
    >>> [round(z, 6) for z in sol.value.tolist()]  # one bracket each
    [1.0, 2.0, 3.0]

    The equation, the failures and the arguments are those of `Bisection`; a third of its steps will do where fn is
    smooth, and no fewer at a kink. With the newest end `(z₁, f₁)`, the other one `(z₂, f₂)` and the end `(z₃, f₃)`
    that the last step dropped, let `ξ = (z₁ − z₂)/(z₃ − z₂)` and `φ = (f₁ − f₂)/(f₃ − f₂)`. The next point is
    `z₁ + t(z₂ − z₁)`. Where `1 − √(1 − ξ) < φ < √ξ`, the parabola z(f) through the three is monotone and gives t by its
    value at f = 0; else `t = ½` (Figure 1 of "A new hybrid quadratic/bisection algorithm for finding the zero of a
    nonlinear function without using derivatives", Adv. Eng. Software 28, 145–149). To the same points, but otherwise:

    1. The condition is written `|ξ − φ| < φ(1 − φ)`, and with the secant's `σ = f₁/(f₁ − f₂)`
       `t = σ (1 − (1 − σ) φ(ξ − φ) / (ξ(1 − φ)))`, which lies in (0, 1) where the condition holds.
    2. `z₃` is not kept: ξ is t or 1 − t of the step before, and `f₃ − f₂` is its `±(f₁ − f₂)`.
    3. t is not kept away from 0 and 1: after a point that rounds to an end of the bracket `φ = 1`, and t is ½.

    Args:
        lower: lower ends, in the units of z; a number, or a tensor that broadcasts to the shape of z0.
        upper: upper ends, likewise; z0 must lie between the two.
    """

    def _fraction(self, f: Tensor, bracket: _Bracket, same: Tensor) -> Tensor:
        gap = f - bracket.other_f
        phi = (gap / bracket.past).abs_()
        xi = (same - bracket.t).abs_()
        torch.abs(gap, out=bracket.past)
        secant = f / gap
        off = xi - phi
        bend = (off * phi).div_(torch.addcmul(xi, xi, phi, value=-1))
        zero = torch.addcmul(secant, torch.addcmul(secant, secant, secant, value=-1), bend, value=-1)
        # False of NaN too: where f is zero, or where it is the same at both points.
        safe = off.abs_() < torch.addcmul(phi, phi, phi, value=-1)
        return bracket.t.copy_(torch.where(safe, zero, 0.5))


def _signed(problem: Problem, evaluation: Evaluation) -> Tensor:
    """The residual up to its sign, which the brackets do not need: for a root, a pass less."""
    return evaluation.value if problem.kind == "root" else evaluation.residual


def _bounded(f: Tensor) -> Tensor:
    """Values whose differences are finite."""
    limit = torch.finfo(f.dtype).max / 4
    return f.clamp(-limit, limit)


def _smaller(f: Tensor, other: Tensor) -> Tensor:
    """1.0 where `|f| < |other|`, else 0.0."""
    return f.abs().lt_(other.abs())


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _short(bound: object) -> str:
    """A bound in an error message: a tensor of a million entries by its shape."""
    return f"(tensor of shape {tuple(bound.shape)})" if isinstance(bound, Tensor) and bound.ndim else repr(bound)
