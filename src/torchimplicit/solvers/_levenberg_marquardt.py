"""Levenberg–Marquardt: damped least squares, dense or by conjugate gradients."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from .._solution import Status
from ._base import Solver, Step
from ._normal_equations import MatrixFreeModel, damped_by_conjugate_gradients
from ._trust_region import DenseModel, attempt


@dataclass(eq=False, repr=False)
class _Damping:
    """The damping of each sample.

    Attributes:
        model: at the iterate; None before the first step.
        damping: λ, `(B,)`.
        growth: the factor by which λ grows at the next refusal, `(B,)`.
        norm: of the target, `(B,)`.
    """

    model: DenseModel | MatrixFreeModel | None
    damping: Tensor
    growth: Tensor
    norm: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LevenbergMarquardt(Solver[_Damping]):
    """`min ‖t − A y‖² + λ‖y‖²` for a step `y = D Δz` (Levenberg 1944, Marquardt 1963), λ by Nielsen's rule (1999).

    Dense, the damped problem is solved by QR of `[A; √λ I]`, which does not square the condition of A, and variables
    are scaled as in `Dogleg`. Matrix-free, it is solved by conjugate gradients on `(AᵀA + λ I) y = Aᵀ t`, from
    products alone and without scaling. A step that kept the fraction ϱ of the fall of `‖t‖²` promised by the linear
    model multiplies λ by `max(1/3, 1 − (2ϱ − 1)³)`; a refused one by 2, 4, 8, … A singular Jacobian is no obstacle. A
    sample of a root at which `‖t‖` is stationary without being zero is STALLED.

    Args:
        damping: the first λ, relative to the squared norm of A.
        linear_solver: `"dense"`, or `"cg"` for matrix-free steps.
        max_products: of `A` and of `Aᵀ` in one matrix-free step.
    """

    damping: float = 1e-3
    linear_solver: Literal["dense", "cg"] = "dense"
    max_products: int = 100

    max_steps: ClassVar[int] = 500
    patience: ClassVar[int] = 60

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_number("damping", 0.0, inside=True)
        self._require_choice("linear_solver", ("dense", "cg"))
        self._require_count("max_products", 1)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _Damping:
        """No model yet."""
        norm = two(evaluation.target)
        return _Damping(None, torch.full_like(norm, self.damping), torch.full_like(norm, 2.0), norm)

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _Damping, active: Tensor | None
    ) -> Step[_Damping]:
        """One trial step."""
        target = evaluation.target
        running = torch.ones_like(state.norm, dtype=torch.bool) if active is None else active
        model = self._model(problem, z, evaluation, None) if state.model is None else state.model
        gradient = model.gradient(target)
        stationary = model.stationary(target, gradient) | ~model.usable
        if isinstance(model, DenseModel):
            y = _damped(model, target, state.damping)
        else:
            weight = state.damping * model.size().square()
            y = damped_by_conjugate_gradients(model, gradient, weight, running & ~stationary, self.max_products)
        moving = running & ~stationary & y.isfinite().all(dim=1)
        y = torch.where(moving[:, None], y, 0.0)
        trial = attempt(problem, z, evaluation, state.norm, model, y, moving)
        less = (1 - (2 * trial.ratio - 1) ** 3).clamp_min(1 / 3)
        damping = torch.where(trial.accepted, state.damping * less, state.damping * state.growth)
        state.damping = torch.where(moving, damping, state.damping).clamp_min(torch.finfo(z.dtype).tiny)
        state.growth = torch.where(trial.accepted, 2.0, 2.0 * state.growth)
        state.norm = trial.norm
        closed = moving & ~trial.accepted & (two(y) <= torch.finfo(z.dtype).eps * two(model.scale * z))
        stuck = running & (stationary | closed | ~moving)
        failure = torch.where(stuck, int(Status.STALLED), -1) if bool(stuck.any()) else None
        moved = bool(trial.accepted.any())
        state.model = self._model(problem, trial.z, trial.found, model) if moved else model
        return Step(trial.z, trial.found, state, failure, look=True)

    def _model(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, before: DenseModel | MatrixFreeModel | None
    ) -> DenseModel | MatrixFreeModel:
        if self.linear_solver == "cg":
            return MatrixFreeModel.at(problem, z, evaluation)
        return DenseModel.at(problem, z, evaluation, before if isinstance(before, DenseModel) else None)


def _damped(model: DenseModel, target: Tensor, damping: Tensor) -> Tensor:
    """The minimiser of `‖t − A y‖² + λ‖y‖²`, `(B, n)`."""
    _, m, n = model.matrix.shape
    below = damping.sqrt()[:, None, None] * torch.eye(n, dtype=target.dtype, device=target.device)
    q, r = torch.linalg.qr(torch.cat((model.matrix, below), dim=1))
    right = torch.bmm(target[:, None], q[:, :m])[:, 0]
    return torch.linalg.solve_triangular(r, right[:, :, None], upper=True)[:, :, 0]
