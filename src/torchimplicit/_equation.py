"""How a system is solved, forward and adjoint, on plain tensors: what stands behind the derivative rules."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._adjoint import LinearAdjoint, solve_adjoint
from ._books import Outcome
from ._closure import substituted
from ._isolate import Donors, choices, same
from ._layout import Layout
from ._objective import Gradient
from ._problem import Problem
from ._profile import span
from ._report import OnFailure, report_failures
from ._solution import AdjointReport, Status
from ._stages import solve
from ._system import System, traced, untraced
from ._tape import Tape, run_eagerly
from .linear import AutogradJacobian, Inverse
from .solvers import Method


@dataclass(frozen=True, eq=False, repr=False)
class Copies:
    """An inverse for several copies of each sample's system, copy after copy."""

    inverse: Inverse
    count: int

    def apply(self, p: Tensor, transposed: bool) -> Tensor:
        """Of each copy."""
        return torch.cat([self.inverse.apply(part, transposed) for part in p.chunk(self.count)])


@dataclass(eq=False, repr=False)
class Equation:
    """The user's equation, and how it is solved.

    Attributes:
        problem: with the user's own fn and args.
        method: the solver; None where the solution is known.
        adjoint: of the linear systems.
        max_steps: of the solver.
        on_failure: what becomes of failures.
        site: the user's line, for warnings.
        report: filled by the linear solves.
        tape: of fn at the solution; None until it is known, when fn itself is called.
        reads: the tensors that fn reads, in the order of the system's.
        places: where among the system's tensors the tape's inputs are; None where these are the same.
        inverse: what the solver knew of `A⁻¹`.
        donors: stand in for failed samples.
        rows: which of the tensors are indexed by sample, where donors are among them.
        failed: whether any sample, of any lane, has no gradient.
        keep_trace: whether to keep the residuals of every step.
        traces: these.
    """

    problem: Problem
    method: Method | None
    adjoint: LinearAdjoint
    max_steps: int | None
    on_failure: OnFailure
    site: tuple[str, int]
    report: AdjointReport
    tape: Tape | None
    reads: list[Tensor]
    places: list[int] | None = None
    donors: Donors | None = None
    rows: tuple[int, ...] = ()
    failed: bool = False
    inverse: Inverse | None = None
    keep_trace: bool = False
    traces: list[Tensor] = field(default_factory=list)

    def system(self) -> System:
        """The equation as a pure function of z and of the tensors that it reads."""
        return System(self.problem.kind, self._call, self)

    def _call(self, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        problem = self.problem
        if len(tensors) > len(self.reads):
            *tensors, index = tensors
            z, tensors = Donors(index, problem.layout.batch_shape, self.rows).replace(z, tensors)
        elif self.donors is not None:
            z, tensors = self.donors.replace(z, tensors)
        argument = problem.layout.unpack(z)
        if self.tape is None:
            user = problem.fn.fn if isinstance(problem.fn, Gradient) else problem.fn
            with run_eagerly():
                out = substituted(
                    lambda: problem.under_autocast(problem.held(user), argument), self.reads, list(tensors)
                )
        else:
            own = tensors if self.places is None else [tensors[i] for i in self.places]
            out = problem.held(self.tape.replay)(argument, own)
        return problem.packed(out)

    def solve(self, system: System, z0: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`z*`, and of each sample the status, the residual, the steps, and who stands in for it where it failed."""
        if self.method is None:
            raise AssertionError("the solution of this equation is known")
        problem = self._plain(system, z0, tensors)
        with span(self.problem.label, "forward solve"), untraced(), torch.no_grad(), problem.exact():
            if self.adjoint.needs_inverse:
                problem.keep_inverse()
            outcome = solve(problem, self.method, z0.detach().clone(), self.max_steps, self.keep_trace)
            donors = self._find_donors(system, outcome, tensors)
        self.problem.count(problem.evaluations)
        with untraced():
            self._tell(system, outcome)
        self.inverse = outcome.inverse if not system.lanes else None
        return outcome.z, outcome.status, outcome.residual, outcome.steps, donors

    def isolated(self, tensors: Sequence[Tensor], donors: Tensor) -> list[Tensor]:
        """The tensors, and the donors where samples failed."""
        return [*tensors, donors] if self.failed else list(tensors)

    def _find_donors(self, system: System, outcome: Outcome, tensors: Sequence[Tensor]) -> Tensor:
        """For each sample one of its lane that stands in for it in the derivatives: itself unless it failed, `(B,)`.

        Raises:
            RuntimeError: failed samples cannot be told from the others.
        """
        batch = self.problem.layout.matrix_shape[0]
        own = torch.arange(batch, device=outcome.z.device).expand(*system.lanes, batch)
        dead = self.adjoint.without_gradient(outcome.status).reshape(own.shape)
        if not bool(dead.any()):
            return own.reshape(-1)
        self.failed = True
        first = dead.logical_not().long().argmax(dim=-1, keepdim=True)
        index = torch.where(dead, first, own)
        healthy = ~dead.reshape(-1)
        wide = system.widened()
        with torch.no_grad(), self.problem.exact():
            value = wide.call(outcome.z, [*tensors, own])
            for chosen in choices(self.problem, self.reads):
                self.rows = tuple(i for i, t in enumerate(self.reads) if any(t is c for c in chosen))
                try:
                    output = wide.call(outcome.z, [*tensors, index])
                except (RuntimeError, ValueError, TypeError, IndexError):
                    continue
                if not bool(healthy.any()) or same(output, value, healthy, ~dead.all(dim=-1, keepdim=True) | ~dead):
                    return index.reshape(-1)
        raise RuntimeError(
            f"{self.problem.kind}: samples failed ({int((~healthy).sum())}), and what fn reads of them cannot be told "
            "from what it reads of the others, which their derivatives would spoil; give what is indexed by sample as "
            "args, with the batch in front."
        )

    def _inverse(self, system: System) -> Inverse | None:
        """What was known of the inverse, for a system whose lanes are copies."""
        if self.inverse is None or not system.lanes:
            return self.inverse
        return Copies(self.inverse, prod(system.lanes))

    def require_exact(self) -> None:
        """Raise unless the gradient has derivatives of its own."""
        if not self.adjoint.exact:
            raise RuntimeError(
                f"{self.problem.kind}: adjoint={type(self.adjoint).__name__}(...) approximates the first derivative, "
                "which has no derivative of its own and no forward mode; use torchimplicit.Implicit()."
            )

    def _tell(self, system: System, outcome: Outcome) -> None:
        if outcome.trace is not None and not system.lanes:
            self.traces.append(outcome.trace)
        if not bool((outcome.status == int(Status.CONVERGED)).all()):
            report_failures(self.problem.kind, outcome.status, self.on_failure, site=self.site)

    def _plain(self, system: System, z: Tensor, tensors: Sequence[Tensor]) -> Problem:
        """The system as a problem whose states are rows."""
        kind, layout = system.kind, Layout.of(z, 1)

        def call(z: Tensor) -> Tensor:
            out = system.call(z, tensors)
            problem.epsilon = max(problem.epsilon, self.problem.epsilon)  # what was seen in this evaluation
            return out

        fn: Any = call
        if kind in ("minimize", "least_squares"):
            fn = Gradient(kind, fn, layout, squares=kind == "least_squares")
        problem = Problem(kind, fn, (), layout)
        problem.epsilon = max(problem.epsilon, self.problem.epsilon)
        problem.preconditionable = self.problem.preconditionable  # by the user's cell, if not here
        return problem

    def solve_linear(
        self, system: System, transposed: bool, v: Tensor, z: Tensor, status: Tensor, tensors: Sequence[Tensor]
    ) -> Tensor:
        """`A⁻¹ v` or `A⁻ᵀ v`; zero for samples that have no derivative, and where the system cannot be solved."""
        if traced():
            raise RuntimeError(
                f"{system.kind}: torch.func.linearize of a derivative is not supported: a solver cannot be traced; use "
                "torch.func.jvp, under torch.func.vmap for several tangents."
            )
        dead = self.adjoint.without_gradient(status)
        before = self.problem.evaluations
        tensors = [t.detach() for t in tensors]
        phase = "adjoint solve" if transposed else "tangent solve"
        with span(self.problem.label, phase), torch.no_grad(), self.problem.exact():
            record = AutogradJacobian.at(lambda z: system.value(z, tensors), z, self.problem.count)
            operator = self.problem.operator(record)
            v = torch.where(dead[:, None], 0.0, v)
            operator = operator.mT if transposed else operator
            found = solve_adjoint(self.adjoint, operator, v, self._inverse(system))
        status = torch.where(dead, status, found.status)
        shape = (*system.lanes, *self.problem.layout.batch_shape)
        self.report.status = status.reshape(shape)
        self.report.residual = found.residual.reshape(shape)
        self.report.steps = found.steps.reshape(shape)
        self.report.evaluations = self.problem.evaluations - before
        if not found.solved:
            what = f"derivative of {system.kind} (that of these samples is zero)"
            report_failures(what, found.status, self.on_failure, site=self.site)
        return found.value if not bool(dead.any()) else torch.where(dead[:, None], 0.0, found.value)
