"""Broyden's limited memory: an inverse at every step, the one that the last pairs make, at a known cost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti
from torchimplicit._evaluation import Evaluation
from torchimplicit._problem import Problem

DOUBLE = torch.float64
HISTORY = 3
UPDATES = pytest.mark.parametrize("update", ["bad", "good"])


class Steps:
    """Every step of Broyden's methods in a solve: the iterates, the residuals there, and H after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.s: list[Tensor] = []
        self.y: list[Tensor] = []
        self.inverse: list[Tensor] = []
        step = ti.Broyden.step

        def spy(solver: ti.Broyden, problem: Any, z: Tensor, evaluation: Any, state: Any, active: Any) -> Any:
            taken = step(solver, problem, z, evaluation, state, active)
            self.s.append(taken.z - z)
            self.y.append(evaluation.residual - taken.evaluation.residual)
            columns = [e.expand_as(z).contiguous() for e in torch.eye(z.shape[1], dtype=z.dtype)]
            inverse = solver.inverse(state)
            self.inverse.append(torch.stack([inverse.apply(e, False) for e in columns], dim=2))
            return taken

        monkeypatch.setattr(ti.Broyden, "step", spy)


def _weight(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, n, generator=generator, dtype=DOUBLE) * 0.8 / n**0.5
    return weight, torch.randn(4, n, generator=generator, dtype=DOUBLE)


def _map(z: Tensor) -> Tensor:
    weight, x = _weight()
    return torch.tanh(z @ weight) + x


@UPDATES
@pytest.mark.parametrize("kind", ["fixed_point", "root"])
def test_the_newest_secant_equation_holds_at_every_step(
    update: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    solver = ti.Broyden(history=HISTORY, update=update, rtol=1e-6)
    z0 = torch.zeros_like(_weight()[1])
    solve: Callable[..., ti.Solution] = ti.fixed_point if kind == "fixed_point" else ti.root
    fn = _map if kind == "fixed_point" else lambda z: 3.0 * (z - _map(z))
    assert solve(fn, z0, solver=solver, batch_dims=1).converged.all()
    assert len(steps.s) > 2 * HISTORY + 1
    for s, y, inverse in zip(steps.s, steps.y, steps.inverse, strict=True):
        moved = s.abs().amax(1) > 0
        found = torch.einsum("bij,bj->bi", inverse, y)
        assert moved.any()
        assert ((found - s).norm(dim=1) <= 1e-7 * s.norm(dim=1))[moved].all()


@UPDATES
def test_the_inverse_is_that_of_the_last_pairs_whatever_was_forgotten(
    update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broyden's formula, dense, applied to the last pairs from the identity on."""
    steps = Steps(monkeypatch)
    solver = ti.Broyden(history=HISTORY, update=update, rtol=1e-14, atol=1e-14)  # pyright: ignore[reportArgumentType]
    z0 = torch.zeros_like(_weight()[1])
    ti.fixed_point(_map, z0, solver=solver, batch_dims=1, max_steps=3 * HISTORY + 1, on_failure="ignore")
    assert len(steps.s) == 3 * HISTORY + 1
    for k in range(len(steps.s)):
        for b in range(len(z0)):
            expected = torch.eye(z0.shape[1], dtype=DOUBLE)
            for s, y in list(zip(steps.s, steps.y, strict=True))[max(0, k + 1 - HISTORY) : k + 1]:
                left = s[b] - expected @ y[b]
                right = y[b] if update == "bad" else expected.T @ s[b]
                expected = expected + torch.outer(left, right) / (right @ y[b])
            torch.testing.assert_close(steps.inverse[k][b], expected, rtol=1e-6, atol=1e-6)


@UPDATES
def test_a_sample_whose_step_is_taken_back_begins_anew_and_alone(update: Any) -> None:
    """Steep flanks throw some samples off; the others take the steps that they take by themselves."""
    generator = torch.Generator().manual_seed(3)
    x = 3.0 * torch.randn(12, 5, generator=generator, dtype=DOUBLE)
    weight = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=DOUBLE))[0]

    def solve(x: Tensor) -> ti.Solution:
        return ti.fixed_point(
            lambda z: 0.9 * torch.tanh(4.0 * z @ weight) + x,
            torch.zeros_like(x),
            solver=ti.Broyden(history=HISTORY, update=update),
            batch_dims=1,
            trace=True,
        )

    whole = solve(x)
    assert whole.converged.all()
    assert whole.trace is not None
    # A step taken back repeats its residual.
    back = (whole.trace[1:] == whole.trace[:-1]) & (torch.arange(1, len(whole.trace))[:, None] < whole.steps)
    assert 0 < int(back.any(dim=0).sum()) < len(x)
    for i in range(len(x)):
        alone = solve(x[i : i + 1])
        assert abs(int(alone.steps) - int(whole.steps[i])) <= 1  # rounding differs with the size of the batch
        torch.testing.assert_close(alone.value[0], whole.value[i], rtol=1e-9, atol=1e-9)


class Operations(TorchDispatchMode):
    """Counts the operations, views included, while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.count = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.open
        return func(*args, **(kwargs or {}))


@UPDATES
def test_a_step_takes_fourteen_operations_beside_fn(update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    operations = Operations()
    step, evaluate = ti.Broyden.step, Problem.evaluate

    def counted(*args: Any) -> Any:
        operations.open, operations.count = True, 0
        taken = step(*args)
        operations.open = False
        counts.append(operations.count)
        return taken

    def aside(problem: Problem, z: Tensor) -> Evaluation:
        operations.open = False
        found = evaluate(problem, z)
        _ = found.residual
        operations.open = True
        return found

    generator = torch.Generator().manual_seed(0)
    rotation = 0.9 * torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    x = torch.randn(3, 40, generator=generator)
    monkeypatch.setattr(ti.Broyden, "step", counted)
    with monkeypatch.context() as patch, torch.no_grad(), operations:
        patch.setattr(Problem, "evaluate", aside)
        solver = ti.Broyden(update=update)
        ti.fixed_point(
            lambda z: z @ rotation + x,
            torch.zeros_like(x),
            solver=solver,
            batch_dims=1,
            max_steps=60,
            on_failure="ignore",
        )
    assert len(counts) == 60
    assert max(counts[2 * solver.history :]) <= 14
