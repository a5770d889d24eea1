"""The adjoint `Unroll`: differentiating the steps themselves, for comparison and for maps that are not solved."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ._adjoint import Adjoint
from ._isolate import evaluate_without, inert
from ._problem import Problem
from ._solution import Status
from ._system import forward_levels, transformed
from .solvers import Method, Picard


@dataclass(frozen=True, eq=False, repr=False)
class Unroll(Adjoint):
    """Gradients through plain steps `z ← z + damping·r(z)`, by backpropagation; memory grows with the steps.

    The gradient is that of what the steps compute, to every order and in every mode, whether they have converged or
    not; on a contraction that of z* at the rate at which z converges.

    Args:
        steps: None differentiates the whole path of `Picard` from z0, which must be the solver. A number takes so many
            more plain steps from the solution, whichever solver found it, and differentiates these alone (truncated
            backpropagation; Shaban et al. 2019).
        checkpoint: keep the states alone and evaluate each step again in the backward pass (Chen et al. 2016).
    """

    steps: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        if self.steps is not None:
            self._require_count("steps", 1)
        self._require("checkpoint", isinstance(self.checkpoint, bool), "True or False")

    def check(self, method: Method) -> None:
        """Raise `ValueError` unless the solver's steps are plain ones, where it is these that are differentiated."""
        if self.steps is None and (not isinstance(method, Picard) or method.damping_patience is not None):
            raise ValueError(
                f"adjoint=Unroll() differentiates plain steps, but solver={type(method).__name__}(...) takes others; "
                "use solver=torchimplicit.Picard(), or Unroll(steps=k) for k plain steps from the solution."
            )


def unrolled(
    problem: Problem, method: Method, adjoint: Unroll, start: Tensor, z: Tensor, status: Tensor, steps: Tensor
) -> Tensor:
    """`z*` `(B, n)` with the graph of the steps that lead there.

    Args:
        problem: the equation.
        method: the solver.
        adjoint: which steps.
        start: z0, `(B, n)`.
        z: the solution, without a graph.
        status: how each sample ended, `(B,)`.
        steps: of each sample, `(B,)`.

    Raises:
        RuntimeError: the number of steps is not known, inside `vmap`; or forward mode asks for a path cut short.
    """
    if adjoint.steps is not None and forward_levels():
        raise RuntimeError(
            "adjoint=Unroll(steps=k) cuts derivatives off, which forward mode cannot; use torchimplicit.Implicit()."
        )
    damping = method.damping if isinstance(method, Picard) else 1.0
    if adjoint.steps is None:
        try:
            count = int(steps.max()) if steps.numel() else 0
        except RuntimeError as error:
            raise RuntimeError(
                "adjoint=Unroll(): how many steps there are differs inside torch.func.vmap; use Unroll(steps=k)."
            ) from error
        state = start.detach()
    else:
        count, state = adjoint.steps, z.detach()
    dead = status >= int(Status.DIVERGED)
    step = problem.output
    inputs: list[Tensor] = []
    with torch.enable_grad():
        if not transformed() and forward_ad._current_level < 0 and bool(dead.any()):
            # What is NaN or infinite would be so in the gradients of all: healthy samples stand in for the failed ones.
            output, _, inputs, tape, donors = evaluate_without(problem, z, dead)
            if output is None or donors is None:
                return inert(z, inputs)
            state, tensors = donors.replace(state, tape.inputs)
            step = lambda state: problem.packed(tape.replay(problem.layout.unpack(state), tensors))  # noqa: E731
        for k in range(count):
            value = checkpoint(step, state, use_reentrant=False) if adjoint.checkpoint else step(state)
            residual = value - state if problem.kind == "fixed_point" else -value  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
            new = value if damping == 1.0 and problem.kind == "fixed_point" else state + damping * residual
            state = new if adjoint.steps is not None else torch.where((k < steps)[:, None], new, state)
        # Where the iteration failed there is no gradient, and the value is the best that it found.
        return torch.where(dead[:, None], z, state)
