"""A sample's answer is its own: alone, in any batch and place, beside a poisoned one, with and without compaction."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchimplicit as ti

DOUBLE = torch.float64
SOLVERS = {
    "auto": ti.Auto(),
    "newton": ti.Newton(),
    "newton_krylov": ti.NewtonKrylov(),
    "newton_bicgstab": ti.NewtonKrylov(linear_solver=ti.BiCGStab()),
    "chord": ti.Chord(),
    "dogleg": ti.Dogleg(),
    "levenberg_marquardt": ti.LevenbergMarquardt(),
    "levenberg_marquardt_cg": ti.LevenbergMarquardt(linear_solver="cg"),
    "broyden": ti.Broyden(),
    "anderson": ti.Anderson(mixing=0.2),
    "picard": ti.Picard(damping=0.2),
}
N = 4


def _weight() -> Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) / N**0.5


def _residual(z: Tensor, a: Tensor) -> Tensor:
    """Monotone: exactly one root for every a. Without a matrix product, whose rounding depends on the batch's size."""
    return z + 0.3 * torch.sin((z[:, None] * _weight()).sum(dim=2)) + 0.1 * z**3 - a


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_root_does_not_depend_on_the_batch(solver: ti.solvers.Method, data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    a = torch.randn(size, N, generator=generator, dtype=DOUBLE)
    a *= 10 ** (2 * torch.rand(size, 1, generator=generator, dtype=DOUBLE) - 1)
    poisoned = data.draw(st.one_of(st.none(), st.integers(0, size - 1)))
    if poisoned is not None:
        a[poisoned] = torch.nan
    order = torch.randperm(size, generator=generator)

    solver = type(solver)(**{**vars(solver), "rtol": 1e-13})
    # At this tolerance the last differences are part rounding, which is not the same in batches of different size.
    rounds = isinstance(solver, ti.Anderson | ti.Broyden)

    def solve(a: Tensor, split: bool) -> ti.Solution:
        z0 = torch.zeros_like(a)
        if split:
            return ti.root(_residual, z0, a, solver=solver, batch_dims=1, on_failure="ignore")
        return ti.root(lambda z: _residual(z, a), z0, solver=solver, batch_dims=1, on_failure="ignore")

    whole, split, shuffled = solve(a, False), solve(a, True), solve(a[order], True)
    for i in range(size):
        alone = solve(a[i : i + 1], False)
        place = int((order == i).nonzero())
        for sol, row in ((whole, i), (split, i), (shuffled, place)):
            assert sol.status[row] == alone.status[0]
            assert rounds or abs(int(sol.steps[row] - alone.steps[0])) <= 1
            torch.testing.assert_close(sol.value[row], alone.value[0], rtol=1e-12, atol=1e-12)
        if i == poisoned:
            assert alone.status.item() == ti.Status.NONFINITE


def test_rest_from_acceleration_is_a_samples_own() -> None:
    """Maps that rotate gain nothing by acceleration, symmetric ones much: side by side as each alone."""
    n, generator = 12, torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0]
    turning = [0.7 * torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0] for _ in range(3)]
    fixed = [(basis * torch.linspace(-g, g, n, dtype=DOUBLE)) @ basis.T for g in (0.5, 0.8, 0.9)]
    matrices = torch.stack([m for pair in zip(turning, fixed, strict=True) for m in pair])
    x = torch.randn(len(matrices), n, generator=generator, dtype=DOUBLE)

    def solve(rows: slice) -> ti.Solution:
        matrix, b = matrices[rows], x[rows]
        return ti.fixed_point(
            lambda z: torch.einsum("bij,bj->bi", matrix, z) + b,
            torch.zeros_like(b),
            solver=ti.Anderson(adaptive=True, rtol=1e-14),
            batch_dims=1,
            trace=True,
        )

    together = solve(slice(None))
    assert together.trace is not None
    for i in range(len(matrices)):
        alone = solve(slice(i, i + 1))
        assert alone.trace is not None
        early = slice(0, min(24, int(alone.steps)))  # later rounding has grown
        torch.testing.assert_close(together.trace[early, i], alone.trace[early, 0], rtol=1e-12, atol=0)
        torch.testing.assert_close(together.value[i], alone.value[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.6, 0.9])
def test_rest_is_the_same_for_a_root_and_a_fixed_point(gamma: float) -> None:
    """Plain steps in one go, as a fixed point allows, and one by one: first a rotation, which gains nothing."""
    n, generator = 12, torch.Generator().manual_seed(1)
    matrix = gamma * torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0]
    b = torch.randn(2, n, generator=generator, dtype=DOUBLE)
    tolerance = {"rtol": 0.0, "atol": 1e-9}

    def fn(z: Tensor) -> Tensor:
        return z @ matrix + b

    zeros = torch.zeros_like(b)
    solver = ti.Anderson(adaptive=True, check_every=4, **tolerance)
    one = ti.fixed_point(fn, zeros, solver=solver, batch_dims=1)
    other = ti.root(lambda z: z - fn(z), zeros, solver=solver, batch_dims=1)
    damped = ti.fixed_point(fn, zeros, solver=ti.Anderson(adaptive=True, mixing=0.999, **tolerance), batch_dims=1)
    assert one.converged.all()
    assert damped.converged.all()
    assert torch.equal(one.steps, other.steps)
    torch.testing.assert_close(one.value, other.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(damped.value, one.value, rtol=1e-7, atol=1e-7)
    always = ti.fixed_point(fn, zeros, solver=ti.Anderson(**tolerance), batch_dims=1)
    assert int(one.steps.max()) <= 1.3 * int(always.steps.max()) + 4


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_adaptive_history_of_mixed_batches_is_each_samples_own(data: st.DataObject) -> None:
    """Rotations, symmetric maps and quick ones in any mixture: who rests when is seen in nobody else's steps."""
    n, size = 6, data.draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    matrices = []
    for _ in range(size):
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=DOUBLE))[0]
        gamma = data.draw(st.sampled_from([0.05, 0.2, 0.5, 0.8, 0.95]))
        straight = (basis * torch.linspace(-gamma, gamma, n, dtype=DOUBLE)) @ basis.T
        matrices.append(gamma * basis if data.draw(st.booleans()) else straight)
    matrix, x = torch.stack(matrices), torch.randn(size, n, generator=generator, dtype=DOUBLE)
    solver = ti.Anderson(adaptive=True, rtol=1e-13, check_every=data.draw(st.integers(1, 3)))

    def fn(z: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
        return torch.tanh((z[:, None] * matrix).sum(dim=2)) + x

    def solve(rows: slice, split: bool) -> ti.Solution:
        m, b = matrix[rows], x[rows]
        if split:
            return ti.fixed_point(fn, torch.zeros_like(b), m, b, solver=solver, batch_dims=1)
        return ti.fixed_point(lambda z: fn(z, m, b), torch.zeros_like(b), solver=solver, batch_dims=1, trace=True)

    whole, parts = solve(slice(None), False), solve(slice(None), True)
    for i in range(size):
        alone = solve(slice(i, i + 1), False)
        assert whole.trace is not None
        assert alone.trace is not None
        early = slice(0, min(16, int(alone.steps), int(whole.steps[i])))
        torch.testing.assert_close(whole.trace[early, i], alone.trace[early, 0], rtol=1e-6, atol=1e-13)
        for sol in (whole, parts):
            assert sol.converged[i]
            torch.testing.assert_close(sol.value[i], alone.value[0], rtol=1e-11, atol=1e-11)
