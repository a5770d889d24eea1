"""A fixed number of plain steps in the place of a solve: a weight-tied network, to train a layer with at first."""

import sys
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils import _pytree as pytree

from .._isolate import inert
from .._layout import Layout
from .._problem import Kind, Problem
from .._profile import span
from .._report import OnFailure, report_failures
from .._solution import AdjointReport, PyTree, Solution, Status
from .._stages import solve
from .._system import transformed
from .._unroll import Unroll, unrolled
from ..solvers import Auto, Method, Picard


def take_steps(*args: Any, **options: Any) -> Solution:
    """As `_take_steps`; `torch.compile` leaves it alone, as it does a solve."""
    return (_uncompiled if "torch._dynamo" in sys.modules else _take_steps)(*args, **options)


def _take_steps(
    kind: Kind,
    cell: Any,
    start: PyTree,
    inputs: tuple[Any, ...],
    *,
    depth: int,
    solver: Method | None,
    batch_dims: int,
    on_failure: OnFailure,
    label: str,
) -> Solution:
    """`depth` plain steps from the start, with the gradient of these steps.

    What comes out is looked at as any solution is: its residual is evaluated, and the status is CONVERGED where that
    is within the tolerance of `solver`, else MAX_STEPS, or NONFINITE. Only the last is a failure here.
    """
    if transformed():
        raise RuntimeError("depth= has no torch.func transforms; set layer.depth = None, or use torch.autograd.")
    layout = Layout.of(start, batch_dims)
    problem = Problem(kind, cell, inputs, layout)
    method = Auto() if solver is None else solver
    plain = Picard(rtol=method.rtol, atol=method.atol, norm=method.norm)
    leaves = pytree.tree_leaves(start)
    begun = layout.pack([leaf.detach() for leaf in leaves])
    with span(label, "forward steps"), problem.exact():
        z: Tensor = begun
        for _ in range(depth):
            value = problem.output(z)
            z = value if kind == "fixed_point" else z - value
        with torch.no_grad():
            outcome = solve(problem, plain, z.detach(), 0, False)
        batch = outcome.status.new_full(outcome.status.shape, depth)
        finite = z.detach().isfinite().all(dim=1)
        status = torch.where(finite, outcome.status, int(Status.NONFINITE))
        dead = status >= int(Status.DIVERGED)
        if bool(dead.any()):
            best = torch.where(finite[:, None], z.detach(), begun)
            z = unrolled(problem, Picard(), Unroll(), begun, best, status, batch) if z.requires_grad else best
    if torch.is_grad_enabled():
        z = inert(z, [leaf for leaf in leaves if leaf.requires_grad])
    solution = Solution(
        value=layout.unpack(z),
        status=layout.per_sample(status),
        converged=layout.per_sample(status == int(Status.CONVERGED)),
        residual=layout.per_sample(outcome.residual),
        steps=layout.per_sample(batch),
        evaluations=problem.evaluations,
        adjoint=AdjointReport(),
    )
    if bool(dead.any()):
        report_failures(f"{kind} ({depth} steps)", status[dead], on_failure, solution)
    return solution


_uncompiled = _disable_dynamo(_take_steps)
