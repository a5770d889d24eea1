"""A contender: a way to solve a problem forward and backward at given tolerances."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchimplicit.experiments.bench.problems import Problem
from torchimplicit.experiments.bench.reference import Accuracy


@dataclass(frozen=True)
class Counts:
    """Evaluations of the cell and products with its transposed Jacobian, each for the whole batch; None if unknown."""

    forward: int
    backward: int | None


Pass = tuple[Tensor, Tensor, Tensor]
"""The solution, and the gradients in the weight and in x."""


@dataclass(frozen=True)
class Runner:
    """A contender that is ready to run.

    Attributes:
        forward: solves.
        solution: solves, and hands over what was found.
        both: solves and differentiates; this is what is timed.
        found: the same, and hands over what was found.
        count: the same, and says what it took.
        settings: what it runs with, for the record.
    """

    forward: Callable[[], object]
    solution: Callable[[], Tensor]
    both: Callable[[], object]
    found: Callable[[], Pass]
    count: Callable[[], Counts]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """A family of runners, one for each pair of tolerances.

    Attributes:
        label: names the method.
        make: the runner for a forward and a backward tolerance; with the counts of a former run it may size its
            buffers, as a careful user would.
    """

    label: str
    make: Callable[[float, float, Counts | None], Runner]


@dataclass(frozen=True)
class Trial:
    """What a contender did at one pair of tolerances; seconds are the quickest of two runs."""

    label: str
    forward_tolerance: float
    backward_tolerance: float
    accuracy: Accuracy
    counts: Counts
    forward_seconds: float
    backward_seconds: float
    settings: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_seconds + self.backward_seconds

    def told(self) -> dict[str, Any]:
        """Everything, for the record."""
        return self.point() | {
            "settings": self.settings,
            "weight_gradient_error": self.accuracy.weight_error,
            "input_gradient_error": self.accuracy.input_error,
        }

    def point(self) -> dict[str, Any]:
        """What a plot of time against residual needs."""
        return {
            "method": self.label,
            "forward_tolerance": self.forward_tolerance,
            "backward_tolerance": self.backward_tolerance,
            "residual": self.accuracy.residual,
            "gradient_error": self.accuracy.gradient_error,
            "evaluations_forward": self.counts.forward,
            "products_backward": self.counts.backward,
            "seconds_forward": self.forward_seconds,
            "seconds_backward": self.backward_seconds,
        }


def differentiate(problem: Problem, solve: Callable[[], Tensor]) -> Pass:
    """Solve, then take the gradients of `⟨cotangent, z*⟩` in the weight and in x."""
    z = solve()
    weight, x = torch.autograd.grad(z, (problem.cell.weight, problem.x), problem.cotangent)
    return z.detach(), weight, x


def torch_runner(
    problem: Problem, solve: Callable[[], Tensor], count: Callable[[], Counts], settings: dict[str, Any]
) -> Runner:
    """A contender that autograd differentiates: `solve` returns z* with its graph."""

    def both() -> Pass:
        return differentiate(problem, solve)

    return Runner(solve, lambda: solve().detach(), both, both, count, settings)
