"""The adjoints: what a backward pass solves, exactly or approximately, in the place of `Aᵀu = v`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ._norms import two
from ._options import Options
from ._precision import COARSE, unit_size
from ._solution import Status
from .linear import GMRES, Cascade, Inverse, LinearSolution, LinearSolver, ResidualJacobian

_DEFAULT = Cascade()  # made once: to check its options takes as long as a cheap cell


@dataclass(frozen=True, eq=False, repr=False)
class Adjoint(Options):
    """Base class of the adjoints: how gradients are computed."""


@dataclass(frozen=True, eq=False, repr=False)
class LinearAdjoint(Adjoint, ABC):
    """Base class: how the gradient `v` with respect to z* becomes `u ≈ A⁻ᵀ v`; then it is `uᵀ ∂r/∂θ`.

    Results do not depend on the scale of `v`.
    """

    exact: ClassVar[bool] = False
    """Whether `u` is `A⁻ᵀ v` to a tolerance, so that the gradient has derivatives of its own."""

    @property
    def needs_inverse(self) -> bool:
        """Whether it uses the inverse that the solver has at hand when it is done."""
        return False

    def without_gradient(self, status: Tensor) -> Tensor:
        """Which samples get an exactly zero gradient, `(B,)` bool: those without a usable linearisation."""
        return status >= int(Status.DIVERGED)

    @abstractmethod
    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: Inverse | None = None) -> LinearSolution:
        """`u` for each sample, `(B, n)`; zero where there is none.

        Args:
            operator: `Aᵀ`.
            v: right-hand sides, `(B, n)`.
            inverse: `H ≈ A⁻¹`, where the solver had one.
        """


class WarmStart:
    """A memory for `Implicit(warm_start=…)`: the `u` of the backward pass before, where the next one begins.

    Of use where the same samples come again in the same places, as in training on one batch. What is found does not
    depend on it, but for the tolerance.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def clear(self) -> None:
        """Forget it."""
        self._last = None

    def begin(self, operator: ResidualJacobian, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """The multiple of the last `u` that leaves the least of v, and what it leaves; None where there is none."""
        u = self._last
        if u is None or u.shape != v.shape or u.dtype != v.dtype or u.device != v.device:
            return None
        image = operator.mv(u)
        square = torch.linalg.vecdot(image, image)
        factor = torch.linalg.vecdot(image, v) / torch.where(square > 0, square, 1.0)
        usable = factor.isfinite() & (square > 0)
        start = torch.where(usable[:, None], factor[:, None] * u, 0.0)
        return start, torch.where(usable[:, None], v - factor[:, None] * image, v)

    def keep(self, u: Tensor) -> None:
        """Remember it."""
        self._last = u.detach()


@dataclass(frozen=True, eq=False, repr=False)
class Implicit(LinearAdjoint):
    """Exact gradients by the implicit function theorem: `Aᵀu = v`, then `uᵀ ∂r/∂θ` (`A = −∂r/∂z` at the solution).

    The tolerance is relative to the incoming gradient `v`, per sample, so that results do not depend on the scale of
    the loss. A sample whose adjoint system cannot be solved contributes exactly zero, and its status says why.

    Args:
        linear_solver: None is `Cascade()`: Neumann series, GMRES, LU, each for the samples that need it.
        rtol: of the adjoint system, `‖v − Aᵀu‖ ≤ rtol·‖v‖`; None is `ε^(2/3)` of the dtype that fn computes in. Never
            effective below `4ε`, nor below the rounding of the products themselves.
        unconverged: gradient of a sample that ran out of steps or stalled: `"linearize"` takes that of the equation
            linearised at its best iterate, `"zero"` none. (A sample that is NONFINITE, DIVERGED or SINGULAR has none.)
        reuse: precondition the adjoint system by what the solver knows of `A⁻¹` when it is done: the LU factors of the
            last step of `Newton` or `Chord`, the pairs of `Broyden`, the history of `Anderson`. Saves most of the
            products, where the solver is one of these; the factors stay in memory until the backward pass, and samples
            that are done stay in the batch.
        warm_start: a `WarmStart()`, to begin at the `u` of the backward pass before; None begins at zero. One for each
            layer.
    """

    linear_solver: LinearSolver | None = None
    rtol: float | None = None
    unconverged: Literal["linearize", "zero"] = "linearize"
    reuse: bool = False
    warm_start: WarmStart | None = None

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Validate."""
        ok = self.linear_solver is None or isinstance(self.linear_solver, LinearSolver)
        self._require(
            "linear_solver", ok, "None or a linear solver such as torchimplicit.LU() or torchimplicit.GMRES()"
        )
        self._require_number("rtol", 0.0, 1.0, inside=True, optional=True)
        self._require_choice("unconverged", ("linearize", "zero"))
        self._require("reuse", isinstance(self.reuse, bool), "True or False")
        ok = self.warm_start is None or isinstance(self.warm_start, WarmStart)
        self._require("warm_start", ok, "None or an instance, torchimplicit.WarmStart()")

    @property
    def needs_inverse(self) -> bool:
        """If it is to be reused."""
        return self.reuse

    def without_gradient(self, status: Tensor) -> Tensor:
        """Which samples get an exactly zero gradient, `(B,)` bool."""
        dead = super().without_gradient(status)
        if self.unconverged == "zero":
            dead = dead | (status != int(Status.CONVERGED))
        return dead

    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: Inverse | None = None) -> LinearSolution:
        """`operator u = v` for each sample, `(B, n)`; zero where it could not be solved."""
        epsilon = max(torch.finfo(v.dtype).eps, operator.epsilon)
        default, least = (2 * epsilon, 2 * epsilon) if epsilon > COARSE else (epsilon ** (2 / 3), 4 * epsilon)
        rtol = max(default if self.rtol is None else self.rtol, least)
        if self.warm_start is None:
            return self._solve(operator, v, rtol, inverse)
        begun = self.warm_start.begin(operator, v)
        if begun is None:
            found = self._solve(operator, v, rtol, inverse)
        else:
            start, rest = begun
            size, left = two(v), two(rest)
            needed = torch.where(left > 0, rtol * size / left, 1.0).clamp_max(1.0)
            more = self._solve(operator, rest, needed, inverse)
            solved = more.status == int(Status.CONVERGED)
            value = torch.where(solved[:, None], start + more.value, 0.0)
            relative = torch.where(size > 0, more.residual * left / size, more.residual)
            found = replace(more, value=value, residual=relative)
        self.warm_start.keep(found.value)
        return found

    def _solve(
        self, operator: ResidualJacobian, v: Tensor, rtol: float | Tensor, inverse: Inverse | None
    ) -> LinearSolution:
        solver = self.linear_solver or _DEFAULT
        if inverse is None:
            found = solver.solve(operator, v, rtol)
        else:
            found = GMRES(preconditioner=_preconditioner(inverse, operator)).solve(operator, v, rtol)
            if not found.solved:
                again = solver.solve(operator, v, rtol)
                found = _either(found.status == int(Status.CONVERGED), found, again)
        if found.solved:
            return found
        if operator.epsilon > torch.finfo(v.dtype).eps:
            found = _within_rounding(operator, v, found)
        solved = found.status == int(Status.CONVERGED)
        return replace(found, value=torch.where(solved[:, None], found.value, 0.0))


@dataclass(frozen=True, eq=False, repr=False)
class NeumannSeries(LinearAdjoint):
    """`u = Σ (Jᵀ)ᵏ v` over `k ≤ terms`, the exact `u` cut short (Lorraine et al. 2020, for bilevel problems).

    With `‖J‖ ≤ γ < 1` the error is at most `γ^(terms+1) ‖u_exact‖`. Without a contraction it has no bound.

    Args:
        terms: products with `Jᵀ`.
    """

    terms: int = 5

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("terms", 0)

    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: Inverse | None = None) -> LinearSolution:
        """The series."""
        total, rest = operator.neumann(v, self.terms + 1)
        # What is left of v is the residual: v − A Σ = (I − A)^(terms+1) v.
        return _report(total, rest, v, self.terms)


@dataclass(frozen=True, eq=False, repr=False)
class JacobianFree(LinearAdjoint):
    """`u = v`: the gradient of one more call of fn at the solution (JFB, Fung et al. 2022; Bolte et al. 2023).

    No products with `Jᵀ` at all. With `‖J‖ ≤ γ < 1` the error is at most `γ ‖u_exact‖`; under the conditions of the
    paper it is a direction of descent.
    """

    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: Inverse | None = None) -> LinearSolution:
        """`v` itself; its residual is not computed, and reported as NaN."""
        nobody = torch.zeros(v.shape[0], dtype=torch.long, device=v.device)
        finite = v.isfinite().all(dim=1)
        solved = bool(finite.all())
        status = torch.where(finite, nobody, int(Status.NONFINITE))
        value = v if solved else torch.where(finite[:, None], v, 0.0)
        return LinearSolution(value, status, v.new_full((v.shape[0],), torch.nan), nobody, solved)


@dataclass(frozen=True, eq=False, repr=False)
class PhantomGradient(LinearAdjoint):
    """`u = λ Σ (λ Jᵀ + (1 − λ) I)ᵏ v` over `k < steps`: damped steps unrolled at the solution (Geng et al. 2021).

    With `‖J‖ ≤ γ < 1` the error is at most `(λ γ + 1 − λ)^steps ‖u_exact‖`. Damping λ below 1 shortens the gradient,
    which stabilises training where the equilibrium is badly conditioned.

    Args:
        steps: at least 1.
        damping: λ in (0, 1].
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("steps", 1)
        self._require_number("damping", 0.0, 1.0)
        self._require("damping", self.damping > 0.0, "a number in (0, 1]")

    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: Inverse | None = None) -> LinearSolution:
        """The damped series; `λ J + (1 − λ) I = I − λ A`."""
        rest, total = v, torch.zeros_like(v)
        for _ in range(self.steps):
            total = torch.add(total, rest, alpha=self.damping)
            rest = torch.sub(rest, operator.mv(rest), alpha=self.damping)
        return _report(total, rest, v, self.steps)


