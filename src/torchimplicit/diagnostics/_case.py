"""One problem that several solvers are tried on: a run, its trace and time, and a look at what it returned."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._api import fixed_point, least_squares, minimize, root
from .._evaluation import Evaluation
from .._layout import Layout
from .._norms import norm_function, two
from .._objective import Gradient
from .._problem import Kind, Problem
from .._progress import Progress
from .._solution import PyTree, Solution, Status
from .._stages import solve
from .._tolerance import Tolerance
from ..solvers import Method
from ._comparison import SolverResult, Trace

_CALLS: dict[str, Callable[..., Solution]] = {
    "fixed_point": fixed_point,
    "root": root,
    "minimize": minimize,
    "least_squares": least_squares,
}
_TWICE, _TENFOLD = 2.0, 10.0
"""Times the tolerance that a residual evaluated anew may be; times itself, where rounding was said to be all of it."""
_ROUNDING = 64.0
"""Rounding units of the initial residual below which a residual is not looked at."""
_ELSEWHERE = 0.1
"""Relative distance from which on two solutions are different ones."""


class _Meter(Progress):
    """Notes what a solve has cost after each step, in evaluations."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.kind)
        self._problem = problem
        self.evaluations: list[int] = []

    def step(self, solver: object, norm: Tensor, left: int) -> None:
        """After a step."""
        self.evaluations.append(self._problem.evaluations)


