"""Operator splitting for the linear systems of monotone layers: the adjoint of a layer solved as the layer is."""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .._norms import two
from .._solution import Status
from ._cascade import Cascade
from ._operator import ResidualJacobian, SuppliedJacobian
from ._solver import LinearOperator, LinearSolution, LinearSolver


class Resolvent(Protocol):
    """`V = (I + α (I − W))⁻¹` for one α."""

    def mv(self, p: Tensor) -> Tensor:
        """`V p`."""
        ...

    def rmv(self, u: Tensor) -> Tensor:
        """`Vᵀ u`."""
        ...


class MonotoneOperator(Protocol):
    """A linear map W, the same for all samples, of which `I − W` is strongly monotone.

    `⟨(I − W) p, p⟩ ≥ margin·‖p‖²` in an inner product with positive weights on the components. Products take and
    return `(B, n)`, or tensors shaped like the state.
    """

    @property
    def margin(self) -> float:
        """A lower bound of the monotonicity."""
        ...

    def mv(self, p: Tensor) -> Tensor:
        """`W p`."""
        ...

    def rmv(self, u: Tensor) -> Tensor:
        """`Wᵀ u`."""
        ...

    def resolvent(self, step_size: float) -> Resolvent:
        """`(I + α (I − W))⁻¹`, for α > 0."""
        ...

    def norm_estimate(self) -> float:
        """About `‖I − W‖`, cheaply: step sizes are chosen by it."""
        ...

    def norm_bound(self) -> float:
        """An upper bound of `‖I − W‖`, in the norm of that inner product."""
        ...


RELAXATION = 0.95
"""The part of a step of Peaceman and Rachford's that is taken."""


def resolvent_step(operator: MonotoneOperator) -> float:
    """The α of Peaceman and Rachford's method: `0.9/√(m L)`.

    Without the factor it is the best one where `I − W` is symmetric and nothing is cut off. An activation cuts off the
    slowest modes, and what remains of them takes a larger part in the error than in the residual; then this one and
    `RELAXATION`, which damps the modes that alternate in sign, take 10 to 30 % of the steps away from layers with
    L/m = 100 or more, and add one at most where L/m is a few units.
    """
    return 0.9 * (operator.margin * max(operator.norm_estimate(), operator.margin)) ** -0.5