@dataclass(frozen=True, eq=False, repr=False)
class Shine(LinearAdjoint):
    """`u = Hᵀ v` with the solver's own `H ≈ A⁻¹`, and a few refinements (SHINE; Ramzi et al. 2022).

    The solver must be one that has an inverse when it is done: `Broyden`, `Anderson`, `Newton` or `Chord`. Each
    refinement is a step of GMRES preconditioned by H: of all that `refine` products can reach from there, the `u` of
    the least residual. A sample whose `u` is no better than none at all, `‖v − Aᵀu‖ > ‖v‖`, falls back to `u = v`
    (as the paper's does to the Jacobian-free gradient, by another test).

    Args:
        refine: products with `Jᵀ` for the refinement; 0 takes `Hᵀ v` as it is.
    """

    refine: int = 5

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("refine", 0)

    @property
    def needs_inverse(self) -> bool:
        """Always."""
        return True

    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: Inverse | None = None) -> LinearSolution:
        """`Hᵀ v`, refined.

        Raises:
            ValueError: the solver has no inverse.
        """
        if inverse is None:
            raise ValueError(
                "adjoint=Shine() needs a solver that has an approximate inverse when it is done; "
                "use solver=torchimplicit.Broyden(), Anderson(), Newton() or Chord()."
            )
        if self.refine:
            solver = GMRES(
                restart=self.refine, max_steps=self.refine, preconditioner=_preconditioner(inverse, operator)
            )
            value = solver.solve(operator, v, 4 * torch.finfo(v.dtype).eps, verify=False).value
        else:
            value = inverse.apply(v, operator.transposed)
        rest = v - operator.mv(value)
        good = two(rest) <= two(v)
        if not bool(good.all()):
            value = torch.where(good[:, None], value, v)
            rest = torch.where(good[:, None], rest, v - operator.mv(v))
        return _report(value, rest, v, self.refine + 1)


