"""`compare_solvers`: every applicable solver on one problem of the caller's, under the same tolerance."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from statistics import median
from typing import Any, Never, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._api import fixed_point, least_squares, minimize, root
from .._layout import Layout
from .._norms import norm_function, two
from .._objective import Gradient
from .._options import nearest, refuse_unknown
from .._problem import Evaluation, Kind, Problem
from .._progress import Progress
from .._solution import PyTree, Solution, Status
from .._stages import solve
from .._tolerance import Tolerance
from ..solvers import Method
from ._candidates import DENSE_BYTES, Solvers, applicable, by_label, labelled
from ._comparison import Comparison, SolverResult, Trace
from ._table import duration, failures

_OPTIONS = ("kind", "batch_dims", "solvers", "rtol", "atol", "max_steps", "repeats", "verbose")
_CALLS: dict[str, Callable[..., Solution]] = {
    "fixed_point": fixed_point,
    "root": root,
    "minimize": minimize,
    "least_squares": least_squares,
}
_REFUTED = 10.0
"""Times the solver's own residual that one evaluated anew may be, if it is not within the tolerance."""
_ROUNDING = 64.0
"""Rounding units of the initial residual below which a residual is not looked at."""
_ELSEWHERE = 1e-2
"""Relative distance from which on two solutions are different ones."""


def compare_solvers(
    fn: Callable[..., PyTree],
    z0: PyTree,
    *args: Any,
    kind: Kind = "fixed_point",
    batch_dims: int = 0,
    solvers: Solvers | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
    repeats: int = 3,
    verbose: bool = False,
    **unknown: Never,
) -> Comparison:
    """Run every applicable solver on a problem, and report what each of them found and what that took.

    >>> import torch, torchimplicit as ti
    >>> W = 0.9 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    >>> x = torch.randn(32, 8, dtype=torch.float64)
    >>> comparison = ti.compare_solvers(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), x, batch_dims=1)
    >>> print(comparison)  # doctest: +ELLIPSIS
    fixed_point: 32 samples of 8 unknowns, float64, cpu; time: median of 3 runs after a warm-up
    solver ... solved ...
    >>> comparison["Newton()"].converged, comparison["Newton()"].worst_residual < 1e-9
    (1.0, True)
    >>> comparison.best() is comparison.rows[0]  # the fewest evaluations; best("seconds") is the fastest
    True

    `print(comparison)` shows a table, `comparison.plot("decay.png")` draws the residuals against the evaluations.

    Each solver runs once to warm up, which also gives the trace, and `repeats` times for its wall time, without
    gradients and in the same state of torch's random numbers, which are left as they were; so are the buffers of fn, if
    it is a module. Its residual is then evaluated anew at the value it returned. The trace of a run takes one number
    per step and sample. A solver that raises becomes a row with its error.

    `solvers=None` means, for a fixed point or a root, `Auto`, `Picard`, `Anderson`, `Broyden` (both updates), `Chord`,
    `Newton`, `NewtonKrylov`, `Dogleg` and `LevenbergMarquardt`; for `minimize` `Auto`, `LBFGS` and `NewtonCG`; for
    `least_squares` these and `LevenbergMarquardt` (dense and by conjugate gradients) and `Dogleg`. Those that need
    dense Jacobians are skipped, and the table says so, where those of the batch would take more than 1 GiB.

    Args:
        fn: the function, as the call named by `kind` takes it.
        z0: the start, a tensor or a pytree of them.
        args: handed to fn.
        kind: `"fixed_point"`, `"root"`, `"minimize"` or `"least_squares"`.
        batch_dims: the first `batch_dims` dims of every leaf of `z0` index independent problems, as in these calls.
        solvers: a list of solvers, a dict of them by label, or None.
        rtol: relative tolerance of all of them; None leaves each its own.
        atol: absolute tolerance of all of them, in the units of the residual; None leaves each its own.
        max_steps: steps at most; None is each solver's own default.
        repeats: timed runs of each.
        verbose: print a line for each solver that is done, to standard error.

    Returns:
        A `Comparison`, with one row per solver.

    Raises:
        TypeError: unknown option; something among `solvers` is none; or what the call itself raises of fn and `z0`.
        ValueError: an option out of range, no samples; or what the call itself raises.
    """
    refuse_unknown("compare_solvers", unknown, _OPTIONS)
    _check(fn, kind, rtol, atol, max_steps, repeats)
    case = _Case.of(kind, fn, z0, args, batch_dims, max_steps)
    batch, n = case.layout.matrix_shape
    skipped, size = (), 0
    if solvers is None:
        rows = case.first.target.shape[1]
        found, skipped, size = applicable(kind, batch, rows, n, case.layout.dtype)
        named = by_label(found)
    else:
        named = labelled(solvers)
    given = {name: value for name, value in (("rtol", rtol), ("atol", atol)) if value is not None}
    results = []
    for name, solver in named.items():
        result = case.judge(name, replace(solver, **given), repeats)
        results.append(result)
        if verbose:
            print(f"compare_solvers: {_line(result, batch)}", file=sys.stderr)
    comparison = Comparison(
        kind=kind,
        samples=batch,
        unknowns=n,
        dtype=case.layout.dtype,
        device=case.layout.device,
        repeats=repeats,
        rows=tuple(results),
        skipped=skipped,
        skipped_because=f"their Jacobians would take {size / 2**30:.1f} GiB, more than {DENSE_BYTES // 2**30} GiB",
    )
    first, *others = comparison.sorted()
    return replace(comparison, rows=(first, *(case.beside(first, other) for other in others)))


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
class _Case:
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
    ) -> "_Case":
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
            return self._row(name, solver, runs[0][0], trace, median(seconds for _, seconds in runs))
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
            limit = torch.as_tensor(tolerance.limit(found), dtype=residual.dtype, device=residual.device)
        residual = torch.where(residual.isfinite(), residual, torch.inf)
        status, told = solution.status.reshape(-1), solution.residual.reshape(-1)
        claimed = status == int(Status.CONVERGED)
        rounding = _ROUNDING * problem.epsilon * torch.where(first.isfinite(), first, 0.0)
        agrees = residual <= torch.maximum(limit, torch.maximum(_REFUTED * told, rounding))
        counts = torch.bincount(status.long().cpu(), minlength=len(Status)).tolist()
        solved = int((claimed & agrees).sum())
        steps = solution.steps.reshape(-1)
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
            tolerance=float(_median(limit.expand_as(residual))),
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


def _line(row: SolverResult, samples: int) -> str:
    """A row in a line."""
    ended = failures(row)
    if row.error is not None:
        return f"{row.name}: {ended}"
    told = f"{row.name}: {row.solved}/{samples} solved, {row.evaluations} evaluations, {duration(row.seconds)}"
    return f"{told} ({ended})" if ended else told


def _check(fn: Any, kind: Any, rtol: Any, atol: Any, max_steps: Any, repeats: Any) -> None:
    if not callable(fn):
        raise TypeError(f"compare_solvers: fn must be callable, but is {type(fn).__name__}.")
    if kind not in get_args(Kind):
        raise ValueError(f"compare_solvers: kind={kind!r} is not known; {nearest(str(kind), get_args(Kind))}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        ok = value is None or (isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value))
        if not ok or (value is not None and value < 0):
            raise ValueError(f"compare_solvers: {name}={value!r} is not valid; give a finite number >= 0 or None.")
    for name, value, least in (("max_steps", max_steps, 0), ("repeats", repeats, 1)):
        if value is None and name == "max_steps":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"compare_solvers: {name}={value!r} is not valid; give an integer >= {least}.")
