"""Samples that are done leave the batch where the function can be split, and nothing but the cost shows it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

DOUBLE = torch.float64
SOLVERS = {
    "picard": ti.Picard(check_every=4),
    "anderson": ti.Anderson(),
    "broyden": ti.Broyden(),
    "newton": ti.Newton(),
    "newton_krylov": ti.NewtonKrylov(),
    "chord": ti.Chord(),
    "dogleg": ti.Dogleg(),
    "levenberg_marquardt": ti.LevenbergMarquardt(),
    "auto": ti.Auto(),
}
EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


class Rows:
    """A function of explicit args that notes how many rows it is called with."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn
        self.rows: list[int] = []

    def __call__(self, z: Tensor, *args: Tensor) -> Tensor:
        self.rows.append(z.shape[0])
        return self.fn(z, *args)


def _slow_and_quick(batch: int = 40, slow: int = 2, n: int = 3) -> tuple[Tensor, Tensor]:
    """Contraction factors of the samples, `(B, 1)`, most small and a few near 1, and inputs `(B, n)`."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.full((batch, 1), 0.3, dtype=DOUBLE)
    factor[:slow] = 0.97
    return factor, torch.randn(batch, n, generator=generator, dtype=DOUBLE)


@EVERY_SOLVER
def test_results_are_those_of_the_whole_batch(solver: ti.solvers.Method) -> None:
    factor, x = _slow_and_quick()
    split = Rows(lambda z, factor, x: factor * torch.sin(z) + x)
    sol = ti.fixed_point(split, torch.zeros_like(x), factor, x, solver=solver, batch_dims=1)
    whole = Rows(lambda z: factor * torch.sin(z) + x)
    reference = ti.fixed_point(whole, torch.zeros_like(x), solver=solver, batch_dims=1)
    assert set(whole.rows) == {40}
    torch.testing.assert_close(sol.value, reference.value, rtol=1e-12, atol=1e-12)
    assert torch.equal(sol.steps, reference.steps)
    assert torch.equal(sol.status, reference.status)
    if not isinstance(solver, ti.Newton | ti.NewtonKrylov | ti.Dogleg | ti.LevenbergMarquardt | ti.Chord):
        assert min(split.rows) <= 4  # these take steps enough for the quick samples to leave


@pytest.mark.parametrize("samples", [400])
def test_heavy_tailed_batch_costs_a_third_of_the_uncompacted_one(samples: int) -> None:
    """5 % of the samples need ten times the steps; the cost is the rows that the function was called with."""
    factor = torch.full((samples, 1), 0.1, dtype=DOUBLE)
    factor[::20] = 0.8
    x = torch.linspace(0.5, 1.0, samples, dtype=DOUBLE)[:, None]
    split, whole = Rows(lambda z, factor, x: factor * z + x), Rows(lambda z: factor * z + x)
    solver = ti.Picard(rtol=1e-12)
    few = ti.fixed_point(split, torch.zeros_like(x), factor, x, solver=solver, batch_dims=1)
    all_ = ti.fixed_point(whole, torch.zeros_like(x), solver=solver, batch_dims=1)
    quick, slow = all_.steps[1].item(), all_.steps[0].item()
    assert slow >= 9 * quick
    assert torch.equal(few.value, all_.value)
    assert sum(split.rows) <= sum(whole.rows) / 3


def test_parameters_among_the_args_go_along_whole() -> None:
    """W has as many rows as there are samples, and is not indexed by them: that split is refused, not believed."""
    n = batch = 12
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(n, n, generator=generator, dtype=DOUBLE)
    weight *= 0.9 / torch.linalg.matrix_norm(weight, 2)
    x = torch.randn(batch, n, generator=generator, dtype=DOUBLE) * torch.logspace(-6, 0, batch, dtype=DOUBLE)[:, None]

    def fn(z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + x)

    sol = ti.fixed_point(fn, torch.zeros_like(x), x, weight, solver=ti.Picard(rtol=1e-12, atol=1e-9), batch_dims=1)
    alone = [
        ti.fixed_point(
            fn,
            torch.zeros(1, n, dtype=DOUBLE),
            x[i : i + 1],
            weight,
            solver=ti.Picard(rtol=1e-12, atol=1e-9),
            batch_dims=1,
        )
        for i in range(batch)
    ]
    torch.testing.assert_close(sol.value, torch.cat([a.value for a in alone]), rtol=1e-12, atol=1e-12)
    assert sol.steps.tolist() == [int(a.steps) for a in alone]


def test_function_of_the_samples_position_is_not_split() -> None:
    """Its value for a sample changes with the rows around it."""
    factor, x = _slow_and_quick(batch=20)

    def fn(z: Tensor, factor: Tensor, x: Tensor) -> Tensor:
        return factor * torch.sin(z) + x + 0.01 * torch.arange(z.shape[0], dtype=DOUBLE)[:, None]

    sol = ti.fixed_point(fn, torch.zeros_like(x), factor, x, solver=ti.Anderson(), batch_dims=1)
    assert sol.converged.all()
    torch.testing.assert_close(fn(sol.value, factor, x), sol.value, rtol=1e-9, atol=1e-9)


def test_nested_args_and_two_batch_dims_are_split() -> None:
    factor, x = _slow_and_quick(batch=24)
    inputs = {"factor": factor.reshape(4, 6, 1), "x": x.reshape(4, 6, 3)}
    split = Rows(lambda z, inputs: inputs["factor"] * torch.sin(z) + inputs["x"])
    sol = ti.fixed_point(split, torch.zeros(4, 6, 3, dtype=DOUBLE), inputs, solver=ti.Anderson(), batch_dims=2)
    reference = ti.fixed_point(
        lambda z: factor * torch.sin(z) + x, torch.zeros_like(x), solver=ti.Anderson(), batch_dims=1
    )
    torch.testing.assert_close(sol.value.reshape(24, 3), reference.value, rtol=1e-12, atol=1e-12)
    assert min(split.rows) <= 4


def test_gradients_are_those_of_the_whole_batch() -> None:
    factor, x = _slow_and_quick()
    x.requires_grad_()
    sol = ti.fixed_point(lambda z, factor, x: factor * torch.sin(z) + x, torch.zeros_like(x), factor, x, batch_dims=1)
    (gradient,) = torch.autograd.grad(sol.value.square().sum(), x)
    z = sol.value.detach()
    torch.testing.assert_close(gradient, 2 * z / (1 - factor * torch.cos(z)), rtol=1e-8, atol=1e-8)


def test_later_stage_works_on_the_samples_that_are_left() -> None:
    """Two samples of forty do not contract: Newton's method is theirs alone."""
    factor, x = _slow_and_quick()
    factor[:2] = -6.0
    split = Rows(lambda z, factor, x: factor * torch.sin(z) + x)
    sol = ti.fixed_point(split, torch.zeros_like(x), factor, x, batch_dims=1)
    assert sol.converged.all()
    value = factor * torch.sin(sol.value) + x
    torch.testing.assert_close(value, sol.value, rtol=1e-9, atol=1e-9)
    # The start of the second stage, and the evaluation that the gradient hangs on.
    assert split.rows[14:].count(40) <= 3


def test_function_may_forbid_the_split() -> None:
    factor, x = _slow_and_quick()
    whole = Rows(lambda z, factor, x: factor * torch.sin(z) + x)
    whole.samplewise = False  # pyright: ignore[reportAttributeAccessIssue]
    ti.fixed_point(whole, torch.zeros_like(x), factor, x, solver=ti.Anderson(), batch_dims=1)
    assert set(whole.rows) == {40}
