"""The derivative of a quadratic program's solution: the implicit function theorem for its KKT conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._solution import AdjointReport, Status
from ._qp_newton import misfit, refined
from ._qp_program import Program, mv, sizes


class Attach(torch.autograd.Function):
    """`(z, λ, ν)` with the derivatives that the KKT conditions give them; the programs have the batch in front.

    The conditions are `Qz + p + Gᵀλ + Aᵀν = 0`, `λ∘(Gz − h) = 0`, `Az − b = 0` (Amos & Kolter 2017, equation 6). With
    the slack `s = h − Gz` their adjoint system is

        Q u + Gᵀ(λ∘w) + Aᵀ y = g_z,   G u − s∘w = g_λ,   A u = g_ν.

    The rule consists of plain operations on the outputs and inputs, so that it has derivatives of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, found: tuple[Tensor, Tensor, Tensor], dead: Tensor, report: AdjointReport, *data: Tensor
    ) -> Any:
        out = tuple(t.clone() for t in found)
        ctx.dead, ctx.report = dead, report
        ctx.save_for_backward(*out, *data)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z, lam, nu, Q, p, G, h, A, b = ctx.saved_tensors
        slack = (h - mv(G, z)).clamp(min=0.0)
        of = Program(Q, p, G, h, A, b, sizes(*(t.detach() for t in (Q, G, A))))
        u, lam_w, y = _adjoint(of, lam, slack, grads, ctx.dead, ctx.report)
        return (
            None,
            None,
            None,
            -0.5 * (_outer(u, z) + _outer(z, u)),
            -u,
            -_outer(lam, u) - _outer(lam_w, z),
            lam_w,
            -_outer(nu, u) - _outer(y, z),
            y,
        )


def _outer(one: Tensor, other: Tensor) -> Tensor:
    return one.unsqueeze(-1) * other.unsqueeze(-2)


def _adjoint(
    of: Program, lam: Tensor, slack: Tensor, grads: Sequence[Tensor], dead: Tensor, report: AdjointReport
) -> tuple[Tensor, Tensor, Tensor]:
    """`(u, λ∘w, y)` of the adjoint system; zero for samples without a solution, or where the system has none.

    With `λ∘w` for w it is that of a step of Newton's method, as Q is symmetric. It is solved condensed, and whole for
    the samples that this is not good enough for.
    """
    if bool(dead.any()):
        of, slack = _without(of, dead), torch.where(dead[:, None], 1.0, slack)
        lam, *grads = (torch.where(dead[:, None], 0.0, t) for t in (lam, *grads))
    right = (grads[0], lam * grads[1], grads[2])
    found = refined(of, slack, lam, right)
    with torch.no_grad():
        scale = torch.maximum(lam, slack)
        scale = torch.where(scale > 0, scale, 1.0)
        relative = _relative(misfit(of, slack, lam, found, right), right, scale)
        weak = (~(relative <= torch.finfo(lam.dtype).eps ** 0.75)).nonzero()[:, 0]
    bad = torch.zeros_like(dead)
    u, lam_w, y = found
    if weak.numel():
        some = [t.index_select(0, weak) for t in (lam, slack, *grads)]
        whole, bad_ones, rest = _whole(of.select(weak), *some)
        u, lam_w, y = (t.index_copy(0, weak, one) for t, one in zip(found, whole, strict=True))
        bad, relative = bad.index_copy(0, weak, bad_ones), relative.index_copy(0, weak, rest)
    report.status = torch.where(bad, int(Status.SINGULAR), int(Status.CONVERGED))
    report.residual = torch.where(relative.isfinite(), relative, torch.inf)
    report.steps = torch.ones_like(report.status)
    report.evaluations = 1
    return u, lam_w, y


def _without(of: Program, dead: Tensor) -> Program:
    """The programs, those without a solution replaced by one that has: they may hold NaN, and zero times it is NaN."""
    matrix = dead[:, None, None]
    Q = torch.where(matrix, torch.eye(of.Q.shape[1], dtype=of.Q.dtype, device=of.Q.device), of.Q)
    G, A = (torch.where(matrix, 0.0, t) for t in (of.G, of.A))
    p, h, b = (torch.where(dead[:, None], 0.0, t) for t in (of.p, of.h, of.b))
    return Program(Q, p, G, h, A, b, sizes(*(t.detach() for t in (Q, G, A))))


def _relative(rest: tuple[Tensor, ...], right: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    one, other = (torch.cat([t[0], t[1] / scale, t[2]], dim=1).norm(dim=1) for t in (rest, right))
    return one / torch.where(other > 0, other, 1.0)


def _whole(of: Program, lam: Tensor, slack: Tensor, *grads: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The same by LU; also which samples have a singular system and were given zeros, and the relative residuals.

    The columns for w are divided by `max(λ, s)`: what is left is `[G_i; 0]` for an active constraint, the unit vector
    for an inactive one, and no number that a multiplier or slack near zero could spoil.
    """
    scale = torch.maximum(lam, slack).detach()
    scale = torch.where(scale > 0, scale, 1.0)
    n, m, k = of.Q.shape[-1], of.G.shape[-2], of.A.shape[-2]
    top = torch.cat([of.Q, of.G.mT * (lam / scale).unsqueeze(-2), of.A.mT], dim=-1)
    middle = torch.cat([of.G, torch.diag_embed(-slack / scale), of.G.new_zeros(*of.G.shape[:-1], k)], dim=-1)
    bottom = torch.cat([of.A, of.A.new_zeros(*of.A.shape[:-1], m + k)], dim=-1)
    matrix, v = torch.cat([top, middle, bottom], dim=-2), torch.cat(grads, dim=-1)
    with torch.no_grad():
        trial, info = torch.linalg.solve_ex(matrix, v)
        rest, size = (v - mv(matrix, trial)).norm(dim=1), v.norm(dim=1)
        relative = rest / torch.where(size > 0, size, 1.0)
        # A matrix that is singular but for rounding still has a solution, of a size that shows it.
        grown = trial.norm(dim=1) * matrix.abs().sum(2).amax(1) > size * torch.finfo(v.dtype).eps ** -0.75
        bad = (info != 0) | ~relative.isfinite() | (relative > torch.finfo(v.dtype).eps ** 0.5) | grown
    identity = torch.eye(n + m + k, dtype=v.dtype, device=v.device)
    matrix = torch.where(bad[:, None, None], identity, matrix)
    solved = torch.linalg.solve(matrix, torch.where(bad[:, None], 0.0, v))
    u, w, y = solved.split([n, m, k], dim=-1)
    return (u, lam * w / scale, y), bad, relative
