"""The derivative engine: hangs a solution into autograd's graph by the implicit function theorem.

At the solution `z*` fn is evaluated once more with grad mode on, from a `z` that is a leaf of its own. The value
returned is `z*`, through a `Function` whose only differentiable input is that evaluation; in the backward pass it
turns the incoming `v` into `u`, `Aᵀu = v`, by products with the recorded graph, and hands `u` to the evaluation's
output: autograd then takes `u` to whatever fn read — arguments, closures, parameters — by itself. Nothing has to be
listed, so nothing can be forgotten; and nothing is evaluated again later, so a closure variable that has been rebound
meanwhile (a loop's, say) cannot put another function's gradient in the place of this one's. One evaluation's
activations are kept, however many steps the solver took. A cell that supplies its derivatives itself spares even that.

That is the first derivative. With `create_graph=True`, or for a batch of incoming gradients, the rules of `_rules` take
its place, on the tape of that evaluation: the tensors that it read are inputs of the `Function` too.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ._adjoint import LinearAdjoint, solve_adjoint
from ._books import Outcome
from ._eagerly import eagerly
from ._equation import Equation
from ._isolate import Donors, evaluate_without, inert, shield, start_of_graph
from ._precision import overflowed
from ._problem import Problem
from ._profile import span
from ._report import OnFailure, report_failures, undetected
from ._rules import gradients, solve_linear
from ._solution import AdjointReport
from ._system import batched
from ._tape import Tape
from .linear import AutogradJacobian, Inverse, ResidualJacobian, SuppliedJacobian


@dataclass(eq=False, repr=False)
class Backward:
    """What one backward pass needs: how to solve, where to report, and the recorded evaluation.

    Attributes:
        dead: `(B,)` bool, samples whose gradient is zero whatever comes in; None if there are none.
        status: `(B,)`, how the forward solve ended.
        operator: `A` at the solution.
        z: the solution, `(B, n)`.
        record: fn's recorded output; None where the cell supplies its own pullback.
        tape: of that evaluation; None if it is to be made when it is asked for, of a module with a closed form.
        reads: the tensors that fn reads, or may read.
        state: where there is no tape, the module's parameters and buffers as they were.
        donors: where failed samples were taken out of it, whose rows stand in their places, and in which inputs.
        inverse: what the solver knew of `A⁻¹`.
        versions: of the parameters that a supplied pullback depends on, as they were.
    """

    adjoint: LinearAdjoint
    problem: Problem
    dead: Tensor | None
    status: Tensor
    report: AdjointReport
    on_failure: OnFailure
    site: tuple[str, int]
    operator: ResidualJacobian
    z: Tensor
    record: AutogradJacobian | None
    tape: Tape | None
    reads: list[Tensor]
    state: dict[str, Tensor]
    donors: Donors | None
    inverse: Inverse | None
    versions: dict[str, int]

    def equation(self) -> Equation:
        """For the derivative rules."""
        places = None
        tape = self.tape
        if tape is None:
            call = partial(functional_call, self.problem.fn, self.state)
            with torch.enable_grad():
                tape, _ = Tape.record(lambda *args: call(args), self.z, self.problem.args)
            known = {id(t): i for i, t in enumerate(self.reads)}
            places = [known.get(id(t), -1) for t in tape.inputs]
        if tape.opaque or (places is not None and -1 in places):
            raise RuntimeError(
                f"{self.problem.kind}: a derivative of the gradient needs every operation of fn to be visible, but "
                "some tensors are made out of sight, by torch.compile or a custom autograd.Function; write it in plain "
                "operations."
            )
        return Equation(
            problem=self.problem,
            method=None,
            adjoint=self.adjoint,
            max_steps=None,
            on_failure=self.on_failure,
            site=self.site,
            report=self.report,
            tape=tape,
            reads=self.reads,
            places=places,
            donors=self.donors,
            inverse=self.inverse,
        )

    def solve(self, v: Tensor) -> Tensor:
        """The gradient with respect to fn's output for the gradient `v` with respect to z*, `(B, n)` both."""
        before = self.problem.evaluations
        if self.dead is not None:
            v = torch.where(self.dead[:, None], 0.0, v)
        kind = v.device.type
        exact = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
        with span(self.problem.label, "adjoint solve"), exact:
            found = solve_adjoint(self.adjoint, replace(self.operator.mT, record=self._coarsely), v, self.inverse)
        status = found.status if self.dead is None else torch.where(self.dead, self.status, found.status)
        layout = self.problem.layout
        self.report.status = layout.per_sample(status)
        self.report.residual = layout.per_sample(found.residual)
        self.report.steps = layout.per_sample(found.steps)
        self.report.evaluations = self.problem.evaluations - before
        if self.problem.narrow:
            lost = overflowed(v, found.value)
            if bool(lost.any()):
                # The loss is scaled beyond float16: whoever scales it must see that, and takes no step.
                return torch.where(lost[:, None], torch.nan, found.value)
        if self.record is not None and (not found.solved or self.dead is not None):
            shield(self.record.output, self.record.state, everywhere=True, infinite=not self.problem.narrow)
        if not found.solved:
            what = f"backward of {self.problem.kind} (the gradient of these samples is zero)"
            report_failures(what, found.status, self.on_failure, site=self.site)
        return found.value if self.problem.kind == "fixed_point" else -found.value

    def _coarsely(self) -> AutogradJacobian | SuppliedJacobian | None:
        """fn's Jacobian at the solution in reduced precision, for refinements; None where that gains nothing."""
        problem = self.problem.coarse()
        if problem is None or (self.tape is not None and self.tape.opaque):
            return None
        if self.tape is None and problem.has_closed_form:
            with torch.no_grad():  # z is its own value, as nearly as that matters here
                jacobian = problem.linearize(self.z, self.z).jacobian
            assert isinstance(jacobian, SuppliedJacobian)
            return jacobian
        with problem.casts():
            if self.tape is None:
                return AutogradJacobian.at(problem.output, self.z, problem.count)
            # What fn did then, for it may do something else by now.
            system, tensors = self.equation().system(), [t.detach() for t in self.reads]
            return AutogradJacobian.at(lambda z: system.value(z, tensors), self.z, problem.count)

    def pull(self, u: Tensor) -> list[Tensor | None]:
        """`uᵀ ∂fn/∂t` of each of the tensors that fn reads, in closed form."""
        jacobian = self.operator.jacobian
        assert isinstance(jacobian, SuppliedJacobian)
        changed = [name for name, version in self.versions.items() if self.state[name]._version != version]
        if changed:
            raise RuntimeError(
                f"{self.problem.kind}: {', '.join(changed)}, needed for the gradient, was modified by an inplace "
                "operation after the solve; take the optimiser's step after the backward pass."
            )
        args, parameters = jacobian.pullback(u)
        total: dict[int, Tensor] = {}
        named = [(self.state[name], grad) for name, grad in parameters.items()]
        for t, grad in (*zip(self.problem.args, args, strict=True), *named):
            if grad is not None:  # one tensor may have several parts
                total[id(t)] = grad if id(t) not in total else total[id(t)] + grad
        return [total.get(id(t)) for t in self.reads]


