"""How many operations of torch an iteration takes beside the cell's own; a count, so the same on every machine."""

# The peers are an extra of their own, and need not be there for the types to be checked.
# pyright: reportMissingImports=false

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti
from torchimplicit.solvers import Solver

BATCH, N = 20, 64
SOLVERS: dict[str, Solver[Any]] = {"picard": ti.Picard(), "anderson": ti.Anderson(), "broyden": ti.Broyden()}
FIRST, LAST = 40, 80
"""The window of steps that is counted: histories are full, and nothing has converged."""


class _Count(TorchDispatchMode):
    """Counts every operation that reaches the dispatcher below autograd, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def slow_map(seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A map of one operation that contracts slowly, and a start `(B, n)`: `z ↦ z (0.999 Q) + b` with Q orthogonal.

    Its Jacobian's eigenvalues are spread over a circle, where a short history gains little on them.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(N, N, generator=generator, dtype=torch.float64)
    W = 0.999 * torch.linalg.qr(matrix).Q
    b = torch.randn(BATCH, N, generator=generator, dtype=torch.float64)
    return lambda z: torch.addmm(b, z, W), torch.zeros_like(b)


@torch.no_grad()
def operations_per_step(solve: Callable[[int], object]) -> Counter[str]:
    """Operations per step beside the one of the map; `solve` takes the number of steps and must take them all."""
    counts = []
    for steps in (FIRST, LAST):
        with _Count() as count:
            solve(steps)
        counts.append(count.counts)
    early, late = counts
    per_step = Counter({name: (late[name] - early[name]) / (LAST - FIRST) for name in late})
    per_step["aten.addmm.default"] -= 1
    return Counter({name: number for name, number in per_step.items() if number})


def ours(name: str, seed: int) -> Counter[str]:
    """Of a solver of ours, by name, with its default options.

    Raises:
        RuntimeError: a sample did not take all the steps.
    """
    f, start = slow_map(seed)

    def solve(steps: int) -> None:
        found = ti.fixed_point(f, start, solver=SOLVERS[name], batch_dims=1, max_steps=steps, on_failure="ignore")
        if not bool((found.steps == steps).all()):
            raise RuntimeError(f"{name}: a sample ended after {int(found.steps.min())} of {steps} steps")

    return operations_per_step(solve)


def torchdeq(name: str, seed: int) -> Counter[str]:
    """Of TorchDEQ's solver."""
    from torchdeq.solver import get_solver

    f, start = slow_map(seed)
    solver = get_solver({"picard": "fixed_point_iter"}.get(name, name))
    return operations_per_step(lambda steps: solver(f, start, max_iter=steps, tol=0.0))