def solve_adjoint(
    adjoint: LinearAdjoint, operator: ResidualJacobian, v: Tensor, inverse: Inverse | None
) -> LinearSolution:
    """`adjoint.solve`, with right-hand sides that products of less than single precision can take."""
    if not operator.epsilon > torch.finfo(v.dtype).eps:
        return adjoint.solve(operator, v, inverse)
    unit = unit_size(v)
    found = adjoint.solve(operator, v / unit, inverse)
    return replace(found, value=found.value * unit)


def _preconditioner(inverse: Inverse, operator: ResidualJacobian) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    return lambda _: lambda p: inverse.apply(p, operator.transposed)


def _within_rounding(operator: ResidualJacobian, v: Tensor, found: LinearSolution) -> LinearSolution:
    """A residual that is but the rounding of products as coarse as these is no failure.

    For `A = I − J` that is `4ε (‖u‖ + ‖v‖)`, as `‖Jᵀu‖ ≤ ‖u‖ + ‖v‖`; but no more than `√ε ‖v‖`, which is no gradient.
    """
    size = two(v)
    growth = two(found.value) / torch.where(size > 0, size, 1.0) if operator.shifted else torch.zeros_like(size)
    reach = (4 * operator.epsilon * (1.0 + growth)).clamp_max(operator.epsilon**0.5)
    spent = (found.status == int(Status.MAX_STEPS)) | (found.status == int(Status.STALLED))
    status = torch.where(spent & (found.residual <= reach), int(Status.CONVERGED), found.status)
    return replace(found, status=status, solved=not bool(status.any()))


def _either(first: Tensor, one: LinearSolution, other: LinearSolution) -> LinearSolution:
    """`one` for some samples, `(B,)` bool, and `other` for the rest."""
    return LinearSolution(
        torch.where(first[:, None], one.value, other.value),
        torch.where(first, one.status, other.status),
        torch.where(first, one.residual, other.residual),
        torch.where(first, one.steps, one.steps + other.steps),
        other.solved,
    )


def _report(value: Tensor, rest: Tensor, v: Tensor, steps: int) -> LinearSolution:
    """An approximation whose residual is `rest`; CONVERGED means that it is what was asked for."""
    finite = value.isfinite().all(dim=1) & rest.isfinite().all(dim=1)
    solved = bool(finite.all())
    status = torch.where(finite, int(Status.CONVERGED), int(Status.NONFINITE))
    size = two(v)
    relative = two(rest) / torch.where(size > 0, size, 1.0)
    if not solved:
        value = torch.where(finite[:, None], value, 0.0)
        relative = torch.where(finite, relative, torch.inf)
    return LinearSolution(value, status, relative, torch.full_like(status, steps), solved)
