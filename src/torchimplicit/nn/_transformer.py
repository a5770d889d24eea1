"""`EquilibriumTransformer`: a causal transformer block at its equilibrium, solved jointly or token by token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Never

import torch
from torch import Tensor

from .._adjoint import Adjoint, Implicit
from .._api import fixed_point
from .._options import refuse_unknown
from .._report import OnFailure
from .._solution import PyTree, Solution
from ..diagnostics import record
from ..linear import Neumann
from ..solvers import Method, Picard
from ._attention import Attend, CausalCell
from ._layer import FixedPoint

_OPTIONS = ("hidden", "attend", "solver", "adjoint", "max_steps", "on_failure", "init", "device", "dtype")


@dataclass(frozen=True, eq=False)
class TransformerCertificate:
    """What is known of the equilibria of an `EquilibriumTransformer`, for every input.

    Attributes:
        exists: always true: the map is continuous and takes everything into a ball (Brouwer 1911).
        radius: of that ball, `‖z_t‖₂ ≤ √d` for each position.
        unique: whether there is no other; true for `attend="past"`, whose map is strictly triangular in time. False
            means that it is not known.
        steps: plain steps after which a sequence of T positions is exact in exact arithmetic, as a multiple of T; None
            where there is no such number.
        source: of the argument.
    """

    exists: bool
    radius: float
    unique: bool
    steps: int | None
    source: str


class EquilibriumTransformer(FixedPoint):
    """The layer `z = f(z, x)` where f is a causal transformer block: x is added before its first normalisation.

    A weight-tied transformer of infinite depth (Bai, Kolter & Koltun 2019). With `attend="past"` the state of a
    position depends on the *equilibrium* states of those before it, as in a recurrent network (a feedback transformer;
    Fan et al. 2020), so that what one block can do in one pass is no bound on what the layer can: it follows a
    state over the whole sequence. `f_t` then depends on `z_1, …, z_{t−1}` alone: exactly one equilibrium exists, plain
    steps reach it after T at the latest, and `by_token` finds it in one pass over the sequence. With `attend="upto"`
    a position attends to itself too, as in the usual block; an equilibrium exists, but nothing makes it the only one.

    >>> import torch, torchimplicit as ti
    >>> layer = ti.nn.EquilibriumTransformer(16, heads=2, span=8, dtype=torch.float64)
    >>> x = torch.randn(4, 12, 16, dtype=torch.float64)
    >>> layer(x).shape
    torch.Size([4, 12, 16])
    >>> bool((layer(x) - layer.by_token(x).value).abs().max() < 1e-5)
    True

    Input and output have shape `(B, T, features)`; each sequence is a problem of its own.

    Args:
        features: d, the size of x and z at each position.
        heads: attention heads, a divisor of `features`.
        span: how many positions back a position looks; its relative positions are learned, so that what is learned at
            one length holds at any other.
        hidden: width of the feed-forward part; None is twice `features`.
        attend: `"past"`, to the positions before, or `"upto"`, to these and itself.
        solver: None is `Picard()` for `"past"`, with steps for the whole length, and `Auto()` for `"upto"`.
        adjoint: None is `Implicit()`, for `"past"` with a Neumann series that is given as many terms as it may need.
        max_steps: None is the solver's default, or T + 1 if that is more and the solver None.
        on_failure: `"warn"`, `"raise"` or `"ignore"`.
        init: as in `FixedPoint`; None starts from zero.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: `heads` is no divisor of `features`; an option is out of range; the input is not `(B, T, features)`.
    """

    cell: CausalCell

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        span: int,
        hidden: int | None = None,
        attend: Attend = "past",
        solver: Method | None = None,
        adjoint: Adjoint | None = None,
        max_steps: int | None = None,
        on_failure: OnFailure = "warn",
        init: Callable[..., PyTree] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: Never,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, _OPTIONS)
        cell = CausalCell(features, heads, span, 2 * features if hidden is None else hidden, attend, device, dtype)
        super().__init__(cell, solver=solver, adjoint=adjoint, max_steps=max_steps, on_failure=on_failure, init=init)

    def solve(self, *inputs: Tensor, trace: bool = False) -> Solution:
        """The equilibrium for `x`, `(B, T, d)`, of all positions at once, with its evidence."""
        (x,) = inputs
        self._check(x)
        solver, adjoint, max_steps = self._how(x)
        solution = fixed_point(
            self.cell,
            self._start(x),
            x,
            solver=solver,
            adjoint=adjoint,
            batch_dims=1,
            max_steps=max_steps,
            on_failure=self.on_failure,
            trace=trace,
        )
        record(self, solution)
        return solution

    def by_token(self, x: Tensor) -> Solution:
        """The same equilibrium, one position after the other, as a sequence is generated.

        Each solve knows the states before its own as far as it looks, so that time and memory grow with T, and not
        with its square. `status` and `steps` are `(B, T)`, `residual` that of each position
        alone; gradients are exact here too.
        """
        self._check(x)
        states, found = [], []
        past = self.cell.keys_values(x[:, :0])
        for t in range(x.shape[1]):
            solution = fixed_point(
                self.cell.token,
                torch.zeros_like(x[:, t]),
                x[:, t],
                past,
                solver=self.solver or (Picard() if self.cell.attend == "past" else None),
                adjoint=self.adjoint,
                batch_dims=1,
                max_steps=self.max_steps,
                on_failure=self.on_failure,
            )
            found.append(solution)
            states.append(solution.value)
            past = torch.cat([past, self.cell.keys_values(solution.value[:, None])], dim=1)[:, -self.cell.span :]
        evidence: dict[str, Any] = {
            name: torch.stack([getattr(s, name) for s in found], dim=1)
            for name in ("status", "converged", "residual", "steps")
        }
        return Solution(
            value=torch.stack(states, dim=1) if states else x,
            **evidence,
            evaluations=sum(s.evaluations for s in found),
        )

    def certificate(self) -> TransformerCertificate:
        """What is known of the equilibria, whatever the weights and the input."""
        past = self.cell.attend == "past"
        return TransformerCertificate(
            exists=True,
            radius=self.cell.features**0.5,
            unique=past,
            steps=1 if past else None,
            source="strictly triangular in time: induction over the positions" if past else "Brouwer 1911",
        )

    def _how(self, x: Tensor) -> tuple[Method | None, Adjoint | None, int | None]:
        """Solver, adjoint and steps of one solve."""
        if self.cell.attend != "past":
            return self.solver, self.adjoint, self.max_steps
        length = x.shape[1]
        max_steps = self.max_steps
        if self.solver is None and max_steps is None:
            max_steps = max(Picard.max_steps, length + 1)
        # The series ends after T plain terms; one in eight is none. Until then its rest may grow.
        terms = Neumann(max_steps=max(500, 2 * length + 24), slowest=0.999, patience=4 + length // 7)
        return self.solver or Picard(), self.adjoint or Implicit(linear_solver=terms), max_steps

    def _check(self, x: Tensor) -> None:
        features = self.cell.features
        if x.ndim != 3 or x.shape[2] != features or not x.shape[1]:
            raise ValueError(
                f"EquilibriumTransformer: the input must be (B, T, {features}), T at least 1, "
                f"but it is {tuple(x.shape)}; add positions or batch dims as needed, and give features= the last one."
            )