class _Attach(torch.autograd.Function):
    """`z*`, with the implicit function theorem as its derivative with respect to fn's recorded output.

    Or, for derivatives of the derivative, with respect to the tensors that fn read.
    """

    @staticmethod
    def forward(ctx: Any, backward: Backward, output: Tensor | None, z: Tensor, *tensors: Tensor) -> Tensor:
        ctx.of = backward
        out = z.view_as(z)
        ctx.save_for_backward(out, *tensors)
        return out

    @staticmethod
    @eagerly  # `backward()` may be called in the midst of a function that is compiled
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with undetected():
            return _Attach._gradients(ctx, *grads)

    @staticmethod
    def _gradients(ctx: Any, *grads: Tensor) -> Any:
        of: Backward = ctx.of
        if not torch.is_grad_enabled() and not batched(grads[0]):
            # What was saved is for derivatives of the derivative: changed in place since, it does not matter here.
            u = of.solve(grads[0])
            return (None, u, None, *(None for _ in of.reads)) if of.record else (None, None, None, *of.pull(u))
        z, *tensors = ctx.saved_tensors
        system = of.equation().system()
        if torch.is_grad_enabled() or not of.record:
            return None, None, None, *gradients(system, grads[0], z, of.status, tensors, ctx.needs_input_grad[3:])
        u = solve_linear(system, True, grads[0], z, of.status, tensors)
        return None, u if of.problem.kind == "fixed_point" else -u, None, *(None for _ in tensors)


