"""`Previous`: a layer starts from its last solution, and takes its first steps with the Jacobian it had there."""

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils import _pytree as pytree

from .._evaluation import Evaluation
from .._problem import Problem
from .._solution import PyTree, Solution, Status
from ..solvers import Auto, Method, Solver, Stage, Step
from ._memory import Memory, alike, choose, is_transformed

_DENSE = 256
"""Unknowns up to which the inverse of a Jacobian is kept."""
_BYTES = 2**30
"""Size up to which those of a batch are."""


class Previous(Memory):
    """A memory for `init=`: each solve of the layer starts from the solution of the one before.

    Of use where inputs vary slowly and the same samples come again in the same places: frames of a video, steps of a
    simulation, a batch that is looked at again. What is found does not depend on it, but for the tolerance and for
    equations with several solutions; a call whose state has another shape, dtype or device starts anew. One for each
    layer.

    The start alone saves less than one thinks: an input that is 1 % different leaves most of the decades to go. So the
    inverse of `A = −∂r/∂z` is kept too, and the layer's solver takes over from `corrections` chord steps
    `z ← z + A⁻¹ r` (Kelley 1995, §5.4), each of which is as good as many of its own. The inverse is made anew for a
    sample that the corrections did not solve, at its next start. It takes `n²` numbers for each sample, and is kept for
    states of up to 256 unknowns whose matrices take up to 1 GiB.

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.TanhEquilibrium(8, init=ti.nn.Previous())
    >>> frames = torch.randn(4, 8) + 0.01 * torch.randn(3, 4, 8)
    >>> [bool(layer.solve(x).converged.all()) for x in frames]
    [True, True, True]

    Args:
        corrections: chord steps at most; 0 keeps the solution alone.
    """

    def __init__(self, corrections: int = 4) -> None:
        if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
            raise ValueError(f"corrections={corrections!r} is not valid; give an integer >= 0.")
        self.corrections = corrections
        self._value: PyTree | None = None
        self._failed: Tensor | None = None
        self._inverse: Tensor | None = None
        self._stale: Tensor | None = None

    def __repr__(self) -> str:
        """The options."""
        return f"Previous(corrections={self.corrections})"

    def clear(self) -> None:
        """Forget it."""
        self._value = self._failed = self._inverse = self._stale = None

    def begin(self, start: PyTree, solver: Method | None) -> tuple[PyTree, Method | None]:
        """The start and the solver of a solve that would begin at `start` if nothing were known."""
        if torch.compiler.is_exporting():  # a program is exported as it is when nothing is known
            return start, solver
        if "torch._dynamo" in sys.modules:
            return _begin_uncompiled(self, start, solver)
        return self._begin(start, solver)

    def _begin(self, start: PyTree, solver: Method | None) -> tuple[PyTree, Method | None]:
        if self._value is None or is_transformed() or not alike(self._value, start):
            return start, solver
        value = self._value
        if self._failed is not None:
            value = pytree.tree_map(partial(choose, self._failed), start, value)
        if not self.corrections:
            return value, solver
        solver = Auto() if solver is None else solver
        return value, _Corrected(
            memory=self,
            method=solver,
            rtol=solver.rtol,
            atol=solver.atol,
            norm=solver.norm,
            check_every=solver.check_every,
        )

    def keep(self, solution: Solution) -> None:
        """Remember a solution, and whom the corrections did not solve; failed samples begin anew."""
        if torch.compiler.is_exporting():
            return
        if "torch._dynamo" in sys.modules:
            _keep_uncompiled(self, solution)
        else:
            self._keep(solution)

    def _keep(self, solution: Solution) -> None:
        if is_transformed() or solution.status.is_meta:
            return
        failed = solution.status != int(Status.CONVERGED)
        self._failed = failed if bool(failed.any()) else None
        self._value = pytree.tree_map(lambda leaf: leaf.detach(), solution.value)
        self._stale = (failed | (solution.steps > self.corrections)).reshape(-1)

    def inverse(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> Tensor:
        """`A⁻¹` of each sample, `(B, n, n)`, made at a state `(B, n)` for those who have none that serves.

        The identity, which makes a plain step, where the matrix is singular or not finite.
        """
        shape = (*z.shape, z.shape[1])
        kept = self._inverse
        if kept is not None and kept.shape == shape and self._stale is not None and len(self._stale) == len(z):
            rows = self._stale.nonzero()[:, 0]
            if not rows.numel():
                return kept
            found = _inverse(problem.linearize(z, evaluation.value).select(rows).dense())
            self._inverse = kept.index_copy(0, rows, found)
        else:
            self._inverse = _inverse(problem.linearize(z, evaluation.value).dense())
        return self._inverse


# To a compiler the memory would be a constant of the first call.
_begin_uncompiled = _disable_dynamo(Previous._begin)
_keep_uncompiled = _disable_dynamo(Previous._keep)


def _inverse(matrix: Tensor) -> Tensor:
    inverse, _ = torch.linalg.inv_ex(matrix)
    usable = inverse.isfinite().flatten(1).all(dim=1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(usable[:, None, None], inverse, identity)


@dataclass(frozen=True, eq=False, repr=False)
class _Corrected(Method):
    """A method that takes over from a few chord steps; the tolerance is the method's own."""

    memory: Previous = field(kw_only=True)
    method: Method = field(kw_only=True)

    def stages(self, problem: Problem) -> tuple[Stage, ...]:
        """The chord steps first, where their matrices are small enough."""
        stages = self.method.stages(problem)
        batch, n = problem.layout.matrix_shape
        if n > _DENSE or batch * n * n * problem.layout.dtype.itemsize > _BYTES:
            return stages
        return Stage(_Correction(memory=self.memory), self.memory.corrections), *stages


@dataclass(eq=False, repr=False)
class _Kept:
    """`A⁻¹` of each sample, `(B, n, n)`; None until a step needs it, which none may."""

    inverse: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class _Correction(Solver[_Kept]):
    """`z ← z + H r` with an H that is never changed."""

    memory: Previous = field(kw_only=True)

    max_steps: ClassVar[int] = 1
    patience: ClassVar[int] = 100

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Kept:
        """Nothing yet."""
        return _Kept(None)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Kept, active: Tensor | None
    ) -> Step[_Kept]:
        """One step, of all samples."""
        if state.inverse is None:
            state.inverse = self.memory.inverse(problem, z, evaluation)
        # As a row times a matrix, which takes half the time of a matrix times a column.
        z = torch.baddbmm(z[:, None], evaluation.residual[:, None], state.inverse.mT)[:, 0]
        return Step(z, problem.evaluate(z), state)
