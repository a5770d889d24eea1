"""The contract of a nonlinear solver: `init` and `step`; the loop, convergence and failure live elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from .._evaluation import Evaluation
from .._norms import NORMS, Norm
from .._options import Options
from .._problem import Problem
from ..linear import Inverse

State = TypeVar("State")


@dataclass(slots=True, eq=False, repr=False)
class Step(Generic[State]):
    """What a step hands back to the loop.

    Attributes:
        z: the new iterate `(B, n)`; whatever is cheapest where a sample is not active.
        evaluation: fn evaluated at `z`.
        state: the solver's own state.
        failure: `(B,)`, a failure `Status` per sample or −1; None when no sample failed.
        look: whether to look at the residuals now, whatever `check_every` says: the next step is dear.
        count: steps taken.
    """

    z: Tensor
    evaluation: Evaluation
    state: State
    failure: Tensor | None = None
    look: bool = False
    count: int = 1


@dataclass(frozen=True, eq=False, repr=False)
class Stage:
    """A solver's turn in a solve: the samples that it leaves unsolved go on to the next stage.

    Attributes:
        solver: who steps.
        max_steps: steps at most.
        patience: steps between two looks at a sample's progress; None is the solver's own.
        progress: a sample whose best residual did not fall below this factor of the last look's has stalled.
        start: where the samples left by the stage before begin: at their best iterate, or at z0 again.
        spread: how far from there, relative to the size of z0, in a direction that is the same for every sample.
    """

    solver: Solver[Any]
    max_steps: int
    patience: int | None = None
    progress: float | None = None
    start: Literal["best", "z0"] = "best"
    spread: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class Method(Options, ABC):
    """What `solver=` takes: a frozen record of hyper-parameters that holds no state.

    A sample has converged when `‖r(z)‖ ≤ atol + rtol·scale` with `r` evaluated at the returned z. The scale is
    `‖fn(z)‖` for a fixed point and `‖fn(z0)‖` for a root. For a fixed point that did not pass at z0, the residual must
    also have fallen, to half of the largest on the way or to `atol`: far enough out, `z ← z + c` would pass otherwise.

    Args:
        rtol: relative tolerance; None is `ε^(2/3)` of the dtype (4e-11 in float64, 2e-5 in float32) for a fixed point
            and `ε^(3/4)` (2e-12, 6e-6) for the others. Never effective below `4ε`, which is what the dtype can reach.
            Where fn computes in float16 or bfloat16, under autocast too, both are `ε` (1e-3, 8e-3) for a fixed point.
        atol: absolute tolerance in the units of the residual; None is `ε·‖r(z0)‖`, which has no units to get wrong.
        norm: `"rms"`, `"two"`, `"max"` or a callable `(B, n) -> (B,)`.
        check_every: steps between two looks at the residuals; larger values save time where fn is cheap, and
            synchronisations on a GPU. Newton looks after every Newton step in any case.
        mixed_precision: a fixed point in float32 is first solved roughly, to `2⁻⁸`, with fn under autocast to bfloat16;
            Newton steps follow, whose residuals are computed in full and whose linear systems are solved by Neumann's
            series with fn's derivative under autocast: an iterative refinement (Higham & Mary 2022, "Mixed precision
            algorithms in numerical linear algebra", §5). All but a few evaluations are coarse, and what is returned
            is as good as without, judged in full precision; what does not converge so is finished in full. It pays
            where fn spends its time in large products, on CPUs with bfloat16 units (AVX-512 BF16, AMX) and on CUDA
            devices that have them; elsewhere, and under the caller's own autocast, nothing changes.
    """

    _: KW_ONLY
    rtol: float | None = None
    atol: float | None = None
    norm: Norm = "rms"
    check_every: int = 1
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        self._require("mixed_precision", isinstance(self.mixed_precision, bool), "True or False")
        self._require_number("rtol", 0.0, optional=True)
        self._require_number("atol", 0.0, optional=True)
        self._require_count("check_every", 1)
        if not callable(self.norm):
            self._require_choice("norm", NORMS)

    @abstractmethod
    def stages(self, problem: Problem) -> tuple[Stage, ...]:
        """Who steps, one after the other."""


@dataclass(frozen=True, eq=False, repr=False)
class Solver(Method, Generic[State]):
    """Base class of the solvers that step: `init` and `step`."""

    max_steps: ClassVar[int]
    """Steps taken at most unless the call says otherwise."""
    patience: ClassVar[int]
    """Steps without a new best residual after which a sample has stalled."""
    progress: ClassVar[float] = 1 - 1e-5
    """Factor below which the best residual must have fallen in that time."""

    def stages(self, problem: Problem) -> tuple[Stage, ...]:
        """This solver alone."""
        return (Stage(self, self.max_steps),)

    @abstractmethod
    def init(self, problem: Problem, z: Tensor, evaluation: Evaluation) -> State:
        """The state before the first step: None, or a dataclass whose tensors have the batch first."""

    @abstractmethod
    def step(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: State, active: Tensor | None
    ) -> Step[State]:
        """Move the active samples by one step and evaluate fn there.

        Args:
            problem: the equation.
            z: the iterate, `(B, n)`.
            evaluation: fn at `z`.
            state: of the step before.
            active: `(B,)` bool, samples still running; None if all are.
        """

    def steps(
        self, problem: Problem, z: Tensor, evaluation: Evaluation, state: State, active: Tensor | None, count: int
    ) -> Step[State]:
        """Up to `count` steps, between which nobody looks; a solver that gains nothing by that takes one."""
        return self.step(problem, z, evaluation, state, active)

    def inverse(self, state: State) -> Inverse | None:
        """What the solver knows of `A⁻¹` where it is; None where it knows nothing, or not of every sample."""
        return None

    def select(self, state: State, samples: Tensor) -> State:
        """The state of some samples alone, by their indices.

        Every tensor in it has the batch first; a state, or a part of one, that has a method `select` of its own is
        asked for it.
        """
        if state is None:
            return state
        if hasattr(state, "select"):
            return state.select(samples)  # pyright: ignore[reportAttributeAccessIssue]
        parts = {}
        for f in fields(state):  # pyright: ignore[reportArgumentType]
            if not f.init:
                continue
            part = getattr(state, f.name)
            if isinstance(part, Tensor):
                part = part.index_select(0, samples)
            elif hasattr(part, "select"):
                part = part.select(samples)
            parts[f.name] = part
        return type(state)(**parts)


def hold(active: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the active samples and `old` for the others, `(B, n)`."""
    return new if active is None else torch.where(active[:, None], new, old)
