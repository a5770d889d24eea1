"""`QP`: the minimiser of a convex quadratic program as a layer, batched, with the gradient of its KKT conditions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Never

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._options import refuse_unknown
from .._report import OnFailure, check_on_failure, report_failures
from .._solution import AdjointReport, Status
from .._system import transformed
from ..diagnostics import record
from ._interior_point import solve
from ._qp_gradient import Attach
from ._qp_program import Program, largest, sizes

_OPTIONS = ("rtol", "max_steps", "on_failure")
_DATA = {"Q": 2, "p": 1, "G": 2, "h": 1, "A": 2, "b": 1}


@dataclass(frozen=True, eq=False)
class QPSolution:
    """The result of a `QP`; fields have the batch shape in front.

    Attributes:
        value: `z`, `(..., n)`, differentiable; finite.
        inequality_multipliers: `λ ≥ 0`, `(..., m)`, differentiable.
        equality_multipliers: `ν`, `(..., k)`, differentiable.
        status: int tensor, members of `Status`; DIVERGED where the program is infeasible, unbounded or not convex.
        converged: bool tensor.
        residual: the largest of the relative residuals of primal feasibility, dual feasibility and gap, of the value
            that is returned.
        steps: interior-point steps.
        infeasible: there is no z that satisfies the constraints; multipliers were found that prove it.
        unbounded: the objective has no minimum; a direction was found along which it falls for ever.
        nonconvex: Q has a negative eigenvalue.
        degenerate: a constraint is active and its multiplier zero: z has a kink there and no derivative; the gradient
            that is given lies between those of the two sides.
        evaluations: linear systems that the steps solved, for the whole batch.
        adjoint: a report that the backward pass fills.
    """

    value: Tensor
    inequality_multipliers: Tensor
    equality_multipliers: Tensor
    status: Tensor
    converged: Tensor
    residual: Tensor
    steps: Tensor
    infeasible: Tensor
    unbounded: Tensor
    nonconvex: Tensor
    degenerate: Tensor
    evaluations: int
    adjoint: AdjointReport = field(default_factory=AdjointReport)


class QP(nn.Module):
    """The layer `z = argmin ½zᵀQz + pᵀz` subject to `Gz ≤ h` and `Az = b`.

    >>> import torch, torchimplicit as ti
    >>> p = torch.tensor([[-3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    >>> identity = torch.eye(2, dtype=torch.float64)
    >>> z = ti.nn.QP()(identity, p, identity, torch.ones(2, dtype=torch.float64))  # z ≤ 1
    >>> z.sum().backward()
    >>> [round(v, 6) for v in z.detach().flatten().tolist()]
    [1.0, -1.0]
    >>> [round(v, 6) + 0.0 for v in p.grad.flatten().tolist()]  # the first one is held by its bound
    [0.0, -1.0]

    Everything may have batch dims in front, which are broadcast: `Q` `(..., n, n)`, `p` `(..., n)`, `G` `(..., m, n)`,
    `h` `(..., m)`, `A` `(..., k, n)`, `b` `(..., k)`; all float32 or all float64. Of Q only the symmetric part counts,
    which must be positive semidefinite. Rows of A must be independent for multipliers to be unique, and so for their
    gradients.

    Solved by a primal-dual interior-point method in float arithmetic of the data's dtype; differentiated through the
    KKT conditions (OptNet; Amos & Kolter 2017), in everything, and as often as one likes; forward mode and `vmap` are
    refused. A sample that is infeasible, unbounded, not convex or not finite is flagged, has an exactly zero gradient
    and leaves the others as they are. So has one whose KKT system has no solution, as where a linear program has
    several; `solution.adjoint.status` then says SINGULAR. Active constraints that depend on each other share their
    gradient.

    Args:
        rtol: for the relative residuals; None is `ε^(2/3)` of the dtype.
        max_steps: interior-point steps at most.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.

    Raises:
        TypeError: unknown option; data not float32 or float64, or of different dtypes.
        ValueError: shapes do not fit; one of G and h, or of A and b, is missing.
    """

    def __init__(
        self, *, rtol: float | None = None, max_steps: int = 60, on_failure: OnFailure = "warn", **unknown: Never
    ) -> None:
        refuse_unknown("QP", unknown, _OPTIONS)
        super().__init__()
        if rtol is not None and not 0.0 < rtol < 1.0:
            raise ValueError(f"rtol={rtol!r} is not valid; give a number in (0, 1) or None.")
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps={max_steps!r} is not valid; give an integer >= 1.")
        check_on_failure(on_failure)
        self.rtol, self.max_steps = rtol, max_steps
        self.on_failure: OnFailure = on_failure

    def forward(
        self,
        Q: Tensor,
        p: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
    ) -> Tensor:
        """The minimiser, `(..., n)`: `solve(...).value`."""
        return self.solve(Q, p, G, h, A, b).value

    def solve(
        self,
        Q: Tensor,
        p: Tensor,
        G: Tensor | None = None,
        h: Tensor | None = None,
        A: Tensor | None = None,
        b: Tensor | None = None,
    ) -> QPSolution:
        """The minimiser, its multipliers and its evidence."""
        if transformed() or forward_ad._current_level >= 0:
            raise RuntimeError(
                "QP: torch.func transforms and forward mode are not supported; use autograd, which has gradients "
                "of any order, and batch dims in the place of vmap."
            )
        data, batch = _together(Q, p, G, h, A, b)
        with torch.no_grad(), torch.autocast(p.device.type, enabled=False):
            program, finite, nonconvex = _usable([t.detach() for t in data])
            rtol = torch.finfo(p.dtype).eps ** (2 / 3) if self.rtol is None else self.rtol
            ends = solve(program, max(rtol, 4 * torch.finfo(p.dtype).eps), self.max_steps)
            status = torch.where(finite, ends.status, int(Status.NONFINITE))
            status = torch.where(nonconvex, int(Status.DIVERGED), status)
            converged = status == int(Status.CONVERGED)
            point = ends.point
            found = tuple(torch.where(finite[:, None], t, 0.0) for t in (point.z, point.lam, point.nu))
            degenerate = converged & _degenerate(program, point.lam, point.s, rtol)
        report = AdjointReport()
        z, lam, nu = found
        if torch.is_grad_enabled() and any(t.requires_grad for t in data):
            with torch.autocast(p.device.type, enabled=False):
                z, lam, nu = Attach.apply(found, ~converged, report, *data)  # pyright: ignore[reportGeneralTypeIssues]
        usable = finite & ~nonconvex
        solution = QPSolution(
            value=z.reshape(*batch, z.shape[-1]),
            inequality_multipliers=lam.reshape(*batch, lam.shape[-1]),
            equality_multipliers=nu.reshape(*batch, nu.shape[-1]),
            status=status.reshape(batch),
            converged=converged.reshape(batch),
            residual=torch.where(usable, ends.residual, torch.inf).reshape(batch),
            steps=ends.steps.reshape(batch),
            infeasible=(ends.infeasible & usable).reshape(batch),
            unbounded=(ends.unbounded & usable).reshape(batch),
            nonconvex=nonconvex.reshape(batch),
            degenerate=degenerate.reshape(batch),
            evaluations=1 + 2 * (int(ends.steps.max()) if ends.steps.numel() else 0),
            adjoint=report,
        )
        record(self, solution)  # pyright: ignore[reportArgumentType] - it has what a Solution has
        if not bool(converged.all()):
            what = "QP (DIVERGED is infeasible, unbounded or not convex; see the solution's flags)"
            report_failures(what, status, self.on_failure, solution)  # pyright: ignore[reportArgumentType]
        return solution

    def extra_repr(self) -> str:
        """The options."""
        return f"rtol={self.rtol}, max_steps={self.max_steps}"


def _together(*given: Tensor | None) -> tuple[list[Tensor], torch.Size]:
    """Q, p, G, h, A, b, broadcast and with one batch dim, and the batch shape; Q made symmetric."""
    data = dict(zip(_DATA, given, strict=True))
    for one, other in (("G", "h"), ("A", "b")):
        if (data[one] is None) != (data[other] is None):
            raise ValueError(f"QP: {one} and {other} go together; give both or neither.")
    Q, p = data["Q"], data["p"]
    for name, dims in _DATA.items():
        t = data[name]
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype not in (torch.float32, torch.float64):
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"QP: {name} must be a float32 or float64 tensor, but is {kind}.")
        if isinstance(p, Tensor) and t.dtype != p.dtype:
            raise TypeError(f"QP: {name} is {t.dtype} but p is {p.dtype}; give all of one dtype.")
        if t.ndim < dims:
            raise ValueError(f"QP: {name} must have at least {dims} dim(s), but is {tuple(t.shape)}.")
    assert Q is not None
    assert p is not None
    n = p.shape[-1]
    empty = p.new_zeros(0, n), p.new_zeros(0)
    G, h = (data["G"], data["h"]) if data["G"] is not None and data["h"] is not None else empty
    A, b = (data["A"], data["b"]) if data["A"] is not None and data["b"] is not None else empty
    for name, t, wanted in (
        ("Q", Q, (n, n)),
        ("G", G, (h.shape[-1], n)),
        ("A", A, (b.shape[-1], n)),
    ):
        if tuple(t.shape[-2:]) != wanted:
            raise ValueError(f"QP: {name} must be (..., {wanted[0]}, {wanted[1]}), but is {tuple(t.shape)}.")
    every = {"Q": 0.5 * (Q + Q.mT), "p": p, "G": G, "h": h, "A": A, "b": b}
    try:
        batch = torch.broadcast_shapes(*(t.shape[: t.ndim - _DATA[name]] for name, t in every.items()))
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in every.items())
        raise ValueError(f"QP: the batch dims do not fit together: {shapes}.") from error
    return [
        t.expand(*batch, *t.shape[t.ndim - _DATA[name] :]).reshape(batch.numel(), *t.shape[t.ndim - _DATA[name] :])
        for name, t in every.items()
    ], batch


def _usable(data: list[Tensor]) -> tuple[Program, Tensor, Tensor]:
    """The programs, those that cannot be solved replaced by an easy one; which are finite, and which not convex."""
    Q, p, G, h, A, b = data
    entries = sizes(Q, G, A)
    finite = torch.cat([entries, p, h, b], dim=1).isfinite().all(1)
    eps, n = torch.finfo(Q.dtype).eps, Q.shape[1]
    shift = 16 * n * eps * entries[:, 0] + torch.finfo(Q.dtype).tiny
    shifted = Q.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(shift[:, None])
    nonconvex = finite & (torch.linalg.cholesky_ex(shifted)[1] != 0)
    easy = finite & ~nonconvex
    if not bool(easy.all()):
        Q = torch.where(easy[:, None, None], Q, torch.eye(n, dtype=Q.dtype, device=Q.device))
        p, G, A, b = (torch.where(easy.reshape(-1, *[1] * (t.ndim - 1)), t, 0.0) for t in (p, G, A, b))
        h = torch.where(easy[:, None], h, 1.0)
        entries = sizes(Q, G, A)
    return Program(Q, p, G, h, A, b, entries), finite, nonconvex


def _degenerate(program: Program, lam: Tensor, slack: Tensor, rtol: float) -> Tensor:
    """Whether some constraint has neither a multiplier nor a slack to speak of, `(B,)` bool."""
    if not lam.shape[1]:
        return torch.zeros(len(lam), dtype=torch.bool, device=lam.device)
    loose = slack / torch.maximum(largest(slack), largest(program.h))[:, None]
    held = lam / torch.maximum(largest(lam), largest(program.p) / program.sizes[:, 1])[:, None]
    return (torch.maximum(loose, held) < rtol**0.5).any(dim=1)
