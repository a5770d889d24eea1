"""Systems with hundreds of unknowns: Bratu's equation up to its fold, Chandrasekhar's near c = 1, two of MGH's."""

from functools import partial
from typing import Any

from . import mgh
from ._problem import Array, Problem
from .classical import chandrasekhar

SIDE = 32
"""Inner grid points along each side of Bratu's unit square."""

FOLD = 6.8067
"""λ above which the discrete equation on this grid has no root; 6.8081 in the continuum."""


def bratu(z: Array, xp: Any, strength: float, side: int = SIDE) -> Array:
    """`−Δu − λ exp(u)` on the unit square, u = 0 on the boundary, with the five-point Laplacian; λ is `strength`."""
    u = z.reshape((*z.shape[:-1], side, side))
    row, column = xp.zeros_like(u[..., :1, :]), xp.zeros_like(u[..., :1])
    below, above = xp.concatenate([row, u[..., :-1, :]], -2), xp.concatenate([u[..., 1:, :], row], -2)
    left, right = xp.concatenate([column, u[..., :-1]], -1), xp.concatenate([u[..., 1:], column], -1)
    laplacian = (below + above + left + right - 4 * u) * (side + 1) ** 2
    return (-laplacian - strength * xp.exp(u)).reshape(z.shape)


def bratu_problem(strength: float) -> Problem:
    """Pose Bratu's equation from zero; it has two roots below the fold, where the Jacobian is singular."""
    tag = "large" if strength < FOLD else "rootless"
    fn = partial(bratu, strength=strength)
    return Problem(f"bratu-{strength:g}", (0.0,) * SIDE**2, fn, has_root=strength < FOLD, tags=(tag,))


LARGE: tuple[Problem, ...] = (
    *(bratu_problem(strength) for strength in (1, 3, 5, 6, 6.8)),
    Problem("chandrasekhar-200", (1.0,) * 200, partial(chandrasekhar, c=0.9999), tags=("large",)),
    Problem("discrete-boundary-value-1000", mgh.grid_start(1000), mgh.discrete_boundary_value, tags=("large",)),
    Problem("broyden-tridiagonal-1000", (-1.0,) * 1000, mgh.broyden_tridiagonal, tags=("large",)),
)
