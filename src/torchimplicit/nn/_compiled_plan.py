"""What the compiled loops do in the place of a solver and an adjoint, if there is anything that they can do."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .._adjoint import Adjoint, Implicit
from .._tolerance import default_rtol, least_rtol
from ..linear import Cascade, Neumann
from ..solvers import Method, Newton, NewtonKrylov, Picard, PreconditionedPicard
from ._compiled_loops import Pace

_BLOCK = 8
"""Steps from one look to the next where the solver does not say."""
_WARMUP = 12
"""The same for the plain steps before Newton's."""
_PRECONDITIONED = 256
"""Unknowns up to which steps are preconditioned where the solver does not say (as those of `Auto`)."""
_LONGEST = 32
"""Steps of a block at most: each of them is compiled for itself."""
_ADJOINT_STEPS, _ADJOINT_PATIENCE, _ADJOINT_PROGRESS = 500, 48, 0.7
"""Products of the adjoint solve at most; and in so many the residual must have fallen by this factor."""
_METHODS = (Picard, PreconditionedPicard, Newton, NewtonKrylov)


@dataclass(frozen=True)
class Plan:
    """What the loops do in the place of a solver and an adjoint.

    Attributes:
        forward: the steps of the solve.
        backward: those of the adjoint.
        max_steps: of the solve, a multiple of a block.
        unit: of the residual's norm.
        limits: as `solution` takes them.
        rtol: as `gradient` does.
        products: of the adjoint at most.
        rest: who solves what the loop leaves.
        resumes: whether where the loop left it, and not at the start.
        preconditioned: whether the steps are those of `PreconditionedPicard`.
    """

    forward: Pace
    backward: Pace
    max_steps: Tensor
    unit: float
    limits: Tensor
    rtol: Tensor
    products: Tensor
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
    if not isinstance(series, Neumann) or series.mixed_precision:
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
    steps = most if max_steps is None else min(most, max_steps)
    steps -= steps % block
    if solver.mixed_precision or solver.norm not in ("rms", "two") or block > _LONGEST or not steps:
        return None
    look = min(series.look_every, _LONGEST)
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
    limits = torch.tensor([rtol, atol * above, eps * above if solver.atol is None else 0.0], dtype=dtype)
    backward_rtol = max(eps ** (2 / 3) if adjoint.rtol is None else adjoint.rtol, 4 * eps)
    return Plan(
        forward=Pace(block, extrapolate, solver.patience, solver.progress),
        backward=Pace(look, True, _ADJOINT_PATIENCE, _ADJOINT_PROGRESS),
        max_steps=torch.tensor(steps),
        unit=unit,
        limits=limits,
        rtol=torch.tensor(backward_rtol, dtype=dtype),
        products=torch.tensor(min(_ADJOINT_STEPS, series.max_steps)),
        rest=rest,
        resumes=resumes,
        preconditioned=preconditioned,
    )
