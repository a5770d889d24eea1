"""A call under `torch.func` transforms or in forward mode: every tensor that fn reads is an input of the rules."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._adjoint import LinearAdjoint
from ._equation import Equation
from ._objective import Gradient
from ._problem import Problem
from ._report import OnFailure, call_site
from ._rules import solve
from ._solution import AdjointReport, Solution, Status
from ._system import refuse_forward_over_forward, transformed
from ._tape import Tape, run_eagerly
from .solvers import Method


def needs_rules(problem: Problem, start: Tensor) -> bool:
    """Whether a call is transformed, or reads dual tensors (which takes an evaluation to see, in `dual_level` only)."""
    if transformed():
        return True
    if forward_ad._current_level < 0:
        return False
    tape = _tape(problem, start)
    return tape.opaque or any(_is_dual(t) for t in tape.inputs)  # what is out of sight may be dual: refused there


def run_transformed(
    problem: Problem,
    start: Tensor,
    solver: Method,
    adjoint: LinearAdjoint,
    max_steps: int | None,
    on_failure: OnFailure,
    trace: bool,
) -> Solution:
    """Solve with the derivative rules in place."""
    refuse_forward_over_forward(problem.kind)
    first = _tape(problem, start)
    if first.opaque:
        raise _unseen(problem.kind)
    report = AdjointReport()
    equation = Equation(
        problem=problem,
        method=solver,
        adjoint=adjoint,
        max_steps=max_steps,
        on_failure=on_failure,
        site=call_site(),
        report=report,
        tape=None,
        reads=first.inputs,
        keep_trace=trace,
    )
    z, status, residual, steps, _ = solve(equation.system(), start, first.inputs)
    final = _tape(problem, z)
    known = {id(t): i for i, t in enumerate(first.inputs)}
    if final.opaque or any(id(t) not in known for t in final.inputs):
        raise _unseen(problem.kind)
    equation.tape, equation.places = final, [known[id(t)] for t in final.inputs]
    layout = problem.layout
    return Solution(
        value=layout.unpack(z),
        status=layout.per_sample(status),
        converged=layout.per_sample(status == int(Status.CONVERGED)),
        residual=layout.per_sample(residual),
        steps=layout.per_sample(steps),
        evaluations=problem.evaluations,
        trace=layout.per_sample(equation.traces[0]) if equation.traces else None,
        adjoint=report,
    )


def _unseen(kind: str) -> RuntimeError:
    return RuntimeError(
        f"{kind}: under torch.func and in forward mode every operation of fn must be visible, but some tensors that it "
        "reads are made out of sight, by a custom autograd.Function or a transform inside fn, or differ from call to "
        "call; write these in plain operations, or use torch.autograd.grad or backward."
    )


def _tape(problem: Problem, z: Tensor) -> Tape:
    """Of the user's function at a state."""
    user = problem.fn.fn if isinstance(problem.fn, Gradient) else problem.fn
    recorded: list[Tape] = []

    def record(argument: Any, *args: Any) -> Any:
        tape, out = Tape.record(problem.held(user), argument, args)
        recorded.append(tape)
        return out

    with torch.enable_grad(), run_eagerly():
        problem.packed(problem.under_autocast(record, problem.layout.unpack(z.detach())))
    problem.count(1)
    return recorded[0]


def _is_dual(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and forward_ad.unpack_dual(leaf).tangent is not None
