"""The calls: `fixed_point`, `root`, `minimize` and `least_squares`."""

from collections.abc import Callable
from typing import Any, Never

from ._adjoint import Adjoint
from ._call import run
from ._options import refuse_unknown
from ._report import OnFailure
from ._solution import PyTree, Solution
from ._spread import ProcessGroup
from .solvers import Method

_OPTIONS = ("solver", "adjoint", "batch_dims", "max_steps", "on_failure", "trace", "verbose")
_SPREAD = (*_OPTIONS, "process_group")


def fixed_point(
    fn: Callable[..., PyTree],
    z0: PyTree,
    *args: Any,
    solver: Method | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: int = 0,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    verbose: bool = False,
    process_group: ProcessGroup | None = None,
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

    fn may draw random numbers (dropout) and change the buffers of modules in training mode (batch norm): every
    evaluation of a solve, its backward pass included, draws what the first one drew and finds the buffers as they were.
    Afterwards torch's generators (the CPU's and that of z0's device) are as one evaluation leaves them, the buffers as
    one at the solution makes them, for which fn is called once more. The modules are looked for in fn: itself, a
    method's object, a `partial`, a closure and its defaults, globals, `args`; the items of lists, tuples and dicts of
    fewer than 100 there. Samples then stay in the batch to the end. What fn does not draw or change in the first
    evaluation, other generators, and state that is no buffer are not held.

    Args:
        fn: the map; returns the structure, shapes and dtypes of `z0`. Called under `no_grad` by the solver, and once
            at the solution with gradients.
        z0: the start, a floating-point or complex tensor or a pytree of them.
        args: handed to fn; tensors, pytrees or anything else.
        solver: how to compute it; None is `Auto()`, which begins with `Anderson` and ends with globalised Newton.
        adjoint: how gradients are computed; None is `Implicit()`.
        batch_dims: the first `batch_dims` dims of every leaf of `z0` index independent problems, a promise by the
            caller: each is then solved, stopped and, if it must be, failed by itself. 0 promises nothing: one problem.
        max_steps: steps at most; None is the solver's own default.
        on_failure: `"warn"` (once per line of yours), `"raise"` (`ConvergenceError`) or `"ignore"`, when a sample
            does not converge in the forward or the backward pass.
        trace: keep the residual norms of every step.
        verbose: print a line for every step: residuals, and how many samples are still unsolved.
        process_group: the `torch.distributed` processes that solve together, or `"world"`, which is nobody else where
            nothing is distributed. For an fn that communicates with the other processes: each gives its own samples,
            and all call fn equally often, in the backward pass, too; every process must make the call and take the
            backward pass. None if fn does not communicate: then each solves for itself.

    Returns:
        A `Solution`; `.value` is z.

    Raises:
        TypeError: unknown option; `z0` not floating point; fn returns another structure or dtype.
        ValueError: an option out of range; fn returns another shape.
        ConvergenceError: a sample failed and `on_failure="raise"`.
    """
    refuse_unknown("fixed_point", unknown, _SPREAD)
    return run(
        "fixed_point",
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
    )


def root(
    fn: Callable[..., PyTree],
    z0: PyTree,
    *args: Any,
    solver: Method | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: int = 0,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    verbose: bool = False,
    process_group: ProcessGroup | None = None,
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
        solver: None is `Auto()`, which begins with Newton's method; `Picard` and `Anderson` step along `−fn(z)`.
        adjoint: as in `fixed_point`.
        batch_dims: as in `fixed_point`.
        max_steps: as in `fixed_point`.
        on_failure: as in `fixed_point`.
        trace: as in `fixed_point`.
        verbose: as in `fixed_point`.
        process_group: as in `fixed_point`.

    Returns:
        A `Solution`; `.value` is z.

    Raises:
        TypeError: unknown option; `z0` not floating point; fn returns another structure or dtype.
        ValueError: an option out of range; fn returns another shape.
        ConvergenceError: a sample failed and `on_failure="raise"`.
    """
    refuse_unknown("root", unknown, _SPREAD)
    return run(
        "root",
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
    )


def minimize(
    fn: Callable[..., PyTree],
    z0: PyTree,
    *args: Any,
    solver: Method | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: int = 0,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    verbose: bool = False,
    **unknown: Never,
) -> Solution:
    """Find a minimum of `fn(z, *args)`, differentiably: a zero of `∂fn/∂z`.

    >>> import torch, torchimplicit as ti
    >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    >>> z = ti.minimize(lambda z: (z - a) ** 2 + z**4, torch.zeros_like(a)).value
    >>> z.backward()
    >>> round(z.item(), 6), round(a.grad.item(), 6)  # 2 (z − a) + 4 z³ = 0, dz/da = 1/(1 + 6z²)
    (0.835122, 0.19288)

    Minima are local. A sample has converged when its gradient is small beside that at z0: the default solvers descend,
    but nothing certifies that a zero of the gradient is a minimum (`Newton` would as soon find a saddle).

    Args:
        fn: the objective: one real number per sample, of the batch shape `z.shape[:batch_dims]`, a scalar for 0.
        z0: the start, a floating-point or complex tensor or a pytree of them.
        args: handed to fn.
        solver: None is `Auto()`: `LBFGS`, then `NewtonCG` for the samples it leaves.
        adjoint: as in `fixed_point`.
        batch_dims: as in `fixed_point`.
        max_steps: as in `fixed_point`.
        on_failure: as in `fixed_point`.
        trace: as in `fixed_point`.
        verbose: as in `fixed_point`.

    Returns:
        A `Solution`; `.value` is z, `.residual` the norm of the gradient.

    Raises:
        TypeError: unknown option; `z0` not floating point; fn returns something else than real numbers.
        ValueError: an option out of range; fn returns another shape than the batch's.
        ConvergenceError: a sample failed and `on_failure="raise"`.
    """
    refuse_unknown("minimize", unknown, _OPTIONS)
    return run(
        "minimize",
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
    )


def least_squares(
    fn: Callable[..., PyTree],
    z0: PyTree,
    *args: Any,
    solver: Method | None = None,
    adjoint: Adjoint | None = None,
    batch_dims: int = 0,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
    trace: bool = False,
    verbose: bool = False,
    **unknown: Never,
) -> Solution:
    """Find a minimum of `½‖fn(z, *args)‖²`, differentiably: a zero of `Jᵀ fn`, `J = ∂fn/∂z`.

    >>> import torch, torchimplicit as ti
    >>> t = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> y = torch.exp(-2 * t).requires_grad_()
    >>> sol = ti.least_squares(lambda z: torch.exp(-z * t) - y, torch.ones((), dtype=torch.float64))
    >>> round(sol.value.item(), 6)
    2.0

    The gradient is that of the minimum itself: the curvature of fn is not neglected, as Gauss and Newton's would.

    Args:
        fn: the residuals, a tensor or a pytree of tensors with the batch shape in front; any number of them.
        z0: the start, a floating-point or complex tensor or a pytree of them.
        args: handed to fn.
        solver: None is `Auto()`, which begins with `LevenbergMarquardt`; `Dogleg`, `LBFGS` and `NewtonCG` do as well.
        adjoint: as in `fixed_point`.
        batch_dims: as in `fixed_point`.
        max_steps: as in `fixed_point`.
        on_failure: as in `fixed_point`.
        trace: as in `fixed_point`.
        verbose: as in `fixed_point`.

    Returns:
        A `Solution`; `.value` is z, `.residual` the norm of the gradient `Jᵀ fn`.

    Raises:
        TypeError: unknown option; `z0` not floating point; fn returns something else than tensors of numbers.
        ValueError: an option out of range; the residuals do not have the batch shape in front.
        ConvergenceError: a sample failed and `on_failure="raise"`.
    """
    refuse_unknown("least_squares", unknown, _OPTIONS)
    return run(
        "least_squares",
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
    )