@dataclass(frozen=True)
class Case:
    """The problem that all solve.

    Attributes:
        start: z0 as a matrix, `(B, n)`.
        first: fn there.
    """

    kind: Kind
    fn: Callable[..., PyTree]
    z0: PyTree
    args: tuple[Any, ...]
    layout: Layout
    max_steps: int | None
    start: Tensor
    first: Evaluation

    @classmethod
    def of(
        cls,
        kind: Kind,
        fn: Callable[..., PyTree],
        z0: PyTree,
        args: tuple[Any, ...],
        batch_dims: int,
        max_steps: int | None,
    ) -> "Case":
        """Read the call, and evaluate fn at the start: what is wrong with them is no solver's fault, and raised."""
        layout = Layout.of(z0, batch_dims)
        if not layout.matrix_shape[0]:
            raise ValueError(f"compare_solvers: z0 of shape {tuple(layout.shapes[0])} has no samples to compare with.")
        problem = _problem(kind, fn, args, layout)
        with torch.no_grad(), problem.exact(), _undisturbed(fn, layout.device):
            start = layout.pack([leaf.detach() for leaf in pytree.tree_leaves(z0)]).clone()
            first = problem.evaluate(start)
        return cls(kind, fn, z0, args, layout, max_steps, start, first)

    def judge(self, name: str, solver: Method, repeats: int) -> SolverResult:
        """Run a solver and look at what it returned; a row of its own if it raises."""
        try:
            trace = self._trace(solver)
            runs = [self._timed(solver) for _ in range(repeats)]
            seconds = _median(torch.tensor([seconds for _, seconds in runs], dtype=torch.float64, device="cpu"))
            return self._row(name, solver, runs[0][0], trace, float(seconds))
        except Exception as error:
            message = str(error).strip().partition("\n")[0]
            return SolverResult(name, solver, error=f"{type(error).__name__}: {message}".removesuffix(": "))

    def beside(self, first: SolverResult, other: SolverResult) -> SolverResult:
        """The other row, with the number of samples that it solved with another solution than the first."""
        if first.status is None or other.status is None:
            return other
        mine, theirs = (self._pack(row.value) for row in (first, other))
        both = ((first.status == int(Status.CONVERGED)) & (other.status == int(Status.CONVERGED))).reshape(-1)
        size = torch.stack([two(mine), two(theirs), two(self.start)]).amax(0)
        return replace(other, elsewhere=int((both & (two(mine - theirs) > _ELSEWHERE * size)).sum()))

    def _trace(self, solver: Method) -> Trace:
        """One run that is watched, and serves to warm up."""
        problem = _problem(self.kind, self.fn, self.args, self.layout)
        meter = _Meter(problem)
        with torch.no_grad(), problem.exact(), _undisturbed(self.fn, self.layout.device):
            outcome = solve(problem, solver, self.start.clone(), self.max_steps, True, meter)
            assert outcome.trace is not None
            norms = torch.cat((norm_function(solver.norm)(self.first.residual)[None], outcome.trace))
            norms = torch.where(norms.isnan(), torch.inf, norms)
            worst = norms.amax(dim=1)
        return Trace((1, *meter.evaluations), tuple(_median(norms).tolist()), tuple(worst.tolist()))

    def _timed(self, solver: Method) -> tuple[Solution, float]:
        """One run as a user's, and its seconds."""
        call, device = _CALLS[self.kind], self.layout.device
        options: dict[str, Any] = {"batch_dims": len(self.layout.batch_shape), "max_steps": self.max_steps}
        with torch.no_grad(), _undisturbed(self.fn, device):
            _wait_for(device)
            begin = time.perf_counter()
            solution = call(self.fn, self.z0, *self.args, solver=solver, on_failure="ignore", **options)
            _wait_for(device)
            return solution, time.perf_counter() - begin

    def _row(self, name: str, solver: Method, solution: Solution, trace: Trace, seconds: float) -> SolverResult:
        """Evaluate fn at the value that was returned, and believe what that shows."""
        problem = _problem(self.kind, self.fn, self.args, self.layout)
        norm = norm_function(solver.norm)
        with torch.no_grad(), problem.exact(), _undisturbed(self.fn, self.layout.device):
            found = problem.evaluate(self._pack(solution.value))
            tolerance = Tolerance(problem, solver, self.start, self.first)
            residual, first = norm(found.residual), norm(self.first.residual)
            limit = (tolerance.unit * tolerance.limit(found)).expand_as(residual)
        residual = torch.where(residual.isfinite(), residual, torch.inf)
        status, told = solution.status.reshape(-1), solution.residual.reshape(-1)
        claimed = status == int(Status.CONVERGED)
        rounding = _ROUNDING * problem.epsilon * torch.where(first.isfinite(), first, 0.0)
        agrees = residual <= torch.maximum(torch.where(told <= limit, _TWICE * limit, _TENFOLD * told), rounding)
        counts = torch.bincount(status.long().cpu(), minlength=len(Status)).tolist()
        solved = int((claimed & agrees).sum())
        steps = solution.steps.reshape(-1)
        # A start at which fn is not finite has no tolerance; a solver that found another start has its own.
        known = first.isfinite()
        chosen = claimed & known if bool((claimed & known).any()) else known
        limits = limit[chosen] if bool(known.any()) else limit.new_full((1,), torch.nan)
        return SolverResult(
            name=name,
            solver=solver,
            converged=solved / status.numel(),
            solved=solved,
            steps=float(_median(steps.double())),
            max_steps=int(steps.max()),
            evaluations=solution.evaluations,
            seconds=seconds,
            residual=float(_median(residual)),
            worst_residual=float(residual.max()),
            tolerance=float(_median(limits)),
            tolerance_range=(float(limits.min()), float(limits.max())),
            objective=None if found.objective is None else float(_median(found.objective)),
            failures={s: counts[s] for s in Status if s is not Status.CONVERGED and counts[s]},
            refuted=int((claimed & ~agrees).sum()),
            value=pytree.tree_map(lambda t: t.detach(), solution.value),
            status=solution.status,
            trace=trace,
        )

    def _pack(self, value: PyTree) -> Tensor:
        return self.layout.pack([leaf.detach() for leaf in pytree.tree_leaves(value)])


def _problem(kind: Kind, fn: Callable[..., PyTree], args: tuple[Any, ...], layout: Layout) -> Problem:
    if kind in ("minimize", "least_squares"):
        fn = Gradient(kind, fn, layout, squares=kind == "least_squares")
    return Problem(kind, fn, args, layout)


def _median(x: Tensor) -> Tensor:
    """Over the last dim: the middle value, or the mean of the two."""
    ordered = x.sort(dim=-1).values
    last = x.shape[-1] - 1
    low, high = ordered[..., last // 2], ordered[..., (last + 1) // 2]
    return torch.where(low == high, low, 0.5 * (low + high))  # the mean of two infinities is none


@contextmanager
def _undisturbed(fn: Any, device: torch.device) -> Iterator[None]:
    """Put torch's random numbers and, of a module, the buffers back to what they were."""
    buffers = [(b, b.detach().clone()) for b in fn.buffers()] if isinstance(fn, nn.Module) else []
    kind = "cuda" if device.type in ("cpu", "meta") else device.type
    devices = [] if device.type in ("cpu", "meta") else [device]
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _wait_for(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
