"""The default: the cheapest solver first, and a stronger one for each sample that needs it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .._problem import Kind, Problem
from ..linear import GMRES
from ._anderson import Anderson
from ._base import Method, Solver, Stage
from ._dogleg import Dogleg
from ._lbfgs import LBFGS
from ._levenberg_marquardt import LevenbergMarquardt
from ._newton import Newton, NewtonKrylov
from ._newton_cg import NewtonCG
from ._preconditioned_picard import PreconditionedPicard

_DENSE = 256
"""Unknowns up to which a dense Jacobian is cheap."""
_BYTES = 2**30
"""Size up to which the Jacobians of a batch may be formed at all."""


@dataclass(frozen=True, eq=False, repr=False)
class Auto(Method):
    """The default: several solvers in succession, each for the samples that those before it did not solve.

    A *fixed point* begins with `Anderson`, which costs little more than plain steps and is never slower than they are
    by much. A sample whose residual does not fall by a fifth in 12 steps goes on with Newton's method from its best
    iterate, dense up to 256 unknowns and by Krylov methods above. Where the cell can be preconditioned, and has no more
    unknowns than that, `PreconditionedPicard` comes before both. A *root* begins with Newton's method, globalised.

    What is left then, one stage after the other: Newton's method without step control, from z0 again, which gets past
    the local minima of `‖r‖` that a method of descent ends in; the dogleg; Levenberg–Marquardt. Their failures differ,
    so that together they solve what none of them does alone (the polyalgorithms of NonlinearSolve.jl are the model).
    These need dense Jacobians and are left out where those of the batch would take more than 1 GiB.

    `minimize` begins with `LBFGS` and ends with `NewtonCG`; `least_squares` begins with `LevenbergMarquardt`.

    A start at which fn is not finite is replaced by a tenth of it, its opposite, ones, or zeros, where one of them
    serves.

    Every decision is a sample's own, and so is the result: but for that limit of memory it does not depend on the rest
    of the batch. A sample that no stage solves is returned as the one left it that came closest.
    """

    def stages(self, problem: Problem) -> tuple[Stage, ...]:
        """The solvers and their patience, by the kind of problem and its size."""
        batch, n = problem.layout.matrix_shape
        dense = batch * n * n * problem.layout.dtype.itemsize <= _BYTES
        return _stages(self, problem.kind, n <= _DENSE, dense, n <= _DENSE and problem.preconditioned())


@lru_cache(maxsize=64)
def _stages(method: Auto, kind: Kind, few: bool, dense: bool, preconditioned: bool) -> tuple[Stage, ...]:
    """The stages of samples with few unknowns or many.

    Args:
        method: with the options that all stages share.
        kind: of the problem.
        few: whether a dense Jacobian is cheap.
        dense: whether the Jacobians of the batch may be formed at all.
        preconditioned: whether the cell has a form in which steps contract faster, cheap to make.
    """
    common: dict[str, Any] = {
        "rtol": method.rtol,
        "atol": method.atol,
        "norm": method.norm,
        "check_every": method.check_every,
    }
    if kind == "minimize":
        return Stage(LBFGS(**common), 500, patience=150), Stage(NewtonCG(**common), 200)
    strong = LevenbergMarquardt(damping=1.0, **common)
    if kind == "least_squares":
        if not dense:
            return Stage(LBFGS(**common), 500, patience=150), Stage(NewtonCG(**common), 200)
        first = Stage(LevenbergMarquardt(**common), 200, patience=40)
        return first, Stage(NewtonCG(**common), 50), Stage(strong, 200, patience=40, start="z0")
    krylov = NewtonKrylov(linear_solver=GMRES(restart=40, max_steps=400), **common)
    newton: Solver[Any] = Newton(**common) if few else krylov
    if kind == "fixed_point":
        # To look at every other step costs half an evaluation, and saves what a third of one costs in each; to sort
        # out who is done takes longer where a sample has many unknowns.
        looks = 2 if few else 4
        first = Anderson(adaptive=True, **{**common, "check_every": max(looks, method.check_every)})
        stages = [Stage(first, 150, patience=12, progress=0.8), Stage(newton, 60, patience=12)]
        if preconditioned:
            # A step is cheaper than a look: let most of them pass.
            quick = PreconditionedPicard(**{**common, "check_every": max(8, method.check_every)})
            stages = [Stage(quick, 200, patience=16, progress=0.5), *stages]
        return (*stages, Stage(Dogleg(**common), 60, patience=20)) if dense else tuple(stages)
    # A matrix-free Newton that does not converge fast is held up by its linear systems.
    stages = [Stage(newton, 60, patience=12) if few else Stage(newton, 60, patience=6, progress=0.1)]
    if dense:
        full = Newton(max_backtracks=0, **common)
        if not few:
            stages += [
                Stage(full, 60, patience=20, start="z0"),
                Stage(Dogleg(**common), 60, patience=20, start="z0"),
            ]
        else:
            stages += [
                Stage(full, 200, patience=200, start="z0"),
                Stage(Dogleg(**common), 400, patience=60, start="z0"),
                Stage(strong, 300, patience=60, start="z0"),
                Stage(full, 100, patience=100, start="z0", spread=0.2),
                Stage(strong, 100, patience=40, start="z0", spread=1.0),
                Stage(full, 100, patience=100, start="z0", spread=1.0),
                Stage(Dogleg(**common), 100, patience=40, start="z0", spread=3.0),
            ]
    return tuple(stages)
