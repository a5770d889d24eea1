"""What the compiled loops do in the place of a solver and an adjoint, if there is anything that they can do."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .._adjoint import Adjoint, Implicit
from .._refinement import coarse_dtype
from .._tolerance import default_rtol, least_rtol
from ..linear import GMRES, Cascade, Neumann
from ..solvers import Method, Newton, NewtonKrylov, Picard, PreconditionedPicard

_BLOCK = 8
"""Steps from one look to the next where the solver does not say."""
_WARMUP = 12
"""The same for the plain steps before Newton's."""
_CORRECTIONS = 10
"""The same for preconditioned steps of the adjoint."""
_PRECONDITIONED = 256
"""Unknowns up to which steps are preconditioned where the solver does not say (as those of `Auto`)."""
_ADJOINT_STEPS, _ADJOINT_PATIENCE, _ADJOINT_PROGRESS = 500, 48, 0.7
"""Products of the adjoint solve at most; and in so many the residual must have fallen by this factor."""
_METHODS = (Picard, PreconditionedPicard, Newton, NewtonKrylov)


Pace = tuple[int, int, bool, bool, int, float]
"""Steps at most; steps from one look to the next; whether plain steps are extrapolated after each of these blocks;
whether all but the looks are in bfloat16; and steps after which the best residual of a sample must have fallen, by
which factor."""


Krylov = tuple[int, int, float, float]
"""Restart and products of GMRES; forcing term, 0 for Eisenstat and Walker's; the residual's norm that is asked for. No
such steps are taken if the first is 0."""
_NONE: Krylov = 0, 0, 0.0, 0.0


@dataclass(frozen=True)
class Plan:
    """What the loops do in the place of a solver and an adjoint.

    Attributes:
        forward: the steps of the solve.
        backward: those of the adjoint.
        unit: of the residual's norm.
        limits: rtol, atol, and atol in units of the first residual's norm; norms are two-norms.
        rtol: what the adjoint's residual must come down to, beside the gradient that is pulled back.
        krylov: how Newton's steps solve their systems, for the few samples that the loop leaves.
        rest: who solves what is left then.
        resumes: whether where the loop left it, and not at the start.
        preconditioned: whether the steps are those of `PreconditionedPicard`.
    """

    forward: Pace
    backward: Pace
    unit: float
    limits: tuple[float, float, float]
    rtol: float
    krylov: Krylov
    rest: Method | None
    resumes: bool
    preconditioned: bool


def plan_for(
    solver: Method | None, adjoint: Adjoint | None, max_steps: int | None, n: int, dtype: torch.dtype
) -> Plan | None:
    """The plan for a solver and an adjoint, or None if there is none: these are not solved in a loop of their own."""
    if not (solver is None or type(solver) in _METHODS) or not (adjoint is None or isinstance(adjoint, Implicit)):
        return None
    linear = None if adjoint is None else adjoint.linear_solver
    if not (linear is None or isinstance(linear, Cascade | Neumann)):
        return None
    return _made(solver, Implicit() if adjoint is None else adjoint, max_steps, n, dtype)


@lru_cache(maxsize=64)
def _made(solver: Method | None, adjoint: Implicit, max_steps: int | None, n: int, dtype: torch.dtype) -> Plan | None:
    """What `plan_for` returns, made once."""
    if adjoint.reuse or adjoint.warm_start is not None:
        return None
    linear = adjoint.linear_solver or Cascade()
    series = linear.neumann if isinstance(linear, Cascade) else linear
    if not isinstance(series, Neumann):
        return None
    rest, resumes, preconditioned = solver, False, False
    if solver is None:
        block, extrapolate, most = _BLOCK, True, Picard.max_steps
        solver, preconditioned = Picard(), n <= _PRECONDITIONED
    elif type(solver) is PreconditionedPicard:
        block, extrapolate, most, preconditioned = solver.check_every, False, solver.max_steps, True
    elif type(solver) is Picard and solver.damping == 1.0 and solver.damping_patience is None:
        extrapolate, most = solver.extrapolate_every is not None, solver.max_steps
        block = solver.check_every if solver.extrapolate_every is None else solver.extrapolate_every
    elif isinstance(solver, Newton | NewtonKrylov) and solver.warmup >= _WARMUP and solver.max_backtracks:
        block, extrapolate, most = _WARMUP, True, solver.warmup
        rest, resumes = replace(solver, warmup=0), True
    else:
        return None
    coarse = dtype == torch.float32 and coarse_dtype(torch.device("cpu")) is not None
    mixed = solver.mixed_precision and coarse
    if mixed:
        if preconditioned or resumes:
            return None
        block = block if block > 1 else _BLOCK
    steps = most if max_steps is None else min(most, max_steps)
    steps -= steps % block
    if solver.norm not in ("rms", "two") or not steps:
        return None
    look = _CORRECTIONS if preconditioned and adjoint.linear_solver is None else series.look_every
    if (extrapolate and block < 2) or look < 3:
        return None
    if resumes and max_steps is not None:
        return None  # how many are left for Newton's steps is another number each time
    eps = torch.finfo(dtype).eps
    unit = n**-0.5 if solver.norm == "rms" else 1.0
    rtol = default_rtol("fixed_point", eps) if solver.rtol is None else solver.rtol
    rtol = max(rtol, least_rtol(eps)) if rtol else 0.0
    atol = 0.0 if solver.atol is None else solver.atol / unit
    above = 1 + 4 * eps
    limits = rtol, atol * above, eps * above if solver.atol is None else 0.0
    backward_rtol = max(eps ** (2 / 3) if adjoint.rtol is None else adjoint.rtol, 4 * eps)
    products = min(_ADJOINT_STEPS, series.max_steps)
    return Plan(
        forward=(steps, block, extrapolate, mixed, solver.patience, solver.progress),
        backward=(products, look, True, series.mixed_precision and coarse, _ADJOINT_PATIENCE, _ADJOINT_PROGRESS),
        unit=unit,
        limits=limits,
        rtol=backward_rtol,
        krylov=_krylov(solver, unit) if resumes else _NONE,
        rest=rest,
        resumes=resumes,
        preconditioned=preconditioned,
    )


def _krylov(solver: Method, unit: float) -> Krylov:
    """How these Newton steps solve their systems, if it is by GMRES alone."""
    assert isinstance(solver, Newton | NewtonKrylov)
    linear = solver._linear()
    gmres = linear.gmres if isinstance(linear, Cascade) and not linear.dense_limit else linear
    if not isinstance(gmres, GMRES) or gmres.preconditioner is not None:
        return _NONE
    forcing = solver.forcing if isinstance(solver.forcing, float) else 0.0
    return gmres.restart, gmres.max_steps, forcing, (solver.atol or 0.0) / unit
