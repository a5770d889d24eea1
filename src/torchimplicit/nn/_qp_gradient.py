"""The derivative of a quadratic program's solution: the implicit function theorem for its KKT conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._solution import AdjointReport, Status
from ._qp_program import mv


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
        z, lam, nu, Q, _, G, h, A, _ = ctx.saved_tensors
        slack = (h - mv(G, z)).clamp(min=0.0)
        u, w, y = _adjoint(Q, G, A, lam, slack, grads, ctx.dead, ctx.report)
        lam_w = lam * w
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
    Q: Tensor,
    G: Tensor,
    A: Tensor,
    lam: Tensor,
    slack: Tensor,
    grads: tuple[Tensor, ...],
    dead: Tensor,
    report: AdjointReport,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(u, w, y)` of the adjoint system; zero for samples without a solution, or where the system is singular.

    Its columns for w are divided by `max(λ, s)`: what is left is `[G_i; 0]` for an active constraint, the unit vector
    for an inactive one, and no number that a multiplier or slack near zero could spoil.
    """
    scale = torch.maximum(lam, slack).detach()
    scale = torch.where(scale > 0, scale, 1.0)
    n, m, k = Q.shape[-1], G.shape[-2], A.shape[-2]
    top = torch.cat([Q, G.mT * (lam / scale).unsqueeze(-2), A.mT], dim=-1)
    middle = torch.cat([G, torch.diag_embed(-slack / scale), G.new_zeros(*G.shape[:-1], k)], dim=-1)
    bottom = torch.cat([A, A.new_zeros(*A.shape[:-1], m + k)], dim=-1)
    identity = torch.eye(n + m + k, dtype=Q.dtype, device=Q.device)
    v = torch.where(dead[:, None], 0.0, torch.cat(grads, dim=-1))
    matrix = torch.where(dead[:, None, None], identity, torch.cat([top, middle, bottom], dim=-2))
    with torch.no_grad():
        trial, info = torch.linalg.solve_ex(matrix, v)
        rest, size = (v - mv(matrix, trial)).norm(dim=1), v.norm(dim=1)
        relative = rest / torch.where(size > 0, size, 1.0)
        # A matrix that is singular but for rounding still has a solution, of a size that shows it.
        grown = trial.norm(dim=1) * matrix.abs().sum(2).amax(1) > size * torch.finfo(v.dtype).eps ** -0.75
        bad = (info != 0) | ~relative.isfinite() | (relative > torch.finfo(v.dtype).eps ** 0.5) | grown
    report.status = torch.where(bad, int(Status.SINGULAR), int(Status.CONVERGED))
    report.residual = torch.where(relative.isfinite(), relative, torch.inf)
    report.steps = torch.ones_like(report.status)
    report.evaluations = 1
    if bool(bad.any()):
        matrix = torch.where(bad[:, None, None], identity, matrix)
        v = torch.where(bad[:, None], 0.0, v)
    if torch.is_grad_enabled() or bool(bad.any()):
        trial = torch.linalg.solve(matrix, v)
    u, w, y = trial.split([n, m, k], dim=-1)
    return u, w / scale, y
