"""A primal-dual interior-point method for a batch of convex quadratic programs, each with its own end."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .._solution import Status
from ._active_set import polished
from ._qp_evidence import Measures, certificates
from ._qp_newton import Condensed, Whole
from ._qp_program import Point, Program

_STEP = 0.995
"""Fraction of the way to the boundary that a step takes."""
_PATIENCE = 12
"""Steps without a new best point after which a sample has stalled."""


@dataclass(eq=False, repr=False)
class Ends:
    """How the solves of a batch ended, `(B,)` each, and where.

    Attributes:
        point: the best point of each sample.
        status: members of `Status`.
        residual: the largest of the three relative residuals of the point.
        steps: taken.
        infeasible: whether multipliers were found that no feasible z allows.
        unbounded: whether a direction was found along which the objective falls for ever.
    """

    point: Point
    status: Tensor
    residual: Tensor
    steps: Tensor
    infeasible: Tensor
    unbounded: Tensor

    def put(self, rows: Tensor, other: Ends, samples: Tensor) -> None:
        """Write what became of some samples of another batch into rows of this one."""
        for mine, theirs in ((self, other), (self.point, other.point)):
            for f in fields(mine):
                if f.name != "point":
                    getattr(mine, f.name).index_copy_(0, rows, getattr(theirs, f.name).index_select(0, samples))


def solve(of: Program, rtol: float, max_steps: int) -> Ends:
    """Solve every sample; Mehrotra's predictor and corrector (1992), as Nocedal & Wright (2006), §16.6, have it.

    Args:
        of: the programs; finite.
        rtol: for the largest of the relative residuals of primal and dual feasibility and of the gap.
        max_steps: at most.
    """
    batch = of.p.shape[0]
    point = _start(of)
    at = Measures(of, point)
    first = at.sizes()
    blank = of.p.new_zeros(batch)
    ends = Ends(
        point=Point(*(t.clone() for t in (point.z, point.s, point.lam, point.nu))),
        status=torch.full((batch,), int(Status.MAX_STEPS), device=of.p.device),
        residual=torch.full_like(blank, torch.inf),
        steps=torch.zeros_like(blank, dtype=torch.long),
        infeasible=torch.zeros_like(blank, dtype=torch.bool),
        unbounded=torch.zeros_like(blank, dtype=torch.bool),
    )
    near = max(torch.finfo(of.p.dtype).eps ** 0.25, rtol)
    rows = torch.arange(batch, device=of.p.device)
    best, merit, since = point, torch.full_like(blank, torch.inf), torch.zeros_like(rows)
    tried = torch.full_like(point.lam, -1, dtype=torch.int8)
    for step in range(max_steps + 1):
        now = at.merit(first)
        now = torch.where(now.isfinite(), now, torch.inf)
        better = now < merit
        best, since = point.where(better, best), torch.where(better, 0, since + 1)
        merit = torch.where(better, now, merit)
        # A set of active constraints that was wrong once is not tried again, but at the end.
        held = best.lam > best.s
        guess = better & (merit <= near) & ((held != tried).any(1) | (merit <= rtol))
        tried = torch.where(guess[:, None], held, tried)
        guess = guess.nonzero()[:, 0]
        if guess.numel():
            best, merit = polished(of, best, merit, first, guess, rtol)
        converged = merit <= rtol
        infeasible, unbounded = (flag & ~converged for flag in certificates(of, at))
        lost = ~now.isfinite() | (since > _PATIENCE)
        done = converged | infeasible | unbounded | lost
        if step == max_steps:
            done = torch.ones_like(done)
        out = done.nonzero()[:, 0]
        if out.numel():
            status = torch.where(converged, int(Status.CONVERGED), int(Status.MAX_STEPS))
            status = torch.where(lost & ~converged, int(Status.STALLED), status)
            status = torch.where(infeasible | unbounded, int(Status.DIVERGED), status)
            reached = Ends(best, status, merit, torch.full_like(rows, step), infeasible, unbounded)
            ends.put(rows.index_select(0, out), reached, out)
            left = (~done).nonzero()[:, 0]
            if not left.numel():
                break
            of, point, best = of.select(left), point.select(left), best.select(left)
            rows, merit, since, first, tried = (t.index_select(0, left) for t in (rows, merit, since, first, tried))
            at = Measures(of, point)
        point = _advance(of, point, at)
        at = Measures(of, point)
    return ends


def _start(of: Program) -> Point:
    """The least squares of all constraints, then moved inside (Vandenberghe 2010, §5.3)."""
    one = torch.ones_like(of.h)
    z, _, nu, Gz = Condensed(of, one, one).solve(-of.p, of.h, of.b)
    slack = of.h - Gz

    def inside(t: Tensor) -> Tensor:
        if not t.shape[1]:
            return t
        unit = t.abs().amax(1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        lowest = t.amin(1, keepdim=True)
        return torch.where(lowest > 1e-3 * unit, t, t - lowest + 0.1 * unit)

    return Point(z, inside(slack), inside(-slack), nu)


def _advance(of: Program, point: Point, at: Measures) -> Point:
    """One step of each sample, with the condensed system while it loses no more than a quarter of the digits."""
    if not of.h.shape[1]:
        return _step(of, point, at, Whole)
    # How large GᵀG is beside Q makes λ/s a pure number.
    curvature, slope = of.sizes[:, 0], of.sizes[:, 1]
    ratio = slope.square() / torch.where(curvature > 0, curvature, 1.0)
    stiff = (point.lam / point.s).amax(1) * ratio > torch.finfo(of.p.dtype).eps ** -0.4
    groups = [(rows, kind) for rows, kind in ((stiff, Whole), (~stiff, Condensed)) if bool(rows.any())]
    if len(groups) == 1:
        return _step(of, point, at, groups[0][1])
    new = point
    for chosen, kind in groups:
        rows = chosen.nonzero()[:, 0]
        some, old = of.select(rows), point.select(rows)
        new = new.put(rows, _step(some, old, Measures(some, old), kind))
    return new


def _step(of: Program, point: Point, at: Measures, kind: type[Whole] | type[Condensed]) -> Point:
    factors = kind(of, point.s, point.lam)

    def direction(complementarity: Tensor) -> Point:
        """Of Newton's method for the residuals, and `s∘λ` to fall by `complementarity`."""
        # Δs = −(Gz + s − h) − GΔz, in λ∘Δs + s∘Δλ = −complementarity.
        z, lam, nu, Gz = factors.solve(-at.dual, complementarity - point.lam * at.inequality, -at.equality)
        return Point(z, -at.inequality - Gz, lam, nu)

    count = point.s.shape[1]
    product = point.s * point.lam
    if not count:
        whole = torch.ones_like(at.gap)
        return point.along(direction(product), whole, whole)
    affine = direction(product)
    ahead = point.along(affine, _length(point.s, affine.s, 1.0), _length(point.lam, affine.lam, 1.0))
    mean = at.gap / count
    centring = ((ahead.s * ahead.lam).sum(1) / count / mean).clamp(0.0, 1.0) ** 3
    step = direction(product + affine.s * affine.lam - (centring * mean)[:, None])
    primal, dual = _length(point.s, step.s, _STEP), _length(point.lam, step.lam, _STEP)
    # One length for both where Q couples them.
    both = torch.minimum(primal, dual)
    curved = of.sizes[:, 0] > 0
    return point.along(step, torch.where(curved, both, primal), torch.where(curved, both, dual))


def _length(t: Tensor, change: Tensor, fraction: float) -> Tensor:
    """The longest step in (0, 1] that leaves t positive, `(B,)`, or that fraction of the way to the boundary."""
    ratio = torch.where(change < 0, -t / change, torch.inf)
    return (fraction * ratio.amin(1)).clamp(max=1.0)
