"""`Reversible`: a solve of a fixed number of steps that can be run backwards, and so differentiated without a tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .._options import refuse_unknown
from .._purity import Purity
from .._solution import AdjointReport, Solution, Status
from .._system import transformed
from .._tape import Tape
from ..diagnostics import record

_OPTIONS = ("steps", "beta", "rtol", "init")
_ROUND_TRIP = 1e-6
"""Relative error of the start as it is recovered, above which the states are computed again and kept."""


class Reversible(nn.Module):
    """What `steps` reversible steps make of a cell, with the exact gradient of that, in memory that does not grow.

    Two states take turns (RevDEQ; McCallum, Arora & Foster 2025), from `y = z = z0`:

        y ← (1 − β) y + β f(z, x),   z ← (1 − β) z + β f(y, x)

    Each can be undone, so that the backward pass recovers every state from the last one. The gradient is that of these
    steps, not of the equilibrium: it is the same as backpropagation's, whether or not they have converged. For a
    κ-Lipschitz f with κ < 1 they do, by a factor of at least `|1 − β| + βκ`, where β < 2/(1 + κ).

    Undoing multiplies rounding by up to `(1 − β)⁻²` per step. So states are kept in float64 whatever the dtype of the
    cell; and the backward pass looks at how well it has come back to the start: if it is off by more than 1e-6 it
    computes the states again from there and keeps them, which costs memory but never exactness. `solution.adjoint`
    then has twice the steps.

    >>> import torch, torchimplicit as ti
    >>> W = torch.nn.Parameter(0.1 * torch.randn(4, 4))
    >>> layer = ti.nn.Reversible(lambda z, x: torch.tanh(z @ W + x), steps=8)
    >>> layer(torch.randn(2, 4)).sum().backward()
    >>> W.grad.shape
    torch.Size([4, 4])

    Args:
        cell: maps `(z, *inputs)` to the next z, tensors; it must draw nothing at random and change no buffers.
        steps: K; each evaluates the cell twice.
        beta: β, in (0, 2) and not 1, which could not be undone.
        rtol: relative residual below which a sample counts as converged; None is `ε^(2/3)` of the dtype.
        init: gives z0 from the inputs; None starts from zeros like the first input.

    Raises:
        TypeError: unknown option.
        ValueError: an option out of range, or a cell that is no function.
        RuntimeError: inside `torch.func` transforms or forward mode, for second derivatives, and where the cell's
            operations cannot be seen (a compiled cell).
    """

    def __init__(
        self,
        cell: Callable[..., Tensor],
        *,
        steps: int = 8,
        beta: float = 0.8,
        rtol: float | None = None,
        init: Callable[..., Tensor] | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown("Reversible", unknown, _OPTIONS)
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} is not valid; give an integer >= 1.")
        if not 0.0 < beta < 2.0 or beta == 1.0:
            raise ValueError(f"beta={beta!r} is not valid; give a number in (0, 2) other than 1.")
        if rtol is not None and not rtol >= 0.0:
            raise ValueError(f"rtol={rtol!r} is not valid; give a number >= 0 or None.")
        self.cell, self.init, self.steps, self.beta, self.rtol = cell, init, steps, beta, rtol

    def forward(self, *inputs: Tensor) -> Tensor:
        """The state z after K steps: `solve(*inputs).value`."""
        return self.solve(*inputs).value

    def solve(self, *inputs: Tensor) -> Solution:
        """The state after K steps with its evidence; samples are indexed by the first dim.

        `status` is CONVERGED or MAX_STEPS, or NONFINITE, by the residual `f(z) − z` of what is returned.
        """
        if transformed() or forward_ad._current_level >= 0:
            raise RuntimeError("Reversible: torch.func transforms and forward mode are not supported; use FixedPoint.")
        z0 = torch.zeros_like(inputs[0]) if self.init is None else self.init(*inputs)
        purity = Purity(z0.device, self.cell, inputs)
        with torch.enable_grad():
            leaf = z0.detach().requires_grad_()
            tape, _ = Tape.record(lambda z: purity.run(self.cell, z, *inputs), leaf.view_as(leaf), (), self.cell)
        if not purity.known:
            raise ValueError(
                "Reversible: the cell draws random numbers or changes buffers, and could not be run backwards; "
                "put it in eval mode, or use FixedPoint."
            )
        if tape.opaque:
            raise RuntimeError(
                "Reversible: some operations of the cell are out of sight (torch.compile, a custom autograd.Function); "
                "write it in plain operations."
            )
        report = AdjointReport()
        value, residual = _Steps.apply(tape, self.steps, self.beta, report, z0, *tape.inputs)  # pyright: ignore[reportGeneralTypeIssues]
        with torch.no_grad():
            size = value.flatten(1).norm(dim=1)
            error = residual.flatten(1).norm(dim=1)
            rtol = torch.finfo(value.dtype).eps ** (2 / 3) if self.rtol is None else self.rtol
            finite = error.isfinite() & size.isfinite()
            status = torch.where(error <= rtol * size, int(Status.CONVERGED), int(Status.MAX_STEPS))
            status = torch.where(finite, status, int(Status.NONFINITE))
        solution = Solution(
            value=value,
            status=status,
            converged=status == int(Status.CONVERGED),
            residual=torch.where(finite, error / max(value[0].numel(), 1) ** 0.5, torch.inf),
            steps=torch.full_like(status, self.steps),
            evaluations=2 * self.steps + 2,
            adjoint=report,
        )
        record(self, solution)
        return solution

    def extra_repr(self) -> str:
        """The options."""
        return f"steps={self.steps}, beta={self.beta}"


class _Steps(torch.autograd.Function):
    """The steps; saved are the last states, the start, and what the cell reads."""

    @staticmethod
    def forward(
        ctx: Any, tape: Tape, steps: int, beta: float, report: AdjointReport, z0: Tensor, *reads: Tensor
    ) -> Any:
        def f(z: Tensor) -> Tensor:
            return tape.replay(z.to(z0.dtype), reads).double()

        y = z = z0.double()
        for _ in range(steps):
            y = (1 - beta) * y + beta * f(z)
            z = (1 - beta) * z + beta * f(y)
        ctx.of = tape, steps, beta, report
        ctx.save_for_backward(y, z, z0, *reads)
        value = z.to(z0.dtype)
        residual = tape.replay(value, reads) - value
        ctx.mark_non_differentiable(residual)
        return value, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tape, steps, beta, report = ctx.of
        y, z, z0, *reads = ctx.saved_tensors
        start = z0.double()
        pull = _Pull(tape, z0.dtype, reads)
        grad = torch.zeros_like(start), grads[0].double()
        for _ in range(steps):
            z, grad = pull.undo(z, y, beta, grad[1], grad[0])
            y, grad = pull.undo(y, z, beta, grad[1], grad[0])
        size = start.abs().amax().clamp(min=1.0)
        error = torch.maximum((y - start).abs().amax(), (z - start).abs().amax()) / size
        report.steps = torch.tensor(steps)
        if not bool(error <= _ROUND_TRIP):
            pull = _Pull(tape, z0.dtype, reads)
            states, y, z = [], start, start
            with torch.no_grad():
                for _ in range(steps):
                    new = (1 - beta) * y + beta * pull.value(z)
                    states.append((z, new))
                    y, z = new, (1 - beta) * z + beta * pull.value(new)
            grad = torch.zeros_like(start), grads[0].double()
            for before, after in reversed(states):
                grad = pull.back(after, beta, grad[1], grad[0])
                grad = pull.back(before, beta, grad[1], grad[0])
            report.steps = torch.tensor(2 * steps)
        report.residual = error
        report.evaluations = pull.calls
        return None, None, None, None, (grad[0] + grad[1]).to(z0.dtype), *pull.total


class _Pull:
    """Products with the cell's derivatives; collects those for what it reads."""

    def __init__(self, tape: Tape, dtype: torch.dtype, reads: list[Tensor]) -> None:
        self.tape, self.dtype = tape, dtype
        self.reads = [t.detach().requires_grad_(t.requires_grad) for t in reads]
        self.wanted = [i for i, t in enumerate(self.reads) if t.requires_grad]
        self.total: list[Tensor | None] = [None] * len(reads)
        self.calls = 0

    def value(self, at: Tensor) -> Tensor:
        """`f(at)`."""
        return self.tape.replay(at.to(self.dtype), self.reads).double()

    def undo(
        self, new: Tensor, at: Tensor, beta: float, of_new: Tensor, of_at: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The state before `new = (1 − β)·old + β f(at)`, and the gradients `(of old, of at)`."""
        value, grads = self._pull(at, beta * of_new)
        return (new - beta * value) / (1 - beta), ((1 - beta) * of_new, of_at + grads)

    def back(self, at: Tensor, beta: float, of_new: Tensor, of_at: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients alone."""
        return (1 - beta) * of_new, of_at + self._pull(at, beta * of_new)[1]

    def _pull(self, at: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        with torch.enable_grad():
            leaf = at.to(self.dtype).requires_grad_()
            value = self.tape.replay(leaf, self.reads)
        inputs = [leaf, *(self.reads[i] for i in self.wanted)]
        found = torch.autograd.grad(value, inputs, grad.to(self.dtype), allow_unused=True)
        for i, g in zip(self.wanted, found[1:], strict=True):
            if g is not None:
                old = self.total[i]
                self.total[i] = g if old is None else old + g
        return value.detach().double(), torch.zeros_like(at) if found[0] is None else found[0].double()
