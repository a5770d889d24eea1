"""`minimize` and `least_squares`: minima, gradients by closed forms and finite differences, failures, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

DOUBLE = torch.float64
MINIMISERS = {"auto": ti.Auto(), "lbfgs": ti.LBFGS(), "newton_cg": ti.NewtonCG()}
SQUARES = {
    "auto": ti.Auto(),
    "levenberg_marquardt": ti.LevenbergMarquardt(),
    "levenberg_marquardt_cg": ti.LevenbergMarquardt(linear_solver="cg"),
    "dogleg": ti.Dogleg(),
    "lbfgs": ti.LBFGS(),
    "newton_cg": ti.NewtonCG(),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def rosenbrock(z: Tensor) -> Tensor:
    return (100 * (z[..., 1:] - z[..., :-1] ** 2) ** 2 + (1 - z[..., :-1]) ** 2).sum(-1)


@pytest.mark.parametrize("solver", MINIMISERS.values(), ids=MINIMISERS.keys())
def test_rosenbrock_from_many_starts(solver: ti.solvers.Method) -> None:
    sol = ti.minimize(rosenbrock, normal(8, 2), solver=solver, batch_dims=1)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, torch.ones(8, 2, dtype=DOUBLE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", MINIMISERS.values(), ids=MINIMISERS.keys())
def test_a_saddle_does_not_attract(solver: ti.solvers.Method) -> None:
    """φ = x⁴ − x² + y²: a saddle at 0, minima at x = ±1/√2; the start is almost on the saddle's stable direction."""
    sol = ti.minimize(
        lambda z: z[..., 0] ** 4 - z[..., 0] ** 2 + z[..., 1] ** 2,
        torch.tensor([[1e-3, 1.0], [-1e-3, -2.0]], dtype=DOUBLE),
        solver=solver,
        batch_dims=1,
    )
    assert sol.converged.all()
    torch.testing.assert_close(sol.value[:, 0], torch.tensor([1.0, -1.0], dtype=DOUBLE) / 2**0.5, rtol=0, atol=1e-8)


def test_ridge_regression_has_the_gradient_of_its_closed_form() -> None:
    A, b = normal(12, 4), normal(12, seed=1)
    strength = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    fitted = ti.minimize(
        lambda w: ((A @ w - b) ** 2).sum() + strength * (w * w).sum(),
        torch.zeros(4, dtype=DOUBLE),
        adjoint=ti.Implicit(rtol=1e-13),
    ).value
    closed = torch.linalg.solve(A.T @ A + strength * torch.eye(4, dtype=DOUBLE), A.T @ b)
    torch.testing.assert_close(fitted, closed, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad((w * normal(4, seed=2)).sum(), strength)[0] for w in (fitted, closed))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", SQUARES.values(), ids=SQUARES.keys())
def test_decay_rates_are_found_and_differentiated_through_noisy_data(solver: ti.solvers.Method) -> None:
    """The residual at the minimum is not zero: the gradient needs the curvature that Gauss and Newton leave out."""
    t = torch.linspace(0, 2, 20, dtype=DOUBLE)
    noise = 0.05 * normal(2, 20)
    data = (torch.tensor([[1.5], [0.7]], dtype=DOUBLE) * torch.exp(-1.3 * t) + noise).requires_grad_()
    z0 = torch.tensor([[1.0, 1.0], [3.0, 0.1]], dtype=DOUBLE)
    exact: dict[str, Any] = {"rtol": 1e-13} if not isinstance(solver, ti.Auto) else {"rtol": 1e-12}

    def fit(data: Tensor) -> Tensor:
        return ti.least_squares(
            lambda z, data: z[:, :1] * torch.exp(-z[:, 1:] * t) - data,
            z0,
            data,
            solver=type(solver)(**{**vars(solver), **exact}),
            adjoint=ti.Implicit(rtol=1e-13),
            batch_dims=1,
            on_failure="ignore",  # some of these end a few rounding units above 1e-13
        ).value

    value = fit(data)
    residuals = value[:, :1] * torch.exp(-value[:, 1:] * t) - data
    assert residuals.square().sum().item() < 1.2 * noise.square().sum().item()
    weights, direction = normal(2, 2, seed=3), normal(2, 20, seed=4)
    (gradient,) = torch.autograd.grad((weights * value).sum(), data)
    step = 1e-5
    with torch.no_grad():
        difference = (weights * (fit(data + step * direction) - fit(data - step * direction))).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_gradcheck_of_both() -> None:
    a = normal(3, 2).requires_grad_()

    def smallest(a: Tensor) -> Tensor:
        return ti.minimize(
            lambda z, a: ((z - a) ** 2).sum(-1) + (z**4).sum(-1),
            torch.zeros_like(a),
            a,
            solver=ti.NewtonCG(rtol=1e-14),
            adjoint=ti.Implicit(rtol=1e-13),
            batch_dims=1,
            on_failure="ignore",
        ).value

    def nearest(a: Tensor) -> Tensor:
        return ti.least_squares(
            lambda z, a: torch.cat((z - a, 0.5 * z**2 - 1), dim=1),
            torch.ones_like(a),
            a,
            solver=ti.LevenbergMarquardt(rtol=1e-14),
            adjoint=ti.Implicit(rtol=1e-13),
            batch_dims=1,
            on_failure="ignore",
        ).value

    assert torch.autograd.gradcheck(smallest, a)
    assert torch.autograd.gradcheck(nearest, a)


