"""Batched BiCGStab: for any matrices, with short recurrences instead of a growing basis."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._norms import two
from ._krylov import Rows, solve_in_cycles
from ._preconditioner import Preconditioner, require_preconditioner
from ._probe import waves
from ._solver import LinearOperator, LinearSolution, LinearSolver

_ANGLE = 0.7
"""Least cosine between `s` and `A s` that the stabilising step goes by (Sleijpen & van der Vorst 1995)."""

_SPARE = 2
"""Restarts with a new shadow residual that need not have been earned by progress."""


@dataclass(frozen=True, eq=False, repr=False)
class BiCGStab(LinearSolver):
    """BiCGStab of van der Vorst (1992): two products a step, and memory for six vectors whatever the number of steps.

    `GMRES` needs fewer products, but its steps grow dearer with their number; BiCGStab is for systems that need many.
    Differences to the textbook's form:

    1. Every sample stops on its own, and those that are done leave the batch when at most half remain.
    2. `ω = ⟨s, As⟩/⟨As, As⟩` is kept away from 0: where the cosine between `s` and `As` is below 0.7, ω is computed as
       if it were 0.7 (Sleijpen & van der Vorst, "Maintaining convergence properties of BiCGstab methods in finite
       precision arithmetic", Numer. Algorithms 10, 1995). So `ω = 0`, certain for a skew matrix, is no breakdown.
    3. `ρ = 0` is none either, since `β = (ρ'/ρ)(α/ω)` is computed as `ρ'/(σω)` with `σ = ρ/α = ⟨r̂, Ap⟩`. What is left
       is `σ = 0`, noticed by a residual that grows by more than `ε^(-1/2)`. The sample then restarts from where it
       began with a new shadow residual r̂, `r/‖r‖` plus a fixed vector; twice, and as often as that gains.
    4. The residual is recomputed at the end, and a sample that the recurrence wrongly took for done goes on from that
       one (`verify=False` trusts the recurrence, for steps whose effect is measured anyway).

    What runs out of steps is MAX_STEPS, what restarts do not help is STALLED (a matrix that is singular, or has
    eigenvalues on the imaginary axis: try `GMRES`), and SINGULAR is only a matrix that takes a residual to zero.

    Args:
        max_steps: steps at most, in each sample; two products each.
        preconditioner: a callable that is given the operator once per solve and returns `p -> M⁻¹p` on `(B, n)`, such
            as `Jacobi()`; applied from the right, so residuals stay those of the system. If it has a method
            `select(samples)`, samples that are done may leave the batch.
    """

    max_steps: int = 250
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        """Validate."""
        self._require_count("max_steps", 1)
        require_preconditioner(self, self.preconditioner)

    def _solve(self, operator: LinearOperator, b: Tensor, rtol: float | Tensor, verify: bool) -> LinearSolution:
        """Solve `A x = b`, `b` `(B, n)`, until `‖b − A x‖ ≤ rtol·‖b‖` in each sample."""
        return solve_in_cycles(
            _cycle,
            operator,
            b,
            rtol,
            verify,
            max_steps=self.max_steps,
            preconditioner=self.preconditioner,
            spare=_SPARE,
        )


def _cycle(whole: Rows, length: int, earlier: int) -> None:
    """At most `length` steps from the residual as it is; in every cycle with another shadow residual."""
    rows = whole
    limits = torch.finfo(rows.norm.dtype)
    zero, infinite = rows.norm.new_zeros(()), rows.norm.new_full((), torch.inf)
    shadow = rows.residual / rows.norm.clamp_min(limits.tiny)[:, None]
    if earlier:
        shadow = shadow + waves(shadow, earlier) / shadow.shape[1] ** 0.5
    rho = torch.linalg.vecdot(shadow, rows.residual)
    direction, ceiling = rows.residual, rows.norm / limits.eps**0.5
    active = started = rows.norm > rows.target
    stretch, taken = rows.norm, 0
    while True:
        along = rows.apply(direction)
        image = rows.operator.mv(along)
        if not taken:
            stretch = torch.linalg.vector_norm(image, ord=torch.inf, dim=1)
        # With σ infinite α, β and γ are 0, and with a weight of 0 a row at rest stays where it is, and finite.
        sigma = torch.where(active, torch.linalg.vecdot(shadow, image), infinite)
        step = (rho / sigma)[:, None]
        halfway = torch.addcmul(rows.residual, step, image, value=-1)
        size = two(halfway)
        # Of unit size, so that no square of what A makes of it underflows.
        unit = halfway / size.clamp_min(limits.tiny)[:, None]
        across = rows.apply(unit)
        turned = rows.operator.mv(across)
        reach = two(turned)
        moves = active & (reach > 0)
        reach = reach.clamp_min(limits.tiny)
        cosine = torch.linalg.vecdot(turned, unit) / reach
        omega = cosine.abs().clamp_min(_ANGLE).copysign(cosine) / reach
        weight = torch.where(moves, omega * size, zero)[:, None]
        rows.value = torch.addcmul(rows.value, step, along).addcmul_(weight, across)
        rows.residual = torch.addcmul(halfway, weight, turned, value=-1)
        rows.norm = two(rows.residual)
        rows.steps = rows.steps + active
        taken += 1
        rows.rest(taken)
        active = (rows.norm > rows.target) & (rows.norm < ceiling)
        count = int(torch.count_nonzero(active))
        if not count or taken == length:
            break
        rho = torch.linalg.vecdot(shadow, rows.residual)
        gamma = rho / sigma
        direction = torch.addcmul(rows.residual, (gamma / omega)[:, None], direction)
        direction = direction.addcmul_(gamma[:, None], image, value=-1)
        if rows.may_shrink(count):
            left = active.nonzero()[:, 0]
            rows = rows.select(left)
            state = (shadow, rho, direction, ceiling, active)
            shadow, rho, direction, ceiling, active = (t.index_select(0, left) for t in state)
    rows.back_to(whole)
    whole.singular = whole.singular | started & (stretch == 0)
