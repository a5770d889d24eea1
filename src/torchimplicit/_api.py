"""The calls: `fixed_point` and `root` read their arguments, hand them on, and make the `Solution`."""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ._adjoint import Implicit
from ._attach import attach
from ._layout import Layout
from ._options import refuse_unknown
from ._problem import Kind, Problem
from ._report import OnFailure, call_site, check_on_failure, report_failures
from ._solution import AdjointReport, PyTree, Solution, Status
from ._stages import solve
from .solvers import Anderson, Method, Newton

_OPTIONS = ("solver", "adjoint", "batch_dims", "max_steps", "on_failure", "trace")


def fixed_point(
    fn: Callable[..., PyTree],
    z0: PyTree,
    *args: Any,
    solver: Method | None = None,
    adjoint: Implicit | None = None,
    batch_dims: int = 0,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    **unknown: Never,
) -> Solution:
    """Solve `z = fn(z, *args)`, differentiably.

    >>> import torch, torchimplicit as ti
    >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> z = ti.fixed_point(lambda z: 0.5 * (z + a / z), torch.ones_like(a)).value  # Heron: z = √a
    >>> z.backward()
    >>> round(z.item(), 6), round(a.grad.item(), 6)  # dz/da = 1/(2√a)
    (1.414214, 0.353553)

    Gradients are exact (implicit function theorem) with respect to everything that fn reads: `args`, closures and
    module parameters; the gradient with respect to `z0` is exactly zero. Memory does not depend on the steps.

    Args:
        fn: the map; returns the structure, shapes and dtypes of `z0`. Called under `no_grad` by the solver, and once
            at the solution with gradients.
        z0: the start, a floating-point or complex tensor or a pytree of them.
        args: handed to fn; tensors, pytrees or anything else.
        solver: `Picard`, `Anderson` or `Newton`; None is `Anderson()`.
        adjoint: how gradients are computed; None is `Implicit()`.
        batch_dims: the first `batch_dims` dims of every leaf of `z0` index independent problems, a promise by the
            caller: each is then solved, stopped and, if it must be, failed by itself. 0 promises nothing: one problem.
        max_steps: steps at most; None is the solver's own default.
        on_failure: `"warn"` (once per line of yours), `"raise"` (`ConvergenceError`) or `"ignore"`, when a sample
            does not converge in the forward or the backward pass.
        trace: keep the residual norms of every step.

    Returns:
        A `Solution`; `.value` is z.

    Raises:
        TypeError: unknown option; `z0` not floating point; fn returns another structure or dtype.
        ValueError: an option out of range; fn returns another shape.
        ConvergenceError: a sample failed and `on_failure="raise"`.
    """
    refuse_unknown("fixed_point", unknown, _OPTIONS)
    return _solve(
        "fixed_point",
        fn,
        z0,
        args,
        Anderson() if solver is None else solver,
        adjoint,
        batch_dims,
        max_steps,
        on_failure,
        trace,
    )


def root(
    fn: Callable[..., PyTree],
    z0: PyTree,
    *args: Any,
    solver: Method | None = None,
    adjoint: Implicit | None = None,
    batch_dims: int = 0,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    **unknown: Never,
) -> Solution:
    """Solve `fn(z, *args) = 0`, differentiably.

    >>> import torch, torchimplicit as ti
    >>> a = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    >>> z = ti.root(lambda z: z**3 + z - a, torch.ones_like(a)).value
    >>> z.backward()
    >>> round(z.item(), 6), round(a.grad.item(), 6)  # z = 2, dz/da = 1/(3z² + 1)
    (2.0, 0.076923)

    As `fixed_point`, but fn's value has units of its own: the relative tolerance is relative to `‖fn(z0)‖`.

    Args:
        fn: the function whose zero is wanted; returns the structure, shapes and dtypes of `z0`.
        z0: the start, a floating-point or complex tensor or a pytree of them.
        args: handed to fn.
        solver: None is `Newton()`; `Picard` and `Anderson` step along `−fn(z)`.
        adjoint: as in `fixed_point`.
        batch_dims: as in `fixed_point`.
        max_steps: as in `fixed_point`.
        on_failure: as in `fixed_point`.
        trace: as in `fixed_point`.

    Returns:
        A `Solution`; `.value` is z.

    Raises:
        TypeError: unknown option; `z0` not floating point; fn returns another structure or dtype.
        ValueError: an option out of range; fn returns another shape.
        ConvergenceError: a sample failed and `on_failure="raise"`.
    """
    refuse_unknown("root", unknown, _OPTIONS)
    return _solve(
        "root", fn, z0, args, Newton() if solver is None else solver, adjoint, batch_dims, max_steps, on_failure, trace
    )


def _solve(
    kind: Kind,
    fn: Callable[..., PyTree],
    z0: PyTree,
    args: tuple[Any, ...],
    solver: Method,
    adjoint: Implicit | None,
    batch_dims: int,
    max_steps: int | None,
    on_failure: OnFailure,
    trace: bool,
) -> Solution:
    adjoint = Implicit() if adjoint is None else adjoint
    _check_call(fn, solver, adjoint, max_steps, on_failure)
    layout = Layout.of(z0, batch_dims)
    _refuse_transforms(kind, (z0, args))
    leaves = pytree.tree_leaves(z0)
    problem = Problem(kind, fn, args, layout)
    with torch.no_grad(), problem.exact():
        start = layout.pack([leaf.detach() for leaf in leaves]).clone()  # nothing may write into the caller's z0
        _refuse_dual_value(problem, start)
        outcome = solve(problem, solver, start, max_steps, trace)
    evaluations = problem.evaluations
    report = AdjointReport()
    z = outcome.z
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        with problem.exact():
            z = attach(problem, outcome, leaves, adjoint, report, on_failure, call_site())
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


def _check_call(fn: Any, solver: Any, adjoint: Any, max_steps: Any, on_failure: Any) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be callable, but is {type(fn).__name__}; give a function or an nn.Module.")
    if not isinstance(solver, Method):
        raise TypeError(
            f"solver={solver!r} is no solver; give torchimplicit.Picard(), Anderson() or Newton(), an instance."
        )
    if not isinstance(adjoint, Implicit):
        raise TypeError(f"adjoint={adjoint!r} is no adjoint; give torchimplicit.Implicit(), an instance.")
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0):
        raise ValueError(f"max_steps={max_steps!r} is not valid; give an integer >= 0 or None.")
    check_on_failure(on_failure)


def _refuse_transforms(kind: str, tensors: PyTree) -> None:
    """Say so rather than be wrong: a solve cannot run on the tensors of `torch.func` transforms or forward mode yet."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError(
            f"{kind}: called inside a torch.func transform (grad, vmap, jvp, …), which torchimplicit does not support "
            "yet; use torch.autograd.grad or backward, and batch_dims in the place of vmap."
        )
    if forward_ad._current_level >= 0 and any(_is_dual(leaf) for leaf in pytree.tree_leaves(tensors)):
        raise _forward_mode(kind)


def _refuse_dual_value(problem: Problem, z: Tensor) -> None:
    """The same for what fn closes over: inside `dual_level`, look at one value of fn."""
    if forward_ad._current_level >= 0 and _is_dual(problem.output(z)):
        raise _forward_mode(problem.kind)


def _is_dual(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None


def _forward_mode(kind: str) -> RuntimeError:
    return RuntimeError(
        f"{kind}: forward-mode differentiation is not supported yet; use torch.autograd.grad or backward."
    )
