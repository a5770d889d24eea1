"""How a system is solved, forward and adjoint, on plain tensors: what stands behind the derivative rules."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._adjoint import LinearAdjoint
from ._books import Outcome
from ._closure import substituted
from ._isolate import Donors
from ._layout import Layout
from ._objective import Gradient
from ._problem import Problem
from ._report import OnFailure, report_failures
from ._solution import AdjointReport, Status
from ._stages import solve
from ._system import System
from ._tape import Tape, run_eagerly
from .linear import AutogradJacobian, Inverse, ResidualJacobian
from .solvers import Method


@dataclass(frozen=True)
class Copies:
    """An inverse for several copies of each sample's system, copy after copy."""

    inverse: Inverse
    count: int

    def apply(self, p: Tensor, transposed: bool) -> Tensor:
        """Of each copy."""
        return torch.cat([self.inverse.apply(part, transposed) for part in p.chunk(self.count)])


@dataclass
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
    inverse: Inverse | None = None
    keep_trace: bool = False
    traces: list[Tensor] = field(default_factory=list)

    def system(self) -> System:
        """The equation as a pure function of z and of the tensors that it reads."""
        return System(self.problem.kind, self._call, self)

    def _call(self, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        problem = self.problem
        if self.donors is not None:
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
        """`z*`, and of each sample the status, the residual and the steps."""
        if self.method is None:
            raise AssertionError("the solution of this equation is known")
        problem = self._plain(system, z0, tensors)
        with torch.no_grad(), problem.exact():
            if self.adjoint.needs_inverse:
                problem.keep_inverse()
            outcome = solve(problem, self.method, z0.detach().clone(), self.max_steps, self.keep_trace)
        self.problem.count(problem.evaluations)
        self._tell(system, outcome)
        self.inverse = outcome.inverse if not system.lanes else None
        return outcome.z, outcome.status, outcome.residual, outcome.steps

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
        fn: Any = lambda z: system.call(z, tensors)  # noqa: E731
        if kind in ("minimize", "least_squares"):
            fn = Gradient(kind, fn, layout, squares=kind == "least_squares")
        problem = Problem(kind, fn, (), layout)
        problem.epsilon = self.problem.epsilon
        return problem

    def solve_linear(
        self, system: System, transposed: bool, v: Tensor, z: Tensor, status: Tensor, tensors: Sequence[Tensor]
    ) -> Tensor:
        """`A⁻¹ v` or `A⁻ᵀ v`; zero for samples that have no derivative, and where the system cannot be solved."""
        dead = self.adjoint.without_gradient(status)
        before = self.problem.evaluations
        tensors = [t.detach() for t in tensors]
        with torch.no_grad(), self.problem.exact():
            record = AutogradJacobian.at(lambda z: system.value(z, tensors), z, self.problem.count)
            operator = ResidualJacobian(record, shifted=system.kind == "fixed_point")
            v = torch.where(dead[:, None], 0.0, v)
            found = self.adjoint.solve(operator.mT if transposed else operator, v, self._inverse(system))
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
