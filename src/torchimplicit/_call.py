"""One call, whatever it solves: read and check the arguments, solve, attach the gradient, make the `Solution`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ._adjoint import Adjoint, Implicit, LinearAdjoint
from ._attach import attach
from ._eagerly import eagerly
from ._layout import Layout
from ._objective import Gradient
from ._problem import Kind, Problem
from ._profile import span
from ._progress import Progress
from ._report import OnFailure, call_site, check_on_failure, report_failures, undetected
from ._shapes import shapes_only
from ._solution import AdjointReport, PyTree, Solution, Status
from ._spread import ProcessGroup, SpreadLayout, resolve_group
from ._stages import solve
from ._system import transformed as is_transformed
from ._traced import reason_against, run_traced
from ._transformed import needs_rules, run_transformed
from ._unroll import Unroll, unrolled
from .solvers import Auto, Method

_SOLVER, _ADJOINT = Auto(), Implicit()  # what None stands for


def run(
    kind: Kind,
    fn: Callable[..., PyTree],
    z0: PyTree,
    args: tuple[Any, ...],
    *,
    solver: Method | None,
    adjoint: Adjoint | None,
    batch_dims: int,
    max_steps: int | None,
    on_failure: OnFailure,
    trace: bool,
    verbose: bool,
    process_group: ProcessGroup | None = None,
    label: str | None = None,
) -> Solution:
    """Solve; the arguments are those of the public calls.

    Where `torch.compile` finds a solve without gradients that can be a part of its graph, it is made one (see
    `_traced`); any other solve is a break in the graph: what costs time in it are the user's function and matrix
    products, and the loop depends on values. `torch.export` knows no breaks.
    """
    exporting = torch.compiler.is_exporting()
    if exporting or (torch.compiler.is_compiling() and not torch.is_grad_enabled()):
        _check_call(
            fn, _SOLVER if solver is None else solver, _ADJOINT if adjoint is None else adjoint, max_steps, on_failure
        )
        reason = reason_against(kind, fn, z0, solver, on_failure, trace, verbose)
        if process_group is not None:
            reason = "process_group= exchanges states between processes"
        if reason is None:
            return run_traced(kind, fn, z0, args, solver, batch_dims, max_steps)
        if exporting:
            raise RuntimeError(f"{kind}: what torch.export takes must be one graph, but {reason}.")
    return _run(
        kind,
        fn,
        z0,
        args,
        solver=solver,
        adjoint=adjoint,
        batch_dims=batch_dims,
        max_steps=max_steps,
        on_failure=on_failure,
        trace=trace,
        verbose=verbose,
        process_group=process_group,
        label=label,
    )


@eagerly
def _run(
    kind: Kind,
    fn: Callable[..., PyTree],
    z0: PyTree,
    args: tuple[Any, ...],
    *,
    solver: Method | None,
    adjoint: Adjoint | None,
    batch_dims: int,
    max_steps: int | None,
    on_failure: OnFailure,
    trace: bool,
    verbose: bool,
    process_group: ProcessGroup | None = None,
    label: str | None = None,
) -> Solution:
    """Solve; the label is the layer's, for profilers."""
    solver = _SOLVER if solver is None else solver
    adjoint = _ADJOINT if adjoint is None else adjoint
    _check_call(fn, solver, adjoint, max_steps, on_failure)
    layout = Layout.of(z0, batch_dims)
    if process_group is not None:
        layout = _spread(kind, layout, process_group)
    leaves = pytree.tree_leaves(z0)
    if kind in ("minimize", "least_squares"):
        fn = Gradient(kind, fn, layout, squares=kind == "least_squares")
    if layout.device.type == "meta":
        return shapes_only(kind, fn, z0, args, layout)
    problem = Problem(kind, fn, args, layout)
    problem.label = label or kind
    with torch.no_grad(), problem.exact():
        start = layout.pack([leaf.detach() for leaf in leaves]).clone()  # nothing may write into the caller's z0
        transformed = needs_rules(problem, start)
    unroll = adjoint if isinstance(adjoint, Unroll) else None
    implicit = adjoint if isinstance(adjoint, LinearAdjoint) else Implicit()
    if transformed:
        with undetected():
            solution = run_transformed(problem, start, solver, implicit, max_steps, on_failure, trace)
        if unroll is None:
            return solution
        z = layout.pack(pytree.tree_leaves(solution.value)).detach()
        status, steps = solution.status.reshape(len(z)), solution.steps.reshape(len(z))
        return replace(solution, value=layout.unpack(unrolled(problem, solver, unroll, start, z, status, steps)))
    if implicit.needs_inverse and torch.is_grad_enabled():
        problem.keep_inverse()
    with span(problem.label, "forward solve"), torch.no_grad(), problem.exact(), undetected():
        outcome = solve(problem, solver, start, max_steps, trace, Progress(kind) if verbose else None)
    evaluations = problem.evaluations
    report = AdjointReport()
    z = outcome.z
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        with problem.exact():
            if unroll is None:
                z = attach(problem, outcome, leaves, implicit, report, on_failure, call_site())
            else:
                z = unrolled(problem, solver, unroll, start, outcome.z, outcome.status, outcome.steps)
    converged = outcome.status == int(Status.CONVERGED)
    solution = Solution(
        value=layout.unpack(z),
        status=layout.per_sample(outcome.status),
        converged=layout.per_sample(converged),
        residual=layout.per_sample(outcome.residual),
        steps=layout.per_sample(outcome.steps),
        evaluations=evaluations,
        trace=None if outcome.trace is None else layout.per_sample(outcome.trace),
        adjoint=report,
    )
    if not outcome.clean and not bool(converged.all()):
        report_failures(kind, outcome.status, on_failure, solution)
    return solution


def _spread(kind: Kind, layout: Layout, process_group: ProcessGroup) -> Layout:
    """The layout of a state whose samples are spread over a group, if there is anyone else in it."""
    group = resolve_group(process_group)
    if group is None:
        return layout
    if is_transformed() or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{kind}: process_group= works with backward and torch.autograd.grad, not under torch.func transforms or "
            "in forward mode; leave it out there."
        )
    return SpreadLayout.over(group, layout)


def _check_call(fn: Any, solver: Any, adjoint: Any, max_steps: Any, on_failure: Any) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be callable, but is {type(fn).__name__}; give a function or an nn.Module.")
    if not isinstance(solver, Method):
        raise TypeError(
            f"solver={solver!r} is no solver; give an instance such as torchimplicit.Anderson() or Newton(), or None."
        )
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint={adjoint!r} is no adjoint; give torchimplicit.Implicit(), an instance.")
    if isinstance(adjoint, Unroll):
        adjoint.check(solver)
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0):
        raise ValueError(f"max_steps={max_steps!r} is not valid; give an integer >= 0 or None.")
    check_on_failure(on_failure)
