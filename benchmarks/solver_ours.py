"""Our own rows of the solver table: the default, the default with the table's criterion, and every named solver.

Nothing is named here: whatever `torchimplicit.solvers` exports and can be made without arguments takes part, if it can
find a root at all; a solver that needs a bracket or a splitting of the equation cannot.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import isabstract
from typing import Any

import torch

import torchimplicit as ti
from benchmarks.problems import Problem
from benchmarks.solver_claim import TOLERANCE, Claim, Method
from torchimplicit import solvers

MAX_STEPS = 2000
"""For the named solvers, as for the peers; the default keeps its own."""

BRACKETING = ("Bisection", "Chandrupatla")


def _solve(problem: Problem, make: Callable[[], Any], max_steps: int | None) -> Claim:
    start = torch.tensor(problem.start, dtype=torch.float64)
    with torch.no_grad():
        solution = ti.root(
            lambda z: problem.fn(z, torch), start, solver=make(), max_steps=max_steps, on_failure="ignore"
        )
    return Claim(solution.value.numpy(), bool(solution.converged.all()), solution.evaluations)


def with_criterion(kind: type) -> Callable[[], Any] | None:
    """Make solvers of this class that stop at `max|F| ≤ TOLERANCE`; None if the class has no such option."""
    options = {"atol": TOLERANCE, "rtol": 0.0, "norm": "max"}
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    if "atol" not in known:
        return None
    return partial(kind, **{name: value for name, value in options.items() if name in known})


def default_kind() -> type:
    """Name the class behind `solver=None` of `root`."""
    return getattr(ti, "Auto", ti.Newton)


def named_kinds() -> dict[str, type]:
    """Find the solver classes that can be made without arguments and find the root of `z − 1`."""
    return {
        name: kind
        for name, kind in vars(solvers).items()
        if isinstance(kind, type) and issubclass(kind, solvers.Method) and not isabstract(kind)
        if kind is not default_kind() and name not in BRACKETING and _can_find_a_root(kind)
    }


def _can_find_a_root(kind: type) -> bool:
    try:
        solution = ti.root(lambda z: z - 1, torch.zeros(1), solver=kind(), on_failure="ignore")
    except (TypeError, ValueError, NotImplementedError):
        return False
    return bool(solution.converged.all())


def ours() -> tuple[Method, ...]:
    """List our rows."""
    rows = [Method("ti", "torchimplicit", partial(_solve, make=lambda: None, max_steps=None))]
    strict = with_criterion(default_kind())
    if strict is not None:
        rows.append(Method("ti-strict", "torchimplicit", partial(_solve, make=strict, max_steps=None)))
    for name, kind in named_kinds().items():
        make = with_criterion(kind) or kind
        rows.append(Method(f"ti-{name}", "torchimplicit", partial(_solve, make=make, max_steps=MAX_STEPS)))
    return tuple(rows)
