"""`TanhEquilibrium(compiled=True)`: forward and backward pass as one compiled loop each, where everything goes well.

What a loop does not solve, or may not be used for, is left to the engine that every other layer has: samples that do
not converge, gradients of gradients, transforms, other solvers and adjoints.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._adjoint import Adjoint, Implicit
from .._call import run
from .._eagerly import eagerly
from .._extension import operators
from .._profile import span
from .._report import OnFailure, call_site, report_failures, undetected
from .._solution import AdjointReport, Solution, Status
from .._system import batched, transformed
from ..solvers import Method, Picard
from ._compiled_plan import Plan, plan_for

LOOPS = Path(__file__).with_name("_tanh_loops")
"""The source of the loops."""
Form = tuple[Tensor | None, float]
"""`Pᵀ` and c of `ShiftedTanh`, whose steps are taken then; None for plain ones."""


@cache
def tanh_loops() -> Any:
    """The loops, compiled.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    return operators(LOOPS, "torchimplicit_tanh_loops", "TanhEquilibrium(compiled=True)", "leave compiled=True out")


def at_once(
    weight: Tensor,
    x: Any,
    start: Any,
    cell: Callable[[Tensor, Tensor], Tensor],
    *,
    solver: Method | None,
    adjoint: Adjoint | None,
    max_steps: int | None,
    on_failure: OnFailure,
    label: str,
) -> Solution | None:
    """The solution of `z = tanh(W z + x)` by a compiled loop; None where that may not be, and the call is as any other.

    Args:
        weight: W, with its graph.
        x: `(..., n)`.
        start: z0.
        cell: the layer's own, for what the loop leaves.
        solver: as the layer has it, like what follows.
        adjoint: of the layer.
        max_steps: of the layer.
        on_failure: of the layer.
        label: for profilers.
    """
    if not _plain(weight, x, start):
        return None
    n = weight.shape[0]
    plan = plan_for(solver, adjoint, max_steps, n, x.dtype)
    if plan is None:
        return None
    shape = x.shape
    if x.ndim != 2:
        x, start = x.reshape(-1, n), start.reshape(-1, n)
    if not len(x):
        return None
    with span(label, "forward solve"), torch.no_grad(), undetected():
        args = weight.detach(), x.detach(), start.detach()
        form: Form = tanh_loops().shifted(args[0]) if plan.preconditioned else (None, 0.0)
        found = tanh_loops().solution(*args, *form, *plan.limits, *plan.forward, *plan.krylov, plan.unit)
        z, value, residual, steps, done, evaluations, clean = found
        status, converged = torch.zeros_like(steps), done
        if not clean:
            left = (~done).nonzero()[:, 0]
            rest, reached = _finish(plan, z, args, left, cell, max_steps)
            z, value = z.index_copy(0, left, rest.value), value.index_copy(0, left, reached)
            status, residual = status.index_copy(0, left, rest.status), residual.index_copy(0, left, rest.residual)
            before = steps.index_select(0, left) if plan.resumes else 0
            steps = steps.index_copy(0, left, before + rest.steps)
            converged = status == int(Status.CONVERGED)
            evaluations += rest.evaluations + 1
    report = AdjointReport()
    if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad):
        implicit = Implicit() if adjoint is None else adjoint
        assert isinstance(implicit, Implicit)
        dead = None
        if not clean:
            without = implicit.without_gradient(status)
            dead = without if bool(without.any()) else None
        backward = _Backward(implicit, plan, form, status, dead, report, on_failure, call_site(), label, shape[:-1])
        z = _Attach.apply(backward, weight, x, z, value)
    batch = shape[:-1]
    if x.shape != shape:
        z = z.reshape(shape)
        status, converged, residual, steps = (t.reshape(batch) for t in (status, converged, residual, steps))
    out = Solution(z, status, converged, residual, steps, evaluations, None, report)
    if not clean and not bool(converged.all()):
        report_failures("fixed_point", status, on_failure, out)
    return out


def _plain(weight: Tensor, x: Any, start: Any) -> bool:
    """Whether these are tensors of this machine's processor in its own precision, with nothing in between."""
    kinds = (Tensor, torch.nn.Parameter)
    if type(weight) not in kinds or type(x) not in kinds or type(start) not in kinds:
        return False
    if not (weight.dtype == x.dtype == start.dtype and x.dtype in (torch.float32, torch.float64)):
        return False
    if x.shape != start.shape or weight.ndim != 2 or not weight.shape[0] == weight.shape[1] == x.shape[-1]:
        return False
    if any(t.device.type != "cpu" or t.layout != torch.strided or t.is_inference() for t in (weight, x, start)):
        return False
    if torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled() or start.requires_grad:
        return False
    if transformed() or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def _finish(
    plan: Plan,
    reached: Tensor,
    args: tuple[Tensor, Tensor, Tensor],
    left: Tensor,
    cell: Callable[[Tensor, Tensor], Tensor],
    max_steps: int | None,
) -> tuple[Solution, Tensor]:
    """The samples that the loop left, by the solver itself, and the cell's value there.

    They begin at the start, or where they are if the loop is the beginning of the solver's own way.
    """
    _, x, start = (t.index_select(0, left) if i else t for i, t in enumerate(args))
    if plan.resumes:
        reached = reached.index_select(0, left)
        start = torch.where(reached.isfinite().all(dim=1, keepdim=True), reached, start)
    rest = run(
        "fixed_point",
        cell,
        start,
        (x,),
        solver=plan.rest,
        adjoint=None,
        batch_dims=1,
        max_steps=max_steps,
        on_failure="ignore",
        trace=False,
        verbose=False,
    )
    return rest, cell(rest.value, x)


