"""TorchDEQ as a careful user would run it: exact gradients, relative tolerances, buffers of the size needed."""

# The peers are an extra of their own, and need not be there for the types to be checked.
# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor

from torchimplicit.experiments.bench.contender import Contender, Counts, Runner, differentiate, torch_runner
from torchimplicit.experiments.bench.problems import Problem

SOLVERS = {"picard": "fixed_point_iter", "anderson": "anderson", "broyden": "broyden"}
"""Our names and TorchDEQ's."""
_AMPLE = {"picard": 600, "anderson": 300, "broyden": 150}
"""Iterations that a solver may take while it is not known how many it needs."""
_FORWARD_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "picard": ({},),
    "anderson": ({}, {"lam": 1e-7}),  # the default ridge, 1e-4, is absolute: it stalls where residuals are small
    "broyden": ({},),
}


def torchdeq(problem: Problem, solver: str, backward_solver: str | None = None) -> tuple[Contender, ...]:
    """TorchDEQ's solver of one of our names forward and, unless another is named, backward.

    Both of its implementations of the implicit gradient, as an autograd function and as a tensor hook; images in both
    layouts, though its states are contiguous between the steps.
    """
    return tuple(
        _contender(other, layout, solver, backward_solver or solver, hook, options)
        for layout, other in problem.layouts()
        for options in _FORWARD_OPTIONS[solver]
        for hook in (True, False)
    )


def _contender(
    problem: Problem, layout: str, solver: str, backward_solver: str, hook: bool, options: dict[str, Any]
) -> Contender:
    from torchdeq import get_deq

    start = problem.start

    def make(forward: float, backward: float, counts: Counts | None) -> Runner:
        # Its traces, and Broyden's buffers, are as long as max_iter: no more than is used.
        settings = {
            "core": "sliced",
            "ift": not hook,
            "hook_ift": hook,
            "f_solver": SOLVERS[solver],
            "b_solver": SOLVERS[backward_solver],
            "f_max_iter": counts.forward + 1 if counts else _AMPLE[solver],
            "b_max_iter": counts.backward + 1 if counts and counts.backward else _AMPLE[backward_solver],
            "f_tol": forward,
            "b_tol": backward,
            "f_stop_mode": "rel",
            "b_stop_mode": "rel",
        }
        deq = get_deq(dict(settings)).train()

        def solve() -> Tensor:
            return deq(problem.f, start, solver_kwargs=dict(options))[0][-1]

        def count() -> Counts:
            tally = _Tally()

            def f(z: Tensor) -> Tensor:
                tally.forward += 1
                return problem.f(_Counted.apply(z, tally))

            differentiate(problem, lambda: deq(f, start, solver_kwargs=dict(options))[0][-1])
            return Counts(tally.forward, tally.backward)

        return torch_runner(problem, solve, count, settings | options)

    ridge = f", lam={options['lam']:g}" if options else ""
    label = f"torchdeq {SOLVERS[solver]}{ridge}; {SOLVERS[backward_solver]}, {'hook_ift' if hook else 'ift'}{layout}"
    return Contender(label, make)


class _Tally:
    forward = 0
    backward = 0


class _Counted(torch.autograd.Function):
    """The identity, which counts how often it is differentiated."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, tally: _Tally) -> Tensor:
        ctx.tally = tally
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.tally.backward += 1
        return grads[0], None
