"""Broyden's methods, good and bad, with a limited memory that is an inverse at every step."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from ..linear import Inverse
from ._base import Solver, Step, hold
from ._broyden_memory import Bad, Good, Memory

_LARGEST, _SMALLEST = 1e3, 1e-3
"""Factors between which a new σ of a root must lie, beside the old one, to be believed."""
_ROUNDS = 2
"""How often all pairs are replaced before a root's σ is renewed."""


@dataclass(frozen=True, eq=False, repr=False)
class Broyden(Solver[Memory]):
    """Quasi-Newton steps `z ← z + H r`, `H ≈ A⁻¹` from the last secant pairs `s = Δz`, `y = −Δr` (Broyden 1965).

    `update="good"` changes the approximation of A least, `"bad"` that of its inverse:

        good  H₊ = H + (s − H y) sᵀH / sᵀH y        bad  H₊ = H + (s − H y) yᵀ / yᵀy

    1. H is never stored, nor the chain of its updates (Kelley 2003, chapter 4), of which no link can be taken out
       afterwards: made without its oldest, or begun anew when full, it took a tenth to a quarter more steps on maps
       that contract slowly. H is what the last `history` pairs make of `H₀ = σ I`, in the compact form of Byrd, Nocedal
       & Schnabel (1994, theorem 6.1). With the pairs as the rows of S and Y, and `W = S − σ Y`,

           good  H = σ I + Wᵀ N⁻¹ σ S,  N = σ S Yᵀ − L, L = S Sᵀ below the diagonal, else 0
           bad   H = σ I + Wᵀ N⁻¹ Y,    N = Y Yᵀ on and above the diagonal, else 0

       which fulfils the newest secant equation `H y = s` whatever pairs were forgotten before.
    2. The bad N is triangular. N⁻¹ without its first row and column is the inverse of N without them; so it is kept,
       and a new pair gives it one more column: nothing is factorised, and a step reads the pairs twice. The good N is
       solved with in each step.
    3. σ is 1 for a fixed point, whose A is I − J. For a root it starts from the sizes of z and fn and becomes
       `sᵀy / yᵀy` (Barzilai & Borwein 1988) with the first pair, and again whenever all pairs have been replaced
       twice; rows of W keep the σ that they were made with. To renew it in every step solves fewer problems.
    4. Safeguard, sample by sample: a step that more than doubles the residual, or meets a non-finite value, is taken
       back and the pairs are dropped; for a root the next step is four times shorter.

    Args:
        history: pairs kept, even if there are fewer unknowns: a linear problem is then solved in 2n steps (Gay 1979).
        update: `"bad"`, which solves more of the classical problems and takes fewer steps on maps that contract slowly,
            by a factor of up to 20 (docs/solvers.md); or `"good"`.
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

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> Memory:
        """No pairs; `H = σ I`."""
        norm = evaluation.norm
        scale = torch.ones_like(norm)
        if problem.kind != "fixed_point":
            # A first step of half the size of z, at most that of the plain one (as SciPy's).
            size = 0.5 * two(z).clamp_min(1.0)
            scale = (size / norm.clamp_min(torch.finfo(z.dtype).tiny)).clamp_max(1.0)
        memory = Bad if self.update == "bad" else Good
        _, plain = self._plain(problem, z, evaluation, scale)
        return memory.begin((self._key(z, evaluation), plain), self.history, scale, norm)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: Memory, active: Tensor | None
    ) -> Step[Memory]:
        """One quasi-Newton step; see the class."""
        new = hold(active, state.move(), z)
        found = problem.evaluate(new)
        norm = found.norm
        rest, refused = None if active is None else ~active, None
        # Also true of NaN, in the residual or in the direction.
        if norm.numel() and not float((norm / state.norm).max()) <= 2.0:
            refused = (norm <= 2.0 * state.norm).logical_not_()
            if problem.kind == "fixed_point":
                # A plain step is not taken back.
                refused &= (state.gamma != 0).flatten(1).any(dim=1)
            if active is not None:
                refused &= active
            if bool(refused.any()):
                keep = ~refused
                new, found = hold(keep, new, z), found.where(keep, evaluation)
                norm = torch.where(keep, norm, state.norm)
                state.drop(refused)
                rest = refused if rest is None else rest | refused
            else:
                refused = None
        if problem.kind != "fixed_point":
            self._rescale(problem, state, (z, new), (evaluation, found), refused)
        step, plain = self._plain(problem, new, found, state.scale)
        state.extend((self._key(new, found), plain), step, rest)
        state.norm = norm
        return Step(new, found, state)

    def inverse(self, state: Memory) -> Inverse:
        """H: `σ I` and one product of two low-rank factors."""
        return state.inverse()

    def _key(self, z: Tensor, evaluation: Evaluation) -> Tensor:
        """What the update remembers of a point beside the plain step."""
        return evaluation.residual if self.update == "bad" else z

    @staticmethod
    def _plain(problem: Problem, z: Tensor, evaluation: Evaluation, scale: Tensor) -> tuple[Tensor, Tensor]:
        """`σ r` and `z + σ r`."""
        if problem.kind == "fixed_point":
            return evaluation.residual, evaluation.value
        step = scale[:, None] * evaluation.residual
        return step, z + step

    def _rescale(
        self,
        problem: Problem,
        state: Memory,
        points: tuple[Tensor, Tensor],
        evaluations: tuple[Evaluation, Evaluation],
        refused: Tensor | None,
    ) -> None:
        """Renew σ where a first pair is at hand, and now and then for all; shorten it for those taken back."""
        turn = state.taken % (_ROUNDS * state.history) == 0
        if turn or state.bare is not None:
            (z, new), (before, found) = points, evaluations
            s, y = new - z, before.residual - found.residual
            change = two(y)
            scale = torch.linalg.vecdot(s, y) / torch.where(change > 0, change, 1.0).square()
            size, old = scale.abs(), state.scale.abs()
            usable = (size > _SMALLEST * old) & (size < _LARGEST * old)
            if not turn and state.bare is not None:
                usable &= state.bare
            state.scale = torch.where(usable, scale, state.scale)
            state.replace_plain(self._plain(problem, z, before, state.scale)[1])
        if refused is not None:
            state.scale = torch.where(refused, 0.25 * state.scale, state.scale)
        state.bare = refused
