"""The end of an interior-point solve, made exact: the active constraints guessed, and the guess verified."""

from __future__ import annotations

import torch
from torch import Tensor

from ._qp_evidence import Measures
from ._qp_newton import refined
from ._qp_program import Point, Program, mv

_SETS = 3
"""Sets of active constraints that are tried from one interior point."""


def polished(of: Program, best: Point, merit: Tensor, first: Tensor, rows: Tensor, rtol: float) -> tuple[Point, Tensor]:
    """The best points and their merits, `(B,)`, after a guess at some rows; `first` as in `Measures.merit`.

    The constraints with `λ > s` are taken for the active ones, and the linear system that is left is solved. Where that
    satisfies the conditions it is the solution to rounding, and the steps to come are spared; an interior point is as
    far as the square root of the gap from a solution near a kink (Stellato et al. 2020, §5.2). Where it does not, the
    signs of its multipliers and slacks are the next guess (the primal-dual active set method; Hintermüller, Ito &
    Kunisch 2002, §2).
    """
    some, old, begun = of.select(rows), best.select(rows), first.index_select(0, rows)
    before, held = merit.index_select(0, rows), old.lam > old.s
    for _ in range(_SETS):
        new, multipliers, slack = _solution(some, held)
        found = Measures(some, new).merit(begun)
        # Steps need positive slacks: it is no point to go on from.
        better = (found <= rtol) & (found <= before)
        best = best.put(rows, new.where(better, old))
        merit = merit.index_copy(0, rows, torch.where(better, found, before))
        other = torch.where(held, multipliers > 0, slack < 0)
        left = (~better & (other != held).any(1)).nonzero()[:, 0]
        if not left.numel():
            break
        some, old = some.select(left), old.select(left)
        rows, begun, before, held = (t.index_select(0, left) for t in (rows, begun, before, other))
    return best, merit


def _solution(of: Program, held: Tensor) -> tuple[Point, Tensor, Tensor]:
    """The minimiser if the inequalities that are held, `(B, m)` bool, are equations and the others are not there.

    Also the multipliers and slacks as they are before those of the wrong sign become zeros in the point.
    """
    active = held.to(of.p.dtype)
    z, lam, nu = refined(of, 1.0 - active, active, (-of.p, active * of.h, of.b))
    slack = of.h - mv(of.G, z)
    return Point(z, torch.where(held, 0.0, slack.clamp(min=0.0)), lam.clamp(min=0.0), nu), lam, slack
