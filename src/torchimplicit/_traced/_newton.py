"""The steps of `Newton` (which see) with dense matrices: a factorisation, and a search along its direction."""

from operator import index

import torch
from torch import Tensor
from torch._higher_order_ops import while_loop

from .._solution import Status
from ..linear._dense import condition_limit
from ..linear._probe import signs
from ..solvers import Newton
from ..solvers._line_search import _ARMIJO
from ..solvers._newton import _LONGEST_WAIT
from ._equation import Evaluated, TracedEquation, scalar
from ._loop import State, TracedSteps


class NewtonSteps(TracedSteps):
    """Newton steps, searched along; or plain ones of a fixed point for samples that wait.

    The state: the residual's norm, the plain steps to take before the next Newton step, and the length of the next
    wait, `(B,)` each.
    """

    def __init__(self, solver: Newton) -> None:
        self.max_steps, self.patience, self.progress = solver.max_steps, solver.patience, solver.progress
        self.check_every = 1  # Newton looks after every step
        self._halvings = index(solver.max_backtracks)

    def init(self, equation: TracedEquation) -> State:
        """Nobody waits."""
        self._armijo = scalar(_ARMIJO, equation.first)
        norm = torch.linalg.vector_norm(equation.residual(equation.start), dim=1)
        wait = torch.zeros_like(norm, dtype=torch.long)
        return norm, wait, torch.ones_like(wait)

    def step(
        self, equation: TracedEquation, phase: int, taken: Tensor, at: Evaluated, state: State, active: Tensor
    ) -> tuple[Evaluated, State, Tensor | None]:
        """One factorisation, and the search."""
        merit, wait, pause = state
        plain = equation.kind == "fixed_point" and self._halvings > 0
        trying, waiting = active & (wait == 0), active & (wait > 0)
        residual = equation.residual(at)
        direction, regular = _newton_direction(equation, at, torch.where(trying[:, None], residual, 0.0))
        singular = trying & ~regular
        moving = trying & ~singular
        richardson = at[0] + residual
        z = torch.where(waiting[:, None], richardson, at[0] + direction)
        found, norm, refused, stuck = self._searched(equation, at[0], direction, richardson, merit, moving, z, plain)
        failure = torch.where(singular, int(Status.SINGULAR), -1)
        if plain:
            refused = refused | stuck
            short = torch.where(waiting & (norm < merit), wait - 1, 0)
            longer = torch.where(waiting, pause, 1)
            wait = torch.where(refused, pause, short)
            pause = torch.where(refused, (2 * pause).clamp_max(_LONGEST_WAIT), longer)
        else:
            failure = torch.where(stuck, int(Status.STALLED), failure)
            row = stuck[:, None]
            found = torch.where(row, at[0], found[0]), torch.where(row, at[1], found[1])
            norm = torch.where(stuck, merit, norm)
            wait, pause = wait.clone(), pause.clone()
        return found, (norm, wait, pause), failure

    def _searched(
        self,
        equation: TracedEquation,
        start: Tensor,
        direction: Tensor,
        richardson: Tensor,
        merit: Tensor,
        moving: Tensor,
        z: Tensor,
        plain: bool,
    ) -> tuple[Evaluated, Tensor, Tensor, Tensor]:
        """From the full step on: the plain one, halvings, and at last the plain one at all costs.

        Returns:
            The points found and fn there, the norm of the residual, the samples that took the plain step in the place
            of Newton's, and those that found no point.
        """
        value = equation.value(z)
        norm = torch.linalg.vector_norm(equation.residual((z, value)), dim=1)
        nobody = torch.zeros_like(moving)
        if not self._halvings:
            return (z, value), norm, nobody, moving & ~norm.isfinite()
        halvings, first, last = self._halvings, int(plain), self._halvings + int(plain)

        def worse(norm: Tensor, length: Tensor, refused: Tensor) -> Tensor:
            return moving & ~(norm <= (1 - self._armijo * length) * merit) & ~refused

        def searching(turn: Tensor, stuck: Tensor, *_: Tensor) -> Tensor:
            return stuck.any() & (turn <= halvings + 2 * first - 1)

        def attempt(
            turn: Tensor, stuck: Tensor, z: Tensor, value: Tensor, norm: Tensor, length: Tensor, refused: Tensor
        ) -> tuple[Tensor, ...]:
            length = torch.where(stuck & (turn >= first) & (turn < last), 0.5 * length, length)
            point = torch.addcmul(start, length[:, None], direction)
            if plain:
                point = torch.where((turn == 0) | (turn == last), richardson, point)
            z = torch.where(stuck[:, None], point, z)
            value = equation.value(z)
            norm = torch.linalg.vector_norm(equation.residual((z, value)), dim=1)
            if plain:
                refused = refused | (stuck & (((turn == 0) & (norm < merit)) | (turn == last)))
            return turn + 1, worse(norm, length, refused), z, value.clone(), norm, length, refused.clone()

        turn, length = torch.zeros((), dtype=torch.long, device=z.device), torch.ones_like(merit)
        carried = (turn, worse(norm, length, nobody), z, value.clone(), norm, length, nobody)
        _, stuck, z, value, norm, _, refused = while_loop(searching, attempt, carried)
        return (z, value), norm, refused, stuck


def _newton_direction(equation: TracedEquation, at: Evaluated, residual: Tensor) -> tuple[Tensor, Tensor]:
    """`A⁻¹ r` with `A = −∂r/∂z` of each sample, zero where it is singular; and whether it is regular (see `LU`)."""
    z, _ = at
    batch, n = z.shape
    pullback = torch.func.vjp(equation.value, z)[1]
    basis = torch.eye(n, dtype=z.dtype, device=z.device)[:, None, :].expand(n, batch, n)
    # The samples are independent: row i of every sample comes from one product.
    matrix = torch.func.vmap(lambda u: pullback(u)[0])(basis).transpose(0, 1)
    if equation.kind == "fixed_point":
        matrix = torch.eye(n, dtype=z.dtype, device=z.device) - matrix
    rows = matrix.abs().amax(dim=-1)
    finite = rows.isfinite().all(dim=-1) & residual.isfinite().all(dim=-1)
    scaling = torch.where((rows > 0) & finite[:, None], rows, 1.0).reciprocal()
    scaled = torch.where(finite[:, None, None], matrix * scaling[:, :, None], 0.0)
    factors, pivots, info = torch.linalg.lu_factor_ex(scaled)
    both = torch.linalg.lu_solve(factors, pivots, torch.stack((residual * scaling, signs(residual)), dim=2))
    solved, stretched = both[:, :, 0], both[:, :, 1]
    condition = torch.linalg.vector_norm(stretched, dim=1) * scaled.square().sum(dim=(1, 2)).sqrt()
    regular = (info == 0) & (condition <= condition_limit(residual, False)) & solved.isfinite().all(dim=-1) & finite
    return torch.where(regular[:, None], solved, 0.0), regular