def test_a_sample_gets_the_same_answer_alone_and_beside_a_poisoned_one() -> None:
    z0 = normal(5, 3)
    z0[2] = torch.nan
    for solver in MINIMISERS.values():
        together = ti.minimize(rosenbrock, z0, solver=solver, batch_dims=1, on_failure="ignore")
        for i in (0, 1, 3, 4):
            alone = ti.minimize(rosenbrock, z0[i : i + 1], solver=solver, batch_dims=1)
            torch.testing.assert_close(together.value[i], alone.value[0], rtol=1e-12, atol=1e-12)
            assert together.steps[i] == alone.steps[0]
        assert together.value.isfinite().all()


def test_unbounded_objective_is_reported() -> None:
    sol = ti.minimize(lambda z: -(z**3).sum(-1), torch.ones(2, 1, dtype=DOUBLE), batch_dims=1, on_failure="ignore")
    assert not sol.converged.any()
    assert sol.value.isfinite().all()


def test_complex_and_pytree_states() -> None:
    c, d = torch.tensor([1 + 2j, -1j], dtype=torch.complex128), normal(3)
    sol = ti.minimize(
        lambda z: (z["c"] - c).abs().square().sum() + (z["d"] - d).square().sum() + (z["d"] ** 4).sum(),
        {"c": torch.zeros_like(c), "d": torch.zeros_like(d)},
    )
    torch.testing.assert_close(sol.value["c"], c, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        2 * (sol.value["d"] - d) + 4 * sol.value["d"] ** 3, torch.zeros(3, dtype=DOUBLE), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("solver", [ti.LBFGS(), ti.NewtonCG()], ids=["lbfgs", "newton_cg"])
def test_minimisers_say_that_they_are_not_for_roots(solver: ti.solvers.Method) -> None:
    with pytest.raises(TypeError, match=r"solver.*minimize or least_squares"):
        ti.root(lambda z: z - 1, torch.zeros(2), solver=solver)


@pytest.mark.parametrize(
    "call, fn, error, says",
    [
        (ti.minimize, lambda z: z, ValueError, r"one number per sample, shape \(4,\).*\(4, 2\)"),
        (ti.minimize, lambda z: None, TypeError, "one per sample, but it returned NoneType"),
        (ti.minimize, lambda z: z.sum(-1).long(), TypeError, "real numbers.*torch.int64"),
        (ti.minimize, lambda z: z.sum(), ValueError, r"shape \(4,\)"),
        (ti.least_squares, lambda z: z.sum(), ValueError, r"batch shape \(4,\) in front"),
        (ti.least_squares, lambda z: None, TypeError, "tensors of residuals, but it returned NoneType"),
    ],
)
def test_what_an_objective_must_return(call: Any, fn: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(fn, torch.zeros(4, 2), batch_dims=1)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_batches_and_empty_states(shape: tuple[int, int]) -> None:
    z0 = torch.zeros(shape, dtype=DOUBLE)
    for solver in MINIMISERS.values():
        sol = ti.minimize(lambda z: (z**2).sum(-1), z0, solver=solver, batch_dims=1)
        assert sol.value.shape == shape
        assert sol.converged.tolist() == [True] * shape[0]
    for solver in SQUARES.values():
        sol = ti.least_squares(lambda z: z - 1, z0, solver=solver, batch_dims=1)
        assert sol.value.shape == shape
        assert sol.converged.tolist() == [True] * shape[0]
