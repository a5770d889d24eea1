"""Forward-backward splitting, for monotone layers: one product with W a step, and no factorisation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._problem import Problem
from ._base import Solver, Step
from ._splitting import SplitForm, split_form

_WAIT = 25
"""Steps without a residual below `_ENOUGH` of the best one before, after which a sample takes the safe step size."""
_ENOUGH = 0.9


@dataclass(eq=False, repr=False)
class _State:
    """The form, `W z + c` `(B, n)`; and per sample, `(B,)`: α, the residual that counts as progress, steps since."""

    form: SplitForm
    affine: Tensor
    step_size: Tensor
    wanted: Tensor
    since: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class ForwardBackward(Solver[_State]):
    """`z ← prox_{αf}((1 − α) z + α (W z + c))` for `z = prox_f(W z + c)` (Winston & Kolter 2020, algorithm 1).

    With `I − W` strongly monotone by m and `‖I − W‖ ≤ L` it contracts by `√(1 − 2αm + α²L²)` for `α < 2m/L²`, however
    large W is; `Picard` is the step with α = 1, which need not converge. The cell must supply W, c and prox (see
    `SplitForm`), as those of the monotone layers do. Residuals are those of the equation itself, not of the step.

    Args:
        step_size: α; None chooses for each sample and step `⟨Δz, Δg⟩/‖Δg‖²` with `g = z − W z − c`, between `m/L²` and
            `1/m` (Barzilai & Borwein 1988, the second), and for a sample that makes no progress so, `m/L²` for good.
    """

    step_size: float | None = None

    max_steps: ClassVar[int] = 20_000
    patience: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        self._require_number("step_size", 0.0, inside=True, optional=True)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _State:
        """Begins with `2/(m + L)`, the best step size where W is symmetric."""
        form, affine = split_form(problem, self, z, evaluation)
        operator = form.operator
        alpha = self.step_size or 2.0 / (operator.margin + operator.norm_estimate())
        norm = evaluation.norm
        return _State(form, affine, torch.full_like(norm, alpha), _ENOUGH * norm, torch.zeros_like(norm).long())

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _State, active: Tensor | None
    ) -> Step[_State]:
        """One product with W: it makes the next step too."""
        form, alpha = state.form, state.step_size[:, None]
        new = form.prox(torch.addcmul(z, alpha, state.affine - z), alpha)
        affine = form.operator.mv(new).add_(form.offset)
        problem.count(1)
        found = problem.evaluation(new, form.prox(affine, 1.0))
        if self.step_size is not None:
            return Step(new, found, _State(form, affine, state.step_size, state.wanted, state.since))
        margin = form.operator.margin
        progress = found.norm <= state.wanted
        since = torch.where(progress, 0, state.since + 1)
        safe = margin / form.operator.norm_bound() ** 2
        # A sample that has waited stays at the safe step, whatever it gains there.
        lost = (state.since >= _WAIT) | (since >= _WAIT)
        moved = new - z
        turned = moved - (affine - state.affine)
        square = torch.linalg.vecdot(turned, turned)
        chosen = torch.linalg.vecdot(moved, turned) / torch.where(square > 0, square, 1.0)
        chosen = torch.where(lost | ~(square > 0), safe, chosen.clamp(safe, max(safe, 1.0 / margin)))
        since = torch.where(lost, _WAIT, since)
        return Step(
            new, found, _State(form, affine, chosen, torch.where(progress, _ENOUGH * found.norm, state.wanted), since)
        )
