"""One call inside a graph: whether it can be traced, and the `Solution` made of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._layout import Layout
from .._problem import Kind
from .._solution import AdjointReport, PyTree, Solution, Status
from ..linear import LU
from ..solvers import Anderson, Method, Newton, Picard
from ._anderson import AndersonSteps
from ._body import reason_against_body
from ._equation import TracedEquation
from ._loop import TracedSteps, solve
from ._newton import NewtonSteps
from ._picard import DampedSteps, ExtrapolatedSteps, PicardSteps


def reason_against(
    kind: Kind, fn: Any, z0: PyTree, solver: Method | None, on_failure: str, trace: bool, verbose: bool
) -> str | None:
    """Why a call cannot be a part of a graph, and what would help; None if it can."""
    if kind not in ("fixed_point", "root"):
        return f"{kind} cannot; give its stationarity condition to torchimplicit.root"
    if _steps_of(solver) is None:
        name = "Auto" if solver is None else type(solver).__name__
        return f"solver={name}(...) cannot; use Picard(), Anderson() or Newton(), which find the same z"
    if isinstance(solver, Newton) and torch.compiler.is_exporting():
        # torch 2.13 fails on the derivatives inside its loops: "Node target while_loop_cond_graph_0 not found".
        return "solver=Newton(...) cannot in this version of torch; use Picard() or Anderson(), which find the same z"
    if on_failure == "raise":
        return 'on_failure="raise" cannot, since it looks at values; use "ignore" and the solution\'s `converged`'
    if trace or verbose:
        return "trace=True and verbose=True cannot; leave them out"
    if isinstance(fn, nn.Module) and not getattr(fn, "pure", False) and any(m.training for m in fn.modules()):
        return "a cell in training mode may draw random numbers and change its buffers; call eval() on the model"
    for leaf in pytree.tree_leaves(z0):
        if isinstance(leaf, Tensor) and leaf.is_complex():
            return "complex states cannot; give their real and imaginary parts"
        if isinstance(leaf, Tensor) and torch.is_autocast_enabled(leaf.device.type):
            return "autocast cannot; convert the model"
    return reason_against_body(fn)


def run_traced(
    kind: Kind,
    fn: Callable[..., PyTree],
    z0: PyTree,
    args: tuple[Any, ...],
    solver: Method | None,
    batch_dims: int,
    max_steps: int | None,
) -> Solution:
    """Solve inside the graph that is being traced; `evaluations` is not known."""
    layout = Layout.of(z0, batch_dims)
    start = layout.pack([leaf.detach() for leaf in pytree.tree_leaves(z0)]).contiguous().clone()
    steps = _steps_of(solver)
    assert solver is not None
    assert steps is not None
    # Copies: inputs may be views of one tensor, as the parts that `chunk` makes are.
    args = pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, args)
    equation = TracedEquation(kind, fn, args, layout, solver)
    with torch.no_grad():
        books = solve(equation, steps, start, steps.max_steps if max_steps is None else max_steps)
    z = _without_derivative(equation, books.z.detach()) if torch.compiler.is_exporting() else books.z
    return Solution(
        value=layout.unpack(z),
        status=layout.per_sample(books.status),
        converged=layout.per_sample(books.status == int(Status.CONVERGED)),
        residual=layout.per_sample(books.norm * equation.unit),
        steps=layout.per_sample(books.ended),
        evaluations=-1,
        adjoint=AdjointReport(),  # a default factory would break the graph
    )


def _without_derivative(equation: TracedEquation, z: Tensor) -> Tensor:
    """z, `(B, n)`, such that a derivative by anything that fn reads is an error: an exported program has no adjoint.

    `floor_divide` is an operation that torch does not differentiate, and says so. What the steps' own derivative is
    worth depends on the solver, and is not looked at; to leave it out would be a zero in silence.
    """
    return z + torch.floor_divide(equation.value(z).nan_to_num() * 0.0, 1.0)


def _steps_of(solver: Method | None) -> TracedSteps | None:
    """The solver's steps, where there are such; None where there are none."""
    if isinstance(solver, Picard):
        if solver.extrapolate_every is not None:
            return ExtrapolatedSteps(solver)
        return PicardSteps(solver) if solver.damping_patience is None else DampedSteps(solver)
    if isinstance(solver, Anderson) and not solver.adaptive:
        return AndersonSteps(solver)
    if isinstance(solver, Newton) and (solver.linear_solver is None or isinstance(solver.linear_solver, LU)):
        return None if solver.warmup else NewtonSteps(solver)
    return None
