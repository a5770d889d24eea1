"""A primal-dual interior-point method for a batch of convex quadratic programs, each with its own end."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .._solution import Status

_STEP = 0.995
"""Fraction of the way to the boundary that a step takes."""
_PATIENCE = 12
"""Steps without a new best point after which a sample has stalled."""


@dataclass
class Program:
    """`min ½zᵀQz + pᵀz` subject to `Gz ≤ h`, `Az = b`; the batch in front: `(B, n, n)`, `(B, n)`, `(B, m, n)`, ….

    Q is symmetric; there may be no rows in G or A.
    """

    Q: Tensor
    p: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor

    def select(self, samples: Tensor) -> Program:
        """Some samples, by their indices."""
        return Program(*(getattr(self, f.name).index_select(0, samples) for f in fields(self)))


@dataclass
class Point:
    """A primal-dual point: `z` `(B, n)`, slack `s > 0` and multipliers `lam > 0` of `G`, multipliers `nu` of `A`."""

    z: Tensor
    s: Tensor
    lam: Tensor
    nu: Tensor

    def select(self, samples: Tensor) -> Point:
        """Some samples, by their indices."""
        return Point(*(getattr(self, f.name).index_select(0, samples) for f in fields(self)))

    def along(self, step: Point, primal: Tensor, dual: Tensor) -> Point:
        """The point `self + length·step`, with a length `(B,)` for each half."""
        primal, dual = primal[:, None], dual[:, None]
        return Point(
            self.z + primal * step.z,
            self.s + primal * step.s,
            self.lam + dual * step.lam,
            self.nu + dual * step.nu,
        )

    def where(self, samples: Tensor, other: Point) -> Point:
        """This point for some samples, `(B,)` bool, and another one for the rest."""
        return Point(
            *(torch.where(samples[:, None], getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )


@dataclass
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

    def put(self, rows: Tensor, other: Ends) -> None:
        """Write what became of some samples."""
        for f in fields(self):
            if f.name != "point":
                getattr(self, f.name).index_copy_(0, rows, getattr(other, f.name))
        for f in fields(self.point):
            getattr(self.point, f.name).index_copy_(0, rows, getattr(other.point, f.name))


def mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """`(B, m, n)` times `(B, n)`."""
    return torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)


def largest(*vectors: Tensor) -> Tensor:
    """The largest absolute value in several `(B, k)`, `(B,)`; 0 if there is nothing."""
    return torch.cat(vectors, dim=1).abs().amax(dim=1) if any(v.shape[1] for v in vectors) else vectors[0].sum(1)


class _Measures:
    """Residuals at a point, and how large they are beside what they are differences of."""

    def __init__(self, of: Program, at: Point) -> None:
        self.Qz, Gz, Az = mv(of.Q, at.z), mv(of.G, at.z), mv(of.A, at.z)
        self.pulled = mv(of.G.mT, at.lam) + mv(of.A.mT, at.nu)
        self.dual = self.Qz + of.p + self.pulled
        self.inequality, self.equality = Gz + at.s - of.h, Az - of.b
        self.gap = (at.s * at.lam).sum(1)
        self.Gz, self.Az = Gz, Az
        self.primal_size = largest(Gz, at.s, of.h, Az, of.b)
        self.dual_size = largest(self.Qz, of.p, self.pulled)
        linear, curved = (of.p * at.z).sum(1), (self.Qz * at.z).sum(1)
        supply = (of.h * at.lam).sum(1) + (of.b * at.nu).sum(1)
        self.linear, self.supply = linear, supply
        self.gap_size = torch.stack([linear.abs(), curved.abs(), supply.abs()]).amax(0)

    def merit(self, first: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The largest of the relative residuals: primal, dual and gap, `(B,)`."""
        parts = (
            (largest(self.inequality, self.equality), torch.maximum(self.primal_size, first[0])),
            (largest(self.dual), torch.maximum(self.dual_size, first[1])),
            (self.gap, torch.maximum(self.gap_size, first[2])),
        )
        return torch.stack([value / torch.where(size > 0, size, 1.0) for value, size in parts]).amax(0)

    def sizes(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the residuals are at this point: nothing need be smaller than rounding beside where it began."""
        return largest(self.inequality, self.equality), largest(self.dual), self.gap


def solve(of: Program, rtol: float, max_steps: int) -> Ends:
    """Solve every sample; Mehrotra's predictor and corrector (1992), as Nocedal & Wright (2006), §16.6, have it.

    Args:
        of: the programs; finite.
        rtol: for the largest of the relative residuals of primal and dual feasibility and of the gap.
        max_steps: at most.
    """
    batch = of.p.shape[0]
    point = _start(of)
    first = _Measures(of, point).sizes()
    blank = of.p.new_zeros(batch)
    ends = Ends(
        point=Point(*(t.clone() for t in (point.z, point.s, point.lam, point.nu))),
        status=torch.full((batch,), int(Status.MAX_STEPS), device=of.p.device),
        residual=torch.full_like(blank, torch.inf),
        steps=torch.zeros_like(blank, dtype=torch.long),
        infeasible=torch.zeros_like(blank, dtype=torch.bool),
        unbounded=torch.zeros_like(blank, dtype=torch.bool),
    )
    near = torch.finfo(of.p.dtype).eps ** 0.25
    rows = torch.arange(batch, device=of.p.device)
    best, merit, since = point, torch.full_like(blank, torch.inf), torch.zeros_like(rows)
    tried = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(max_steps + 1):
        at = _Measures(of, point)
        now = at.merit(first)
        now = torch.where(now.isfinite(), now, torch.inf)
        better = now < merit
        best, since = point.where(better, best), torch.where(better, 0, since + 1)
        merit = torch.where(better, now, merit)
        # Once when near, and once when there.
        guess = (~tried & (merit <= max(near, rtol))) | (merit <= rtol)
        if bool(guess.any()):
            tried |= guess
            best, merit = _polished(of, best, merit, first, guess.nonzero()[:, 0], rtol)
        converged = merit <= rtol
        infeasible, unbounded = (flag & ~converged for flag in _certificates(of, point, at))
        lost = ~now.isfinite() | (since > _PATIENCE)
        done = converged | infeasible | unbounded | lost
        if step == max_steps:
            done = torch.ones_like(done)
        if bool(done.any()):
            status = torch.where(converged, int(Status.CONVERGED), int(Status.MAX_STEPS))
            status = torch.where(lost & ~converged, int(Status.STALLED), status)
            status = torch.where(infeasible | unbounded, int(Status.DIVERGED), status)
            out = done.nonzero()[:, 0]
            reached = Ends(best, status, merit, torch.full_like(rows, step), infeasible, unbounded)
            ends.put(rows.index_select(0, out), _chosen(reached, out))
            left = (~done).nonzero()[:, 0]
            if not left.numel():
                break
            of, point, best = of.select(left), point.select(left), best.select(left)
            rows, merit, since, tried = (t.index_select(0, left) for t in (rows, merit, since, tried))
            first = (first[0][left], first[1][left], first[2][left])
        point = _advance(of, point)
    return ends


def _polished(
    of: Program, best: Point, merit: Tensor, first: tuple[Tensor, Tensor, Tensor], rows: Tensor, rtol: float
) -> tuple[Point, Tensor]:
    """Some samples with `λ > s` taken for the active constraints, and the linear system that is left solved.

    Where that satisfies the conditions it is the solution to rounding, and the steps to come are spared; an interior
    point is as far as the square root of the gap from a solution near a kink (Stellato et al. 2020, §5.2).
    """
    some, old = of.select(rows), best.select(rows)
    held = (old.lam > old.s).to(old.s.dtype)
    z, lam, nu = _Factors(some, 1.0 - held, held).solve(-some.p, held * some.h, some.b)
    slack = (1.0 - held) * (some.h - mv(some.G, z)).clamp(min=0.0)
    new = Point(z, slack, torch.where(held > 0, lam.clamp(min=0.0), 0.0), nu)
    found = _Measures(some, new).merit((first[0][rows], first[1][rows], first[2][rows]))
    before = merit.index_select(0, rows)
    # Steps need positive slacks: it is no point to go on from.
    better = (found <= rtol) & (found <= before)
    chosen = new.where(better, old)
    put = Point(*(getattr(best, f.name).index_copy(0, rows, getattr(chosen, f.name)) for f in fields(best)))
    return put, merit.index_copy(0, rows, torch.where(better, found, before))


def _chosen(ends: Ends, rows: Tensor) -> Ends:
    parts: dict[str, Any] = {f.name: getattr(ends, f.name) for f in fields(ends)}
    chosen: dict[str, Any] = {
        k: v.select(rows) if isinstance(v, Point) else v.index_select(0, rows) for k, v in parts.items()
    }
    return Ends(**chosen)


def _start(of: Program) -> Point:
    """The least squares of all constraints, then moved inside (Vandenberghe 2010, §5.3)."""
    one = torch.ones_like(of.h)
    z, _, nu = _Factors(of, one, one).solve(-of.p, of.h, of.b)
    slack = of.h - mv(of.G, z)

    def inside(t: Tensor) -> Tensor:
        if not t.shape[1]:
            return t
        unit = t.abs().amax(1, keepdim=True)
        unit = torch.where(unit > 0, unit, 1.0)
        lowest = t.amin(1, keepdim=True)
        return torch.where(lowest > 1e-3 * unit, t, t - lowest + 0.1 * unit)

    return Point(z, inside(slack), inside(-slack), nu)


class _Factors:
    """Newton's matrix for the KKT conditions, `[[Q, Gᵀ, Aᵀ], [λ∘G, −s, 0], [A, 0, 0]]`, middle rows over `max(λ, s)`.

    Twice the unknowns of `Q + Gᵀ(λ/s)G`, and none of its entries grows as slacks go to zero: that one loses half of the
    digits of the multipliers near the end.
    """

    def __init__(self, of: Program, s: Tensor, lam: Tensor) -> None:
        batch, n = of.p.shape
        m, k = of.h.shape[1], of.b.shape[1]
        self.scale = torch.maximum(lam, s)
        matrix = of.p.new_zeros(batch, n + m + k, n + m + k)
        matrix[:, :n, :n] = of.Q
        matrix[:, :n, n : n + m] = of.G.mT
        matrix[:, :n, n + m :] = of.A.mT
        matrix[:, n : n + m, :n] = of.G * (lam / self.scale).unsqueeze(-1)
        matrix[:, n + m :, :n] = of.A
        self.matrix = matrix
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal[:, n : n + m] = -s / self.scale
        # Where Q is singular, or rows of A depend on each other, this chooses one of many solutions.
        shift = 8 * torch.finfo(matrix.dtype).eps * matrix.flatten(1).abs().amax(1)
        shifted = matrix.clone()
        diagonal = shifted.diagonal(dim1=1, dim2=2)
        diagonal[:, :n] += shift[:, None]
        diagonal[:, n + m :] -= shift[:, None]
        self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(shifted)
        self.parts = [n, m, k]

    def solve(self, dual: Tensor, complementarity: Tensor, equality: Tensor) -> tuple[Tensor, ...]:
        """`(Δz, Δλ, Δν)` for the right-hand sides of the three groups of rows."""
        right = torch.cat([dual, complementarity / self.scale, equality], dim=1).unsqueeze(-1)
        found = torch.linalg.lu_solve(self.factors, self.pivots, right)
        rest = right - torch.matmul(self.matrix, found)
        found = found + torch.linalg.lu_solve(self.factors, self.pivots, rest)
        return found.squeeze(-1).split(self.parts, dim=1)


class _Condensed:
    """The same system without `Δλ`, `[[Q + GᵀDG, Aᵀ], [A, 0]]` with `D = λ/s`: half the size, for far from the end."""

    def __init__(self, of: Program, s: Tensor, lam: Tensor) -> None:
        n, k = of.p.shape[1], of.b.shape[1]
        self.of, self.s, self.weight, self.n = of, s, lam / s, n
        matrix = of.p.new_zeros(of.p.shape[0], n + k, n + k)
        matrix[:, :n, :n] = torch.baddbmm(of.Q, of.G.mT * self.weight[:, None, :], of.G)
        matrix[:, n:, :n] = of.A
        matrix[:, :n, n:] = of.A.mT
        shift = 8 * torch.finfo(matrix.dtype).eps * matrix.flatten(1).abs().amax(1)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal[:, :n] += shift[:, None]
        diagonal[:, n:] -= shift[:, None]
        self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def solve(self, dual: Tensor, complementarity: Tensor, equality: Tensor) -> tuple[Tensor, ...]:
        """As that of `_Factors`."""
        rest = complementarity / self.s
        right = torch.cat([dual + mv(self.of.G.mT, rest), equality], dim=1).unsqueeze(-1)
        found = torch.linalg.lu_solve(self.factors, self.pivots, right).squeeze(-1)
        z, nu = found[:, : self.n], found[:, self.n :]
        return z, self.weight * mv(self.of.G, z) - rest, nu


def _advance(of: Program, point: Point) -> Point:
    """One step of each sample, with the condensed system while it loses no more than a quarter of the digits."""
    if not of.h.shape[1]:
        return _step(of, point, _Factors)
    stiff = (point.lam / point.s).amax(1) * _curvature(of) > torch.finfo(of.p.dtype).eps ** -0.4
    groups = [(rows, kind) for rows, kind in ((stiff, _Factors), (~stiff, _Condensed)) if bool(rows.any())]
    if len(groups) == 1:
        return _step(of, point, groups[0][1])
    new = point
    for chosen, kind in groups:
        rows = chosen.nonzero()[:, 0]
        part = _step(of.select(rows), point.select(rows), kind)
        new = Point(*(getattr(new, f.name).index_copy(0, rows, getattr(part, f.name)) for f in fields(new)))
    return new


def _curvature(of: Program) -> Tensor:
    """How large `GᵀG` is beside Q, `(B,)`; that which makes `λ/s` a pure number."""
    size = largest(of.Q.flatten(1))
    return largest(of.G.flatten(1)) ** 2 / torch.where(size > 0, size, 1.0)


def _step(of: Program, point: Point, kind: type[_Factors] | type[_Condensed]) -> Point:
    at, factors = _Measures(of, point), kind(of, point.s, point.lam)

    def direction(complementarity: Tensor) -> Point:
        """Of Newton's method for the residuals, and `s∘λ` to fall by `complementarity`."""
        # Δs = −(Gz + s − h) − GΔz, in λ∘Δs + s∘Δλ = −complementarity.
        z, lam, nu = factors.solve(-at.dual, complementarity - point.lam * at.inequality, -at.equality)
        return Point(z, -at.inequality - mv(of.G, z), lam, nu)

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
    curved = of.Q.flatten(1).abs().amax(1) > 0
    return point.along(step, torch.where(curved, both, primal), torch.where(curved, both, dual))


def _length(t: Tensor, change: Tensor, fraction: float) -> Tensor:
    """The longest step in (0, 1] that leaves t positive, `(B,)`, or that fraction of the way to the boundary."""
    ratio = torch.where(change < 0, -t / change, torch.inf)
    return (fraction * ratio.amin(1)).clamp(max=1.0)


def _certificates(of: Program, point: Point, at: _Measures) -> tuple[Tensor, Tensor]:
    """Whether there is no feasible point, and whether there is no dual feasible one, `(B,)` bool each.

    Farkas: `λ ≥ 0` and `hᵀλ + bᵀν < 0` leave no feasible z with `‖z‖₁ < |hᵀλ + bᵀν| / ‖Gᵀλ + Aᵀν‖_∞`; where that is
    `1/√ε` times the natural length `max|h, b| / max|G, A|` there is none for all that can be computed. And in the same
    way a direction z with `pᵀz < 0` that `Qz = 0`, `Gz ≤ 0`, `Az = 0` hold for, beside the multipliers' natural size.
    """
    far = torch.finfo(point.z.dtype).eps ** -0.5
    matrix = torch.maximum(largest(of.G.flatten(1), of.A.flatten(1)), largest(of.p * 0))
    length = largest(of.h, of.b)
    infeasible = (at.supply < 0) & (-at.supply * matrix >= far * length * largest(at.pulled))
    rising = torch.maximum(largest(at.Gz.clamp(min=0.0)), largest(at.Az)) * largest(of.p)
    curvature = largest(of.Q.flatten(1))
    bend = largest(at.Qz) * largest(of.p) / torch.where(curvature > 0, curvature, 1.0)
    rise = rising / torch.where(matrix > 0, matrix, 1.0)
    unbounded = (at.linear < 0) & (-at.linear >= far * torch.maximum(rise, bend))
    return infeasible & (at.supply != 0), unbounded
