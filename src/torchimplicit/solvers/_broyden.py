"""Broyden's methods, good and bad, with a limited memory that is an inverse at every step."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._norms import two
from .._problem import Evaluation, Problem
from ..linear import Inverse, LowRank
from ._base import Solver, Step, hold

_LARGEST, _SMALLEST = 1e3, 1e-3


@dataclass
class _Memory:
    """The last secant pairs of each sample, the oldest first; unused rows are zero.

    Attributes:
        pairs: rows `[s | y]`, scaled, `(B, m, 2n)`.
        gram: products of the rows' `s` (good) or `y` (bad) with each other, `(B, m, m)`.
        cross: `sᵢᵀ yⱼ`, `(B, m, m)`; the good update needs it.
        scale: σ of the first approximation `H₀ = σ I`, `(B,)`.
        norm: of the residual, `(B,)`.
        filled: whether a sample has any pairs, `(B,)`.
    """

    pairs: Tensor
    gram: Tensor
    cross: Tensor
    scale: Tensor
    norm: Tensor
    filled: Tensor
    fixed: bool = field(default=True)


@dataclass(frozen=True)
class Broyden(Solver[_Memory]):
    """Quasi-Newton steps `z ← z + H r`, `H ≈ A⁻¹` from the last secant pairs `s = Δz`, `y = −Δr` (Broyden 1965).

    `update="good"` changes the approximation of A least, `"bad"` that of its inverse:

        good  H₊ = H + (s − H y) sᵀH / sᵀH y        bad  H₊ = H + (s − H y) yᵀ / yᵀy

    1. H is never stored, nor the updates: it is what the last `history` pairs make of `H₀ = σ I`, in the compact form
       of Byrd, Nocedal & Schnabel (1994, theorem 6.1). Forgetting the oldest pair leaves the H of the others, which
       fulfils the newest secant equation; dropping the oldest of a chain of rank-one updates would not.
    2. σ is 1 for a fixed point, whose A is I − J. For a root it starts from the sizes of z and fn and becomes
       `sᵀy / yᵀy` of the last pair (Barzilai & Borwein 1988).
    3. Safeguard, sample by sample: a step that more than doubles the residual, or meets a non-finite value, is taken
       back and the pairs are dropped; for a root the next step is four times shorter.

    Args:
        history: pairs kept.
        update: `"bad"`, which fixed points prefer: with a limited memory the good one takes 8 to 17 times as many steps
            on maps that contract slowly (docs/solvers.md); or `"good"`, which solves one more of the classical roots.
    """

    history: int = 10
    update: Literal["good", "bad"] = "bad"

    max_steps: ClassVar[int] = 500
    patience: ClassVar[int] = 100

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_count("history", 1)
        self._require_choice("update", ("good", "bad"))

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Memory:
        """No pairs; `H = σ I`."""
        batch, n = z.shape
        m = min(self.history, max(n, 1))
        norm = two(evaluation.residual)
        fixed = problem.kind == "fixed_point"
        scale = torch.ones_like(norm)
        if not fixed:
            # A first step of half the size of z, at most that of the plain one (as SciPy's).
            size = 0.5 * two(z).clamp_min(1.0)
            scale = (size / norm.clamp_min(torch.finfo(z.dtype).tiny)).clamp_max(1.0)
        return _Memory(
            pairs=z.new_zeros(batch, m, 2 * n),
            gram=z.new_zeros(batch, m, m),
            cross=z.new_zeros(batch, m, m),
            scale=scale,
            norm=norm,
            filled=torch.zeros_like(norm, dtype=torch.bool),
            fixed=fixed,
        )

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Memory, active: Tensor | None
    ) -> Step[_Memory]:
        """One quasi-Newton step; see the class."""
        residual = evaluation.residual
        moved = z + self._direction(state, residual)
        new = hold(active, moved, z)
        found = problem.evaluate(new)
        norm = two(found.residual)
        # Also true of NaN, in the residual or in the direction.
        refused = (norm <= 2.0 * state.norm).logical_not_()
        if bool(refused.any()):
            refused &= state.filled if state.fixed else torch.ones_like(refused)
            keep = ~refused
            new = hold(keep, new, z)
            found = found.where(keep, evaluation)
            norm = torch.where(keep, norm, state.norm)
            state.pairs = torch.where(keep[:, None, None], state.pairs, 0.0)
            state.gram = torch.where(keep[:, None, None], state.gram, 0.0)
            state.cross = torch.where(keep[:, None, None], state.cross, 0.0)
            state.filled = state.filled & keep
            if not state.fixed:
                state.scale = torch.where(keep, state.scale, 0.25 * state.scale)
        self._remember(state, new - z, residual - found.residual)
        state.norm = norm
        return Step(new, found, state)

    def inverse(self, state: _Memory) -> Inverse:
        """H in the compact form: `σ I` and one product of two low-rank factors."""
        n = state.pairs.shape[2] // 2
        s, y, sigma = state.pairs[:, :, :n], state.pairs[:, :, n:], state.scale[:, None, None]
        used = state.gram.diagonal(dim1=1, dim2=2) != 0
        if self.update == "good":
            small, right = sigma * state.cross - state.gram.tril(-1), sigma * s
        else:
            small, right = state.gram.triu(), y
        small = small + torch.diag_embed((~used).to(small.dtype))
        right, _ = torch.linalg.solve_ex(small, right * used[:, :, None])
        right = torch.where(right.isfinite().flatten(1).all(dim=1)[:, None, None], right, 0.0)
        return LowRank(state.scale, s - sigma * y, right.contiguous())

    def _direction(self, state: _Memory, residual: Tensor) -> Tensor:
        """`H r`."""
        n, sigma = residual.shape[1], state.scale[:, None]
        s, y = state.pairs[:, :, :n], state.pairs[:, :, n:]
        plain = sigma * residual
        if self.update == "good":
            # H = σ + (S − σ Y) (σ SᵀY − strictly lower part of SᵀS)⁻¹ σ Sᵀ
            right = torch.linalg.vecdot(s, plain[:, None])
            small = sigma[:, :, None] * state.cross - state.gram.tril(-1)
        else:
            # H = σ + (S − σ Y) (upper part of YᵀY)⁻¹ Yᵀ
            right = torch.linalg.vecdot(y, residual[:, None])
            small = state.gram.triu()
        # Unused rows: ones on the diagonal make their coefficients zero.
        small = small + torch.diag_embed((state.gram.diagonal(dim1=1, dim2=2) == 0).to(small.dtype))
        gamma, _ = torch.linalg.solve_ex(small, right)
        gamma = torch.where(gamma.isfinite().all(dim=1, keepdim=True), gamma, 0.0)
        both = torch.bmm(gamma.contiguous()[:, None], state.pairs)[:, 0]
        return plain + both[:, :n] - sigma * both[:, n:]

    def _remember(self, state: _Memory, s: Tensor, y: Tensor) -> None:
        """Append a pair, and forget the oldest where all rows are used; a sample at rest keeps what it has."""
        n = s.shape[1]
        length = two(s if self.update == "good" else y)
        change = two(y)
        fresh = (length > 0) & (change > 0)
        pair = torch.cat((s, y), dim=1) / torch.where(fresh, length, 1.0)[:, None]
        pairs = torch.cat((state.pairs[:, 1:], pair[:, None]), dim=1)
        s_all, y_all, s_new, y_new = pairs[:, :, :n], pairs[:, :, n:], pair[:, None, :n], pair[:, None, n:]
        gram, cross = state.gram.roll((-1, -1), (1, 2)), state.cross
        kept, new = (s_all, s_new) if self.update == "good" else (y_all, y_new)
        products = torch.linalg.vecdot(kept, new)
        gram[:, -1, :] = products
        gram[:, :, -1] = products
        if self.update == "good":
            cross = cross.roll((-1, -1), (1, 2))
            cross[:, :, -1] = torch.linalg.vecdot(s_all, y_new)
            cross[:, -1, :] = torch.linalg.vecdot(s_new, y_all)
        chosen = fresh[:, None, None]
        state.pairs = torch.where(chosen, pairs, state.pairs)
        state.gram = torch.where(chosen, gram, state.gram)
        state.cross = torch.where(chosen, cross, state.cross)
        state.filled = state.filled | fresh
        if not state.fixed:
            inner = torch.linalg.vecdot(s, y)
            sigma = inner / torch.where(fresh, change, 1.0).square()
            size = sigma.abs()
            usable = fresh & (size > _SMALLEST * state.scale.abs()) & (size < _LARGEST * state.scale.abs())
            state.scale = torch.where(usable, sigma, state.scale)
