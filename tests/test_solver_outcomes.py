"""What each named solver does with the 23 classical problems: known failures with their reasons, no false success."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchimplicit as ti
from benchmarks.problems import CLASSICAL, Problem

DOUBLE = torch.float64
SOLVED = 1e-8

LOCAL = "‖F‖ has a local minimum on the way, where descent ends"
CHAIN = "the first full step multiplies ‖F‖ by 22, and no part of it lowers ‖F‖"
VALLEY = "a curved valley: the linear model holds over ever shorter steps"
UNITS = "without scaling the Krylov method sees unknowns of sizes 10⁻⁵ and 10"
NO_CONTRACTION = "z − F(z) is no contraction here, and a root has no damping that is known to be right"
IDENTITY = "begins with a multiple of the identity, far from this Jacobian"
RUNS_AWAY = "a full step from a nearly singular Jacobian"

Make = Callable[..., ti.solvers.Solver[Any]]

SOLVERS: dict[str, tuple[Make, dict[str, str]]] = {
    "picard": (
        ti.Picard,
        dict.fromkeys(
            [
                "01",
                "02",
                "03",
                "04",
                "05",
                "06",
                "08",
                "09",
                "11",
                "12",
                "13",
                "14",
                "15",
                "16",
                "17",
                "19",
                "20",
                "21",
                "22",
            ],
            NO_CONTRACTION,
        ),
    ),
    "anderson": (
        ti.Anderson,
        dict.fromkeys(["01", "03", "04", "05", "06", "11", "12", "13", "14", "15", "16", "21"], NO_CONTRACTION),
    ),
    "broyden_good": (
        lambda **options: ti.Broyden(update="good", **options),
        dict.fromkeys(["01", "02", "03", "04", "06", "15", "16", "21"], IDENTITY),
    ),
    "broyden_bad": (ti.Broyden, dict.fromkeys(["01", "03"], IDENTITY)),
    "newton": (ti.Newton, {"01": CHAIN, "21": LOCAL}),
    "newton_full_steps": (
        lambda **options: ti.Newton(max_backtracks=0, **options),
        {"01": "the second Jacobian is singular to rounding", "08": RUNS_AWAY},
    ),
    "newton_krylov": (ti.NewtonKrylov, {"01": CHAIN, "03": UNITS, "04": VALLEY, "11": LOCAL, "21": LOCAL}),
    "chord": (ti.Chord, {"01": CHAIN, "21": LOCAL}),
    "dogleg": (ti.Dogleg, {"15": VALLEY, "16": VALLEY, "21": LOCAL}),
    "levenberg_marquardt": (ti.LevenbergMarquardt, {"11": LOCAL, "15": VALLEY, "16": VALLEY, "21": LOCAL}),
    "levenberg_marquardt_cg": (
        lambda **options: ti.LevenbergMarquardt(linear_solver="cg", **options),
        {"01": VALLEY, "15": VALLEY, "16": VALLEY, "21": LOCAL},
    ),
}


def _number(problem: Problem) -> str:
    return problem.name.removeprefix("classical-")[:2]


@pytest.mark.parametrize("problem", CLASSICAL, ids=lambda p: p.name.removeprefix("classical-"))
@pytest.mark.parametrize("name", SOLVERS)
def test_solver_solves_what_it_is_known_to_solve_and_claims_nothing_else(name: str, problem: Problem) -> None:
    make, known_failures = SOLVERS[name]
    z0 = torch.tensor(problem.start, dtype=DOUBLE)
    with torch.no_grad():
        sol = ti.root(
            lambda z: problem.fn(z, torch), z0, solver=make(atol=SOLVED, rtol=0.0, norm="max"), on_failure="ignore"
        )
        solved = bool(problem.fn(sol.value, torch).abs().amax() <= SOLVED)
    assert bool(sol.converged) == solved
    expected = _number(problem) not in known_failures
    assert solved == expected, known_failures.get(_number(problem), "a known failure now passes: take it off the list")


def test_every_exported_solver_of_roots_is_in_the_table() -> None:
    listed = {type(make()) for make, _ in SOLVERS.values()}
    others = {ti.Auto, ti.LBFGS, ti.NewtonCG, ti.Bisection, ti.Chandrupatla}  # tested elsewhere
    others |= {ti.ForwardBackward, ti.PeacemanRachford}  # of monotone layers only
    others |= {ti.PreconditionedPicard}  # of cells that supply a preconditioner
    exported = {
        thing
        for thing in vars(ti).values()
        if isinstance(thing, type) and issubclass(thing, ti.solvers.Method) and thing.__module__.startswith("torchimpl")
    }
    assert exported == listed | others