@dataclass(frozen=True, eq=False, repr=False)
class Splitting(LinearSolver):
    """Solves `(I − D W)ᵀ u = v` of a monotone layer by splitting it into `I − W` and `D` (Winston & Kolter 2020).

    With slopes `D = diag(j)`, `0 ≤ j ≤ 1`, and `y = D u`: `y = D (v + Wᵀ y)` is the equilibrium of a monotone layer
    with the linear activation `D`, whose prox is `P(p) = j p / (j + α (1 − j))` (their algorithms 3 and 4, in which
    slopes of 0 are a case of their own). Converges whatever `‖W‖` is, where a Neumann series would not. The systems
    `(I − D W) t = b` of forward mode are solved as well, as `t = b + s`, `s = D (W b + W s)`.

    What is not such a system (a second derivative, say, in which some products are autograd's) goes to `fallback`, and
    so does a sample that is not solved.

    Args:
        method: `"peaceman-rachford"`, a product with `(I + α (I − W))⁻¹` each step; or `"forward-backward"`, one with
            `W`, and many more of them.
        step_size: α; None is `0.9/√(m L)`, or `m/L²` for forward-backward: m the margin, L the norm of `I − W`.
        max_steps: steps at most.
        fallback: for everything else.
    """

    method: Literal["peaceman-rachford", "forward-backward"] = "peaceman-rachford"
    step_size: float | None = None
    max_steps: int = 1000
    fallback: LinearSolver = field(default_factory=Cascade)

    def __post_init__(self) -> None:
        """Validate."""
        self._require_choice("method", ("peaceman-rachford", "forward-backward"))
        self._require_number("step_size", 0.0, inside=True, optional=True)
        self._require_count("max_steps", 1)
        self._require("fallback", isinstance(self.fallback, LinearSolver), "a linear solver, torchimplicit.Cascade()")

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        monotone, slope = _parts(operator)
        if monotone is None or slope is None or not isinstance(operator, ResidualJacobian):
            return self.fallback.solve(operator, b, rtol, verify)
        system = _System(monotone, slope.reshape(b.shape), operator, b, operator.transposed)
        value, residual, steps = self._iterate(system, rtol)
        size = two(b)
        relative = torch.where(residual.isfinite(), residual / torch.where(size > 0, size, 1.0), torch.inf)
        solved = relative <= rtol
        everyone = bool(solved.all())
        status = torch.where(solved, int(Status.CONVERGED), int(Status.MAX_STEPS))
        found = LinearSolution(value, status, relative, steps, everyone)
        if everyone:
            return found
        left = (~solved).nonzero()[:, 0]
        some = rtol.index_select(0, left) if isinstance(rtol, Tensor) and rtol.ndim else rtol
        more = self.fallback.solve(operator.select(left), b.index_select(0, left), some, verify)
        return LinearSolution(
            value.index_copy(0, left, more.value),
            status.index_copy(0, left, more.status),
            relative.index_copy(0, left, more.residual),
            steps.index_add(0, left, more.steps),
            more.solved,
        )

    def _iterate(self, system: "_System", rtol: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The solutions, the norms of their residuals, and the steps taken."""
        monotone, forced, slope = system.monotone, system.forced, system.slope
        reflected = self.method == "peaceman-rachford"
        if self.step_size is not None:
            alpha = self.step_size
        else:
            alpha = resolvent_step(monotone) if reflected else monotone.margin / monotone.norm_bound() ** 2
        resolvent = monotone.resolvent(alpha) if reflected else None
        prox, target = slope / (slope + alpha * (1.0 - slope)), rtol * two(system.b)
        u = torch.zeros_like(forced)
        y = alpha * prox * forced  # what a step from zero makes of it, without a product
        value, residual = y, torch.full_like(target, torch.inf)
        steps, aim = torch.zeros_like(target, dtype=torch.long), target
        for step in range(1, self.max_steps + 1):
            if resolvent is not None:
                half = 2.0 * y - u
                system.count()
                middle = resolvent.rmv(half) if system.transposed else resolvent.mv(half)
                # What W makes of it is known without a product: V⁻¹ middle = half.
                image = ((1.0 + alpha) * middle - half).div_(alpha)
                u = u.lerp(2.0 * middle - half, RELAXATION)
                y = prox * torch.add(u, forced, alpha=alpha)
            else:
                middle, image = y, system.apply(y)
                y = prox * ((1.0 - alpha) * middle).add_(image, alpha=alpha).add_(forced, alpha=alpha)
            gap = two(slope * (forced + image) - middle)
            last = step == self.max_steps or not bool(gap.isfinite().all())
            if last or bool((gap <= aim).all()):
                # Small as it seems: what decides is the residual of the system itself.
                steps = torch.where(residual > target, step, steps)
                value, residual = system.recovered(middle)
                if last or not bool((residual > target).any()):
                    break
                aim = 0.1 * aim
        return value, residual, steps


@dataclass(frozen=True, eq=False, repr=False)
class _System:
    """`(I − D W)ᵀ u = b`, or without the transpose, in the unknown y."""

    monotone: MonotoneOperator
    slope: Tensor
    operator: ResidualJacobian
    b: Tensor
    transposed: bool

    @property
    def forced(self) -> Tensor:
        """What is added to `Wᵀ y`: b, or `W b`."""
        return self.b if self.transposed else self.monotone.mv(self.b)

    def apply(self, y: Tensor) -> Tensor:
        """`Wᵀ y`, or `W y`."""
        self.count()
        return self.monotone.rmv(y) if self.transposed else self.monotone.mv(y)

    def count(self) -> None:
        """One product more."""
        jacobian: Any = self.operator.jacobian
        jacobian.count(1)

    def recovered(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The solution that y belongs to, and its residual's norm, by the system's own products."""
        u = self.b + (self.apply(y) if self.transposed else y)
        return u, two(self.b - self.operator.mv(u))


def _parts(operator: Any) -> tuple[MonotoneOperator | None, Tensor | None]:
    """W and the slopes, of the Jacobian of a monotone layer; None of any other operator."""
    jacobian = getattr(operator, "jacobian", None)
    if not getattr(operator, "shifted", False) or not isinstance(jacobian, SuppliedJacobian):
        return None, None
    return getattr(jacobian.operator, "monotone", None), getattr(jacobian.operator, "slope", None)
