"""`compare_solvers`: every applicable solver on one problem of the caller's, under the same tolerance."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from math import isfinite
from typing import Any, Never, get_args

import torch

from .._options import nearest, refuse_unknown
from .._problem import Kind
from .._solution import PyTree
from ._candidates import DENSE_BYTES, Solvers, applicable, by_label, labelled
from ._case import Case
from ._comparison import Comparison, SolverResult
from ._table import duration, failures

_OPTIONS = ("kind", "batch_dims", "solvers", "rtol", "atol", "max_steps", "repeats", "verbose")


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
    gradients and from the same state of torch's random numbers (the CPU's and those of z0's device), which are left
    as they were; so are the buffers of fn, if it is a module. Its residual is then evaluated anew at the value it
    returned. The trace takes one number per step and sample. A solver that raises becomes a row with its error.

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
    case = Case.of(kind, fn, z0, args, batch_dims, max_steps)
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
        dtype=reduce(torch.promote_types, case.layout.dtypes),
        device=case.layout.device,
        repeats=repeats,
        rows=tuple(results),
        skipped=skipped,
        skipped_because=f"their Jacobians would take {size / 2**30:.1f} GiB, more than {DENSE_BYTES // 2**30} GiB",
    )
    first, *others = comparison.ranked()
    return replace(comparison, rows=(first, *(case.beside(first, other) for other in others)))


def _line(row: SolverResult, samples: int) -> str:
    """A row in a line."""
    if row.error is not None:
        return f"{row.name}: {row.error}"
    ended = failures(row)
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