@dataclass(eq=False, repr=False)
class _Backward:
    """What a backward pass needs beside tensors.

    Attributes:
        adjoint: of the layer.
        plan: of the loops.
        form: of their steps.
        status: `(B,)`, how the solve ended.
        dead: `(B,)` bool, the samples without a gradient; None if there are none.
        report: to be filled.
        on_failure: what becomes of failures.
        site: whom to blame for them.
        label: for profilers.
        batch: shape of the batch.
    """

    adjoint: Implicit
    plan: Plan
    form: Form
    status: Tensor
    dead: Tensor | None
    report: AdjointReport
    on_failure: OnFailure
    site: tuple[str, int]
    label: str
    batch: torch.Size

    def quickly(self, weight: Tensor, z: Tensor, value: Tensor, v: Tensor, of_weight: bool) -> Any:
        """The gradients of W and x by the compiled loop; None where it does not converge."""
        plan = self.plan
        if self.dead is not None:
            v = torch.where(self.dead[:, None], 0.0, v)
        with span(self.label, "adjoint solve"):
            tensors = weight.detach(), z.detach(), value, v.detach()
            found = tanh_loops().gradient(*tensors, *self.form, plan.rtol, *plan.backward, of_weight)
            of_x, of_w, residual, steps, evaluations, clean = found
            if not clean:
                return None
        status = torch.zeros_like(steps)
        if self.dead is not None:
            status = torch.where(self.dead, self.status, status)
        self._note(status, residual, steps, evaluations)
        return of_w if of_weight else None, of_x

    def thoroughly(self, weight: Tensor, x: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients by the engine of all layers, with a graph of their own where one is wanted."""
        graph = torch.is_grad_enabled()
        if self.dead is not None:
            v = torch.where(self.dead[:, None], 0.0, v)
        with torch.enable_grad():
            adjoint = replace(self.adjoint, unconverged="linearize")
            again = run(
                "fixed_point",
                _cell,
                z.detach(),
                (x, weight),
                solver=Picard(),
                adjoint=adjoint,
                batch_dims=1,
                max_steps=0,
                on_failure="ignore",
                trace=False,
                verbose=False,
            )
            wanted = [t for t in (weight, x) if t.requires_grad]
            grads = iter(torch.autograd.grad(again.value, wanted, v, create_graph=graph))
        found = again.adjoint
        if found.status is not None and found.residual is not None and found.steps is not None:
            status = found.status if self.dead is None else torch.where(self.dead, self.status, found.status)
            self._note(status, found.residual, found.steps, found.evaluations)
            if bool((found.status != int(Status.CONVERGED)).any()):
                what = "backward of fixed_point (the gradient of these samples is zero)"
                report_failures(what, found.status, self.on_failure, site=self.site)
        return tuple(next(grads) if t.requires_grad else None for t in (weight, x))

    def _note(self, status: Tensor, residual: Tensor, steps: Tensor, evaluations: int | None) -> None:
        shaped = len(self.batch) != 1
        parts = [t.reshape(self.batch) if shaped else t for t in (status, residual, steps)]
        self.report.status, self.report.residual, self.report.steps = parts
        self.report.evaluations = evaluations


class _Attach(torch.autograd.Function):
    """The solution, with the implicit function theorem as its derivative."""

    @staticmethod
    def forward(ctx: Any, backward: _Backward, weight: Tensor, x: Tensor, z: Tensor, value: Tensor) -> Tensor:
        ctx.of = backward
        out = z.view_as(z)
        ctx.save_for_backward(weight, x, out, value)
        return out

    @staticmethod
    @eagerly
    def backward(ctx: Any, *grads: Tensor) -> Any:
        of: _Backward = ctx.of
        weight, x, z, value = ctx.saved_tensors
        (v,) = grads
        with undetected():
            if not torch.is_grad_enabled() and not batched(v):
                found = of.quickly(weight, z, value, v, ctx.needs_input_grad[1])
                if found is not None:
                    return None, *found, None, None
            return None, *of.thoroughly(weight, x, z, v), None, None


def _cell(z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(torch.addmm(x, z, weight.t()))
