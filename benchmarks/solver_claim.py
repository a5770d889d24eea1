"""What a method says of its result, and what is made of it: the same test for all, on a residual computed here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.problems import Problem

TOLERANCE = 1e-8
"""A problem is solved where `max|F|` is at most this, whatever the method says."""

FALSE_ABOVE = 1e-4
"""A method that claims success above this, or where there is no root at all, is wrong."""


@dataclass(frozen=True)
class Claim:
    """A point, whether the method calls it a root, and its evaluations of F where it counts them."""

    point: np.ndarray
    success: bool
    evaluations: int | None = None


@dataclass(frozen=True)
class Method:
    """A named way to solve a problem; `family` is the distribution that provides it."""

    name: str
    family: str
    solve: Callable[[Problem], Claim]


@dataclass(frozen=True)
class Attempt:
    """One method on one problem.

    Attributes:
        method: its name.
        problem: its name.
        outcome: see `OUTCOMES`.
        claimed: whether the method claimed success; None where it gave no answer.
        residual: `max|F|` at the returned point in float64; None where it is not finite or there is none.
        evaluations: of F, where the method counts them.
        seconds: wall clock, compilation included.
        detail: the error, for the outcomes that have one.
    """

    method: str
    problem: str
    outcome: str
    claimed: bool | None = None
    residual: float | None = None
    evaluations: int | None = None
    seconds: float | None = None
    detail: str = ""


OUTCOMES = {
    "solved": "the residual is within the tolerance at a finite point, and there is a root",
    "loose": "success was claimed for a residual above the tolerance, though not by so much as to be false",
    "reported": "not solved, and the method says so",
    "false success": "success was claimed for a residual above 1e-4, or where there is no root",
    "raised": "an exception",
    "timeout": "no answer within the time limit",
    "unavailable": "the method cannot be imported here",
}


def judge(problem: Problem, claim: Claim) -> dict[str, Any]:
    """Compute the residual and name the outcome."""
    residual = largest_residual(problem, claim.point)
    if problem.has_root and residual is not None and residual <= TOLERANCE:
        outcome = "solved"
    elif not claim.success:
        outcome = "reported"
    elif problem.has_root and residual is not None and residual <= FALSE_ABOVE:
        outcome = "loose"
    else:
        outcome = "false success"
    return {"outcome": outcome, "claimed": claim.success, "residual": residual, "evaluations": claim.evaluations}


def largest_residual(problem: Problem, point: np.ndarray) -> float | None:
    """Compute `max|F|` in float64 with torch; None where the point or F is not finite."""
    z = torch.as_tensor(np.asarray(point, dtype=np.float64)).reshape(-1)
    if z.numel() != problem.n or not bool(z.isfinite().all()):
        return None
    residual = float(problem.fn(z, torch).abs().max())
    return residual if np.isfinite(residual) else None
