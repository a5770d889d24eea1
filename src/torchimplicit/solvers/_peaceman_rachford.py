"""Peaceman and Rachford's splitting, for monotone layers: one product with the resolvent of W a step."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from .._evaluation import Evaluation
from .._norms import two
from .._problem import Problem
from ..linear import RELAXATION, Resolvent, resolvent_step
from ._base import Solver, Stage, Step
from ._splitting import SplitForm, split_form

_BLIND = 10
"""Steps without a look where a look costs a synchronisation."""
_LIKELY = 4 / 3
"""Times the residual of y is that of z, more or less: a look too early costs a product, as does a step too many."""
_PATIENCE = 100
"""Steps without a better residual after which the safe step size takes over."""


@dataclass(eq=False, repr=False)
class _State:
    """The form, its resolvent and the step size, which are all samples' together; and u, `(B, n)`."""

    form: SplitForm
    resolvent: Resolvent
    step_size: float
    u: Tensor

    def select(self, samples: Tensor) -> "_State":
        """That of some samples, by their indices."""
        return _State(self.form.select(samples), self.resolvent, self.step_size, self.u.index_select(0, samples))


@dataclass(frozen=True, eq=False, repr=False)
class PeacemanRachford(Solver[_State]):
    """Reflected resolvents of the two parts of `z = prox_f(W z + c)` in turn (Winston & Kolter 2020, algorithm 2).

    `v = 2z − u`, `y = (I + α(I − W))⁻¹(v + αc)`, `u ← u + ρ (2y − v − u)` with ρ = 0.95, `z ← prox_{αf}(u)`. Converges
    for every α > 0 where `I − W` is strongly monotone: u by the factor `‖(1 − 2ρ) I + 2ρ (I + α(I − W))⁻¹‖`, at most
    `1 − ρ + ρ √(1 − 4αm/(1 + αL)²)`. Needs far fewer steps than `ForwardBackward` where W is large.

    The cell must supply W, its resolvent, c and prox (see `SplitForm`), as those of the monotone layers do. A step is
    one product with the resolvent. What the residual will be is guessed from it, by that of y; a residual that decides
    anything is computed from z itself, by a product with W: when the samples seem to be done, and every `check_every`
    steps; on a GPU, where nobody looks whether they seem to be, every 10. (To go by the displacement of z, as the
    paper's code does, is wrong: z may rest while u still moves.)

    Args:
        step_size: α. None is `0.9/√(m L)`, m the margin and L the norm of `I − W`; and for samples that make no
            progress so, `"safe"`: `1/L`, by which u contracts by `1 − ρ + ρ √(1 − m/L)` at worst.
    """

    step_size: float | Literal["safe"] | None = None
    check_every: int = 50

    max_steps: ClassVar[int] = 100_000
    patience: ClassVar[int] = 2000

    def __post_init__(self) -> None:
        """Validate."""
        super().__post_init__()
        if self.step_size != "safe":
            self._require_number("step_size", 0.0, inside=True, optional=True)

    def stages(self, problem: Problem) -> tuple[Stage, ...]:
        """Where no step size was chosen, the safe one comes second."""
        if self.step_size is not None:
            return super().stages(problem)
        first = Stage(self, 2000, patience=_PATIENCE)
        return first, Stage(replace(self, step_size="safe"), self.max_steps, patience=self.patience)

    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> _State:
        """`u = z + α (W z + c − z)`, what belongs to z where z is the solution."""
        form, affine = split_form(problem, self, z, evaluation)
        if self.step_size == "safe":
            alpha = 1.0 / max(form.operator.norm_bound(), form.operator.margin)
        else:
            alpha = self.step_size or resolvent_step(form.operator)
        return _State(form, form.operator.resolvent(alpha), alpha, (affine - z).mul_(alpha).add_(z))

    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _State, active: Tensor | None
    ) -> Step[_State]:
        """One step, and the residual after it."""
        return self.steps(problem, z, evaluation, state, active, 1)

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: _State, active: Tensor | None, count: int
    ) -> Step[_State]:
        """Steps until the residuals seem to be small enough, `count` at most."""
        form, alpha, u, taken = state.form, state.step_size, state.u, 0
        rtol = problem.epsilon ** (2 / 3) if self.rtol is None else self.rtol
        looks = z.device.type == "cpu"
        count = count if looks else min(count, _BLIND)
        z = form.prox(u, alpha)  # u belongs to the z before: with that one a step would bring nothing new
        while taken < count:
            half = (2.0 * z).sub_(u)
            middle = state.resolvent.mv(half.add(form.offset, alpha=alpha))
            u = u.lerp((2.0 * middle).sub_(half), RELAXATION)
            z = form.prox(u, alpha)
            taken += 1
            if taken < count and looks:
                # W y + c is known without a product: (1 + α) y − α (W y + c) = v.
                value = form.prox(((1.0 + alpha) * middle).sub_(half).div_(alpha), 1.0)
                small = _LIKELY * two(value - middle) <= rtol * two(value)
                if bool((small if active is None else small | ~active).all()):
                    break
        affine = form.operator.mv(z).add_(form.offset)
        problem.count(taken + 1)
        found = problem.evaluation(z, form.prox(affine, 1.0))
        return Step(z, found, _State(form, state.resolvent, alpha, u), look=True, count=taken)
