"""Our contenders: each solver with the adjoints that suit it, on a plain cell."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.experiments.bench.contender import Contender, Counts, Runner, differentiate, torch_runner
from torchimplicit.experiments.bench.problems import Problem, TanhCell
from torchimplicit.linear import Cascade
from torchimplicit.solvers import Method

_CHEAP = 20_000
"""Numbers in a batch of states up to which a cell counts as cheap."""
MakeMethod = Callable[[float], Method]
MakeAdjoint = Callable[[float], ti.Implicit]

SOLVERS: dict[str, MakeMethod] = {
    "picard": lambda rtol: ti.Picard(rtol=rtol),
    "picard, every 4th step checked": lambda rtol: ti.Picard(rtol=rtol, check_every=4),
    "picard, every 12th step checked": lambda rtol: ti.Picard(rtol=rtol, check_every=12),
    "picard, every 24th step checked": lambda rtol: ti.Picard(rtol=rtol, check_every=24),
    "picard, extrapolated, every 24th step checked": lambda rtol: ti.Picard(
        rtol=rtol, check_every=24, extrapolate_every=24
    ),
    "picard, extrapolated": lambda rtol: ti.Picard(rtol=rtol, check_every=4, extrapolate_every=8),
    "picard, mixed precision": lambda rtol: ti.Picard(rtol=rtol, check_every=4, mixed_precision=True),
    "picard, extrapolated, mixed precision": lambda rtol: ti.Picard(
        rtol=rtol, check_every=4, extrapolate_every=8, mixed_precision=True
    ),
    "preconditioned, every 8th step checked": lambda rtol: ti.PreconditionedPicard(rtol=rtol, check_every=8),
    "preconditioned, every 16th step checked": lambda rtol: ti.PreconditionedPicard(rtol=rtol, check_every=16),
    "anderson": lambda rtol: ti.Anderson(rtol=rtol),
    "anderson, every 2nd step checked": lambda rtol: ti.Anderson(rtol=rtol, check_every=2),
    "broyden": lambda rtol: ti.Broyden(rtol=rtol),
    "auto": lambda rtol: ti.Auto(rtol=rtol),
}
COMPILED: dict[str, MakeMethod] = {
    "picard, every 4th step checked": lambda rtol: ti.Picard(rtol=rtol, check_every=4),
    "picard, extrapolated every 8th step": lambda rtol: ti.Picard(rtol=rtol, extrapolate_every=8),
    "picard, extrapolated every 12th step": lambda rtol: ti.Picard(rtol=rtol, extrapolate_every=12),
    "preconditioned, every 5th step checked": lambda rtol: ti.PreconditionedPicard(rtol=rtol, check_every=5),
    "preconditioned, every 7th step checked": lambda rtol: ti.PreconditionedPicard(rtol=rtol, check_every=7),
    "preconditioned, every 12th step checked": lambda rtol: ti.PreconditionedPicard(rtol=rtol, check_every=12),
}
COMPILED_LARGE: dict[str, MakeMethod] = {
    "picard, every 9th step checked, mixed precision": lambda rtol: ti.Picard(
        rtol=rtol, check_every=9, mixed_precision=True
    ),
    "picard, every 16th step checked, mixed precision": lambda rtol: ti.Picard(
        rtol=rtol, check_every=16, mixed_precision=True
    ),
}
"""Solvers of compiled loops, where a step takes no longer than a look and where it does."""
MIXED = Cascade(neumann=ti.Neumann(slowest=0.97, mixed_precision=True))
MIXED_SELDOM = Cascade(neumann=ti.Neumann(slowest=0.97, mixed_precision=True, first_look=10, look_every=10))
SELDOM = Cascade(neumann=ti.Neumann(slowest=0.93, first_look=20, look_every=20))
ADJOINTS: dict[str, MakeAdjoint] = {
    "implicit": lambda rtol: ti.Implicit(rtol=rtol),
    "implicit, GMRES": lambda rtol: ti.Implicit(rtol=rtol, linear_solver=ti.GMRES()),
    "implicit, every 20th product checked": lambda rtol: ti.Implicit(rtol=rtol, linear_solver=SELDOM),
    "implicit, mixed precision": lambda rtol: ti.Implicit(rtol=rtol, linear_solver=MIXED),
    "implicit, every 10th product checked, mixed precision": lambda rtol: ti.Implicit(
        rtol=rtol, linear_solver=MIXED_SELDOM
    ),
    "implicit, reuse": lambda rtol: ti.Implicit(rtol=rtol, reuse=True),
}


def same_name(problem: Problem, solver: str) -> tuple[Contender, ...]:
    """Our solver of a name ("picard", "anderson", "broyden") with each adjoint that can follow it."""
    solvers = [name for name in SOLVERS if name.partition(",")[0] == solver and "24th" not in name]
    adjoints = [name for name in ADJOINTS if "checked" not in name and (solver != "picard" or "reuse" not in name)]
    pairs = [(s, a) for s in solvers for a in adjoints if ("mixed" in s) == ("mixed" in a)]
    return _contenders(problem, pairs + (_seldom(problem) if solver == "picard" else []))


def everything(problem: Problem) -> tuple[Contender, ...]:
    """All combinations that may be the quickest; the default among them."""
    pairs = [
        ("picard", "implicit"),
        ("picard, every 4th step checked", "implicit"),
        ("picard, every 12th step checked", "implicit"),
        ("picard, extrapolated", "implicit"),
        ("picard, extrapolated", "implicit, GMRES"),
        ("picard, mixed precision", "implicit, mixed precision"),
        ("picard, extrapolated, mixed precision", "implicit, mixed precision"),
        ("anderson, every 2nd step checked", "implicit"),
        ("anderson, every 2nd step checked", "implicit, GMRES"),
        ("anderson, every 2nd step checked", "implicit, reuse"),
        ("auto", "implicit"),
        ("auto", "implicit, GMRES"),
    ]
    return _contenders(problem, pairs + _seldom(problem))


def short_list(problem: Problem) -> tuple[Contender, ...]:
    """The default, and the two of the others that are most often the quickest."""
    pairs = [
        ("picard, extrapolated", "implicit"),
        ("anderson, every 2nd step checked", "implicit"),
        ("auto", "implicit"),
    ]
    return _contenders(problem, pairs)


def _seldom(problem: Problem) -> list[tuple[str, str]]:
    """Those that seldom look at the residuals, which is of use where an evaluation takes no longer than a look."""
    if problem.x.numel() > _CHEAP:
        return []
    solvers = [name for name in SOLVERS if "12th" in name or "24th" in name]
    return [(solver, "implicit, every 20th product checked") for solver in solvers]


def _contenders(problem: Problem, pairs: Sequence[tuple[str, str]]) -> tuple[Contender, ...]:
    """One for each pair of a solver and an adjoint; images in `channels_last`, which is the quicker layout for ours."""
    layout, problem = problem.layouts()[0]
    return tuple(_contender(problem, layout, solver, adjoint) for solver, adjoint in pairs)


def _contender(problem: Problem, layout: str, solver: str, adjoint: str) -> Contender:
    def make(forward: float, backward: float, _: Counts | None) -> Runner:
        return _runner(problem, SOLVERS[solver](forward), ADJOINTS[adjoint](backward))

    return Contender(f"{solver}; {adjoint}{layout}", make)


def _runner(problem: Problem, solver: Method, adjoint: ti.Implicit) -> Runner:
    start = problem.start

    def solution() -> ti.Solution:
        return ti.fixed_point(
            problem.cell, start, problem.x, batch_dims=1, solver=solver, adjoint=adjoint, on_failure="ignore"
        )

    return torch_runner(
        problem, lambda: _tensor(solution()), lambda: _count(problem, solution), {"solver": repr(solver)}
    )


def layers(problem: Problem) -> tuple[Contender, ...]:
    """`TanhEquilibrium`, which knows its Jacobian and has compiled loops, with each solver that may be the quickest.

    For tanh cells only.
    """
    if not isinstance(problem.cell, TanhCell):
        return ()
    quick = [name for name in SOLVERS if name.startswith(("picard, ", "preconditioned"))]
    pairs = [(name, "implicit, mixed precision" if "mixed" in name else "implicit") for name in quick]
    pairs += _seldom(problem)
    plain = [_layer(problem, solver, adjoint) for solver, adjoint in pairs]
    if problem.x.numel() <= _CHEAP:
        return (*plain, *(_layer(problem, solver, "implicit", COMPILED) for solver in COMPILED))
    adjoint = "implicit, every 10th product checked, mixed precision"
    return (*plain, *(_layer(problem, solver, adjoint, COMPILED_LARGE) for solver in COMPILED_LARGE))


def _layer(problem: Problem, solver: str, adjoint: str, compiled: Mapping[str, MakeMethod] | None = None) -> Contender:
    methods = SOLVERS if compiled is None else compiled

    def make(forward: float, backward: float, _: Counts | None) -> Runner:
        layer = ti.nn.TanhEquilibrium(
            problem.x.shape[1],
            solver=methods[solver](forward),
            adjoint=ADJOINTS[adjoint](backward),
            on_failure="ignore",
            compiled=compiled is not None,
        )
        layer.linear.weight = problem.cell.weight
        return torch_runner(
            problem,
            lambda: layer(problem.x),
            lambda: _count(problem, lambda: layer.solve(problem.x)),
            {"solver": repr(layer.solver)},
        )

    name = "TanhEquilibrium" if compiled is None else "TanhEquilibrium(compiled=True)"
    return Contender(f"{name}: {solver}; {adjoint}", make)


def _tensor(solution: ti.Solution) -> Tensor:
    value = solution.value
    assert isinstance(value, torch.Tensor)
    return value


def _count(problem: Problem, solve: Callable[[], ti.Solution]) -> Counts:
    solution = solve()
    differentiate(problem, lambda: _tensor(solution))
    return Counts(solution.evaluations, solution.adjoint.evaluations or 0)