def attach(
    problem: Problem,
    outcome: Outcome,
    z0: list[Tensor],
    adjoint: LinearAdjoint,
    report: AdjointReport,
    on_failure: OnFailure,
    site: tuple[str, int],
) -> Tensor:
    """`z*`, `(B, n)`, differentiable in everything that fn reads.

    Args:
        problem: the equation.
        outcome: the solution without a graph, and how each sample ended.
        z0: leaves of the start: their gradient is exactly zero, which costs nothing.
        adjoint: how to solve the adjoint system.
        report: filled by the backward pass.
        on_failure: what becomes of failures of the adjoint solve.
        site: the user's line, for warnings.
    """
    z, status, finite = outcome.z, outcome.status, outcome.finite
    dead = None if outcome.clean else adjoint.without_gradient(status)
    if dead is not None and not bool(dead.any()):
        dead = None
    starts = [t for t in z0 if t.requires_grad]
    with torch.enable_grad():
        inputs: list[Tensor] = []
        donors = None
        state: dict[str, Tensor] = {}
        closed = isinstance(problem.fn, nn.Module) and problem.has_closed_form
        if closed:
            # What it reads is known without a tape, which costs as much as a cheap cell.
            state = {**dict(problem.fn.named_parameters()), **dict(problem.fn.named_buffers())}
        supplied = _supplied(problem, outcome, state) if closed and dead is None else None
        output, start, tape = None, z, None
        if supplied is not None:
            pass
        elif dead is not None and not bool(finite[dead].all()):
            # fn is NaN or infinite somewhere in this evaluation, and 0·NaN = NaN: take those samples out of it.
            output, start, inputs, tape, donors = evaluate_without(problem, z, dead | ~finite)
        else:
            start = start_of_graph(z)
            output, tape = (problem.output(start), None) if closed else problem.recorded(start)
        record = None
        if supplied is not None:
            operator = supplied
        elif output is None or not _reads_more(problem, output, start):
            return inert(z, [*inputs, *starts])
        else:
            if not problem.narrow:  # where an infinite gradient says that the loss is scaled too much
                shield(output, start, everywhere=False)
            record = AutogradJacobian(output, start, problem.count)
            operator = problem.operator(record)
            if problem.has_closed_form and dead is None:
                with torch.no_grad():
                    operator = problem.linearize(z, output.detach())
        if tape is None:
            given = (t for t in pytree.tree_leaves(problem.args) if isinstance(t, Tensor))
            reads = list({id(t): t for t in (*given, *state.values())}.values())
        else:
            reads = tape.inputs
        backward = Backward(
            adjoint=adjoint,
            problem=problem,
            dead=dead,
            status=status,
            report=report,
            on_failure=on_failure,
            site=site,
            operator=operator,
            z=z,
            record=record,
            tape=tape,
            reads=reads,
            state=state,
            donors=donors,
            inverse=outcome.inverse,
            versions={}
            if supplied is None
            else {name: t._version for name, t in state.items() if not t.is_inference()},
        )
        attached: Tensor = _Attach.apply(backward, output, z, *reads)  # pyright: ignore[reportAssignmentType]
        return inert(attached, starts)


def _supplied(problem: Problem, outcome: Outcome, state: dict[str, Tensor]) -> ResidualJacobian | None:
    """`A` from a cell that also supplies the derivatives by all that it reads; None if it does not."""
    with torch.no_grad():
        value = problem.output(outcome.z) if outcome.value is None else outcome.value
        operator = problem.linearize(outcome.z, value)
    jacobian = operator.jacobian
    if not isinstance(jacobian, SuppliedJacobian) or jacobian.reads is None:
        return None
    # What is computed from parameters, by a parametrization say, has no gradient of its own.
    complete = all(name in jacobian.reads for name, t in state.items() if t.requires_grad)
    return operator if complete and all(isinstance(a, Tensor) for a in problem.args) else None


def _reads_more(problem: Problem, output: Tensor, start: Tensor) -> bool:
    """Whether fn's recorded output depends on anything that requires a gradient beside the start of its graph."""
    if any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(problem.args)):
        return True
    pending, seen = [output.grad_fn], {start.grad_fn}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if not node.next_functions or node.name().endswith("AccumulateGrad"):
            return True
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    return False
