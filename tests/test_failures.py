"""A sample that fails fails alone: values, statuses and gradients of a batch with one bad sample of every kind."""

import warnings

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

DOUBLE = torch.float64
KINDS = ("healthy", "nan", "singular", "rootless", "slow", "healthy too")


def coefficients(kinds: tuple[str, ...]) -> Tensor:
    """`(B, 5)`: which equation each sample solves, as a one-hot row that `equation` reads."""
    table = {"healthy": 0, "nan": 1, "singular": 2, "rootless": 3, "slow": 4, "healthy too": 0}
    rows = torch.nn.functional.one_hot(torch.tensor([table[k] for k in kinds]), 5).to(DOUBLE)
    rows[:, 0] *= torch.tensor([2.0 if k == "healthy too" else 1.0 for k in kinds], dtype=DOUBLE)
    return rows


def equation(z: Tensor, row: Tensor, weight: Tensor) -> Tensor:
    """Residual `(B, 2)` with a shared `weight` (2,), whose gradient mixes all samples that are not kept out.

    healthy: z³ + w z = 1; nan: log of a negative number; singular: rank one; rootless: z² + 1; slow: w z⁷ = 0
    """
    healthy, nan, singular, rootless, slow = (row[:, i, None] for i in range(5))
    return (
        healthy * (z**3 + weight * z - 1)
        + torch.log(1 - 2 * nan) * weight * z
        + singular * (weight.sum() * (z.sum(1, keepdim=True) - 1) + torch.tensor([0.0, 1.0], dtype=DOUBLE))
        + rootless * (z**2 + weight**2)
        + slow * weight * z**7
    )


def solve(
    kinds: tuple[str, ...], call: str, solver: ti.solvers.Solver, **options: object
) -> tuple[ti.Solution, Tensor, Tensor]:
    """Solution, gradient of the shared weight, and gradient of each sample's own row."""
    weight = torch.tensor([0.7, 1.3], dtype=DOUBLE, requires_grad=True)
    row = coefficients(kinds).requires_grad_()
    z0 = torch.full((len(kinds), 2), 0.5, dtype=DOUBLE)
    common = dict(solver=solver, batch_dims=1, on_failure="ignore", adjoint=ti.Implicit(rtol=1e-13), **options)
    if call == "root":
        sol = ti.root(equation, z0, row, weight, **common)  # pyright: ignore
    else:
        sol = ti.fixed_point(lambda z, r, w: z - 0.2 * equation(z, r, w), z0, row, weight, **common)  # pyright: ignore
    gradients = torch.autograd.grad((sol.value * torch.tensor([1.0, 2.0], dtype=DOUBLE)).sum(), [weight, row])
    return sol, gradients[0], gradients[1]


CASES = {
    # call, solver, max_steps, and how the samples of KINDS end
    "root-newton": ("root", ti.Newton(rtol=1e-13), 25, "SINGULAR STALLED MAX_STEPS"),
    "root-newton-gmres": (
        "root",
        ti.Newton(rtol=1e-13, linear_solver=ti.GMRES()),
        25,
        "SINGULAR STALLED MAX_STEPS",
    ),
    "fixed_point-newton": ("fixed_point", ti.Newton(rtol=1e-13), 25, "SINGULAR MAX_STEPS MAX_STEPS"),
    # Anderson follows the samples without a solution out of sight, and is fast on the slow one.
    "fixed_point-anderson": ("fixed_point", ti.Anderson(rtol=1e-13), 120, "DIVERGED DIVERGED CONVERGED"),
    "fixed_point-picard": ("fixed_point", ti.Picard(rtol=1e-13), 120, "MAX_STEPS DIVERGED MAX_STEPS"),
}
Case = tuple[str, ti.solvers.Solver, int, str]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_others_values_and_gradients_are_those_computed_alone(case: Case) -> None:
    call, solver, steps, _ = case
    sol, shared, own = solve(KINDS, call, solver, max_steps=steps)
    for position in (0, 5):
        alone, _, own_alone = solve(KINDS[position : position + 1], call, solver, max_steps=steps)
        assert alone.converged.all() and sol.converged[position]
        torch.testing.assert_close(sol.value[position], alone.value[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own[position], own_alone[0], rtol=1e-10, atol=1e-12)
        assert sol.steps[position] == alone.steps[0]
    # The shared weight collects the samples that have a gradient and nothing of the others.
    alive = [i for i, s in enumerate(sol.status.tolist()) if ti.Status(s).has_gradient]
    total = sum(solve((KINDS[i],), call, solver, max_steps=steps)[1] for i in alive)
    torch.testing.assert_close(shared, total, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_statuses_name_each_failure_and_dead_gradients_are_exactly_zero(case: Case) -> None:
    call, solver, steps, expected = case
    sol, shared, own = solve(KINDS, call, solver, max_steps=steps)
    status = [ti.Status(s).name for s in sol.status.tolist()]
    assert status == ["CONVERGED", "NONFINITE", *expected.split(), "CONVERGED"]
    for name, gradient in zip(status, own, strict=True):
        if not ti.Status[name].has_gradient:
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
    assert sol.value.isfinite().all() and shared.isfinite().all() and own.isfinite().all()
    assert sol.residual[1] == torch.inf
    assert sol.adjoint.status is not None
    assert sol.adjoint.status[1] == ti.Status.NONFINITE


def test_slow_sample_has_the_gradient_of_the_equation_linearised_at_its_best_iterate() -> None:
    x = torch.tensor([[1.0]], dtype=DOUBLE, requires_grad=True)
    common = {"solver": ti.Picard(), "batch_dims": 1, "max_steps": 10, "on_failure": "ignore"}
    sol = ti.fixed_point(lambda z, x: 0.99 * torch.tanh(z) + x, torch.zeros_like(x), x, **common)  # pyright: ignore
    assert sol.status.item() == ti.Status.MAX_STEPS and sol.steps.item() == 10
    (gradient,) = torch.autograd.grad(sol.value.sum(), x)
    slope = 0.99 / torch.cosh(sol.value.detach()) ** 2
    torch.testing.assert_close(gradient, 1 / (1 - slope))
    zero = ti.Implicit(unconverged="zero")
    sol = ti.fixed_point(lambda z, x: 0.99 * torch.tanh(z) + x, torch.zeros_like(x), x, adjoint=zero, **common)  # pyright: ignore
    (gradient,) = torch.autograd.grad(sol.value.sum(), x)
    assert gradient.item() == 0.0


@pytest.mark.parametrize("solver", [ti.Picard(), ti.Anderson(), ti.Newton()], ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["argument", "closure"])
def test_nan_input_does_not_poison_shared_weights_of_a_two_layer_cell(solver: ti.solvers.Solver, hidden: bool) -> None:
    """With B = n = 6 the weights have the batch's shape too: they must not be taken for inputs."""
    torch.manual_seed(1)
    inner, outer = (torch.nn.Linear(6, 6).double() for _ in range(2))

    def gradients(x: Tensor) -> tuple[ti.Solution, list[Tensor], Tensor]:
        x = x.clone().requires_grad_()

        def cell(z: Tensor, x: Tensor = x) -> Tensor:
            return torch.tanh(0.5 * outer(torch.relu(inner(z) + x)))

        args = () if hidden else (x,)
        sol = ti.fixed_point(cell, torch.zeros_like(x), *args, solver=solver, batch_dims=1, on_failure="ignore")
        leaves = [x, *inner.parameters(), *outer.parameters()]
        first, *rest = torch.autograd.grad(sol.value.square().sum(), leaves)
        return sol, rest, first

    x = torch.randn(6, 6, dtype=DOUBLE)
    poisoned = x.clone()
    poisoned[2, 3] = torch.nan
    healthy = [0, 1, 3, 4, 5]
    sol, shared, own = gradients(poisoned)
    reference, shared_alone, own_alone = gradients(x[healthy])
    assert reference.converged.all()
    assert sol.status.tolist() == [0, 0, int(ti.Status.NONFINITE), 0, 0, 0]
    torch.testing.assert_close(sol.value[healthy], reference.value, rtol=1e-12, atol=1e-12)
    assert torch.equal(own[2], torch.zeros(6, dtype=DOUBLE))
    torch.testing.assert_close(own[healthy], own_alone, rtol=1e-8, atol=1e-10)
    for ours, alone in zip(shared, shared_alone, strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-8, atol=1e-10)


def test_infinite_input_of_a_saturated_sample_leaves_every_gradient_finite() -> None:
    """tanh(∞) = 1 converges, but the outer weight's gradient holds 0·∞."""
    inner, outer = (torch.nn.Linear(4, 4).double() for _ in range(2))
    x = torch.randn(3, 4, dtype=DOUBLE)
    x[1, 2] = torch.inf
    x.requires_grad_()
    sol = ti.fixed_point(lambda z: torch.tanh(0.5 * outer(torch.relu(inner(z) + x))), torch.zeros_like(x), batch_dims=1)
    sol.value.sum().backward()
    assert sol.converged.all()
    assert all(p.grad.isfinite().all() for p in [x, *inner.parameters(), *outer.parameters()])


def test_every_sample_failed_gives_zero_gradients_and_a_working_backward() -> None:
    layer = ti.nn.TanhEquilibrium(4, on_failure="ignore")
    x = torch.full((3, 4), torch.nan, requires_grad=True)
    value = layer(x)
    value.sum().backward()
    assert torch.equal(value, torch.zeros(3, 4))
    assert torch.equal(x.grad, torch.zeros(3, 4))
    assert torch.equal(layer.linear.weight.grad, torch.zeros(4, 4))


def test_start_that_is_not_finite_is_its_own_failure() -> None:
    z0 = torch.tensor([[0.0], [torch.nan], [torch.inf]], dtype=DOUBLE)
    sol = ti.fixed_point(lambda z: 0.5 * z + 1, z0, solver=ti.Anderson(), batch_dims=1, on_failure="ignore")
    assert sol.status.tolist() == [0, 4, 4]
    assert sol.value.isfinite().all()
    assert sol.value[0].item() == pytest.approx(2.0)


def test_default_solver_begins_elsewhere_where_the_start_is_not_finite() -> None:
    z0 = torch.tensor([[0.0], [torch.nan], [torch.inf], [-1.0]], dtype=DOUBLE)
    assert ti.fixed_point(lambda z: 0.5 * z + 1, z0, batch_dims=1).value.flatten().tolist() == pytest.approx([2.0] * 4)
    root = ti.root(lambda z: torch.log(z) - 1, z0, batch_dims=1)
    assert root.value.flatten().tolist() == pytest.approx([torch.e] * 4)


def test_infinite_local_derivative_contributes_zero_and_leaves_the_others() -> None:
    """√|z − a| at its own zero: fn is finite, its derivative is not."""
    a = torch.tensor([[0.0], [2.0]], dtype=DOUBLE, requires_grad=True)
    w = torch.tensor(1.0, dtype=DOUBLE, requires_grad=True)
    z0 = torch.tensor([[0.0], [2.0]], dtype=DOUBLE)
    sol = ti.fixed_point(
        lambda z: w * torch.sqrt(z) * torch.sign(a) + a * (1 - torch.sign(a)) + 0.0 * z,
        z0,
        batch_dims=1,
        solver=ti.Picard(),
        on_failure="ignore",
    )
    gradient_a, gradient_w = torch.autograd.grad(sol.value.sum(), [a, w])
    assert sol.value.isfinite().all() and gradient_a.isfinite().all() and gradient_w.isfinite()
    # The healthy sample: z = w√z, so z = w² and dz/dw = 2w.
    assert sol.value[1].item() == pytest.approx(1.0)
    assert gradient_w.item() == pytest.approx(2.0, rel=1e-6)


def test_singular_jacobian_at_a_converged_sample_is_flagged_and_contributes_zero() -> None:
    """z³ = a z has the root 0, where ∂F/∂z = −a: singular for a = 0 only."""
    a = torch.tensor([[0.0], [1.0]], dtype=DOUBLE, requires_grad=True)
    b = torch.tensor([[0.0], [0.0]], dtype=DOUBLE, requires_grad=True)
    sol = ti.root(lambda z, a, b: z**3 - a * z + b, torch.zeros_like(a), a, b, batch_dims=1, on_failure="ignore")
    assert sol.converged.all()
    (gradient,) = torch.autograd.grad(sol.value.sum(), b)
    assert sol.adjoint.status is not None
    assert sol.adjoint.status.flatten().tolist() == [ti.Status.SINGULAR, ti.Status.CONVERGED]
    assert gradient.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("solver", [ti.Picard(rtol=1e-2), ti.Anderson(rtol=1e-2), ti.Anderson(), ti.Newton()], ids=str)
@pytest.mark.parametrize("shift", [1.0, 0.09])
def test_translation_has_no_fixed_point_and_is_never_called_converged(solver: ti.solvers.Solver, shift: float) -> None:
    z0 = torch.tensor([[0.0], [0.5], [3.0]], dtype=DOUBLE)
    sol = ti.fixed_point(lambda z: z + shift, z0, solver=solver, batch_dims=1, max_steps=2000, on_failure="ignore")
    assert not sol.converged.any(), (sol.status, sol.value)


def test_adjoint_failure_obeys_on_failure() -> None:
    a = torch.zeros(1, dtype=DOUBLE, requires_grad=True)

    def solve(on_failure: str) -> Tensor:
        return ti.root(lambda z: z**3 + a * z, torch.zeros_like(a), on_failure=on_failure).value  # pyright: ignore

    with pytest.raises(ti.ConvergenceError, match=r"backward of root.*SINGULAR"):
        solve("raise").sum().backward()
    with pytest.warns(ti.ConvergenceWarning, match="1 SINGULAR"):
        solve("warn").sum().backward()
    solve("ignore").sum().backward()
    assert a.grad.item() == 0.0


def test_on_failure_raise_carries_the_solution() -> None:
    with pytest.raises(ti.ConvergenceError, match=r"1 of 2 samples did not converge: 1 MAX_STEPS") as caught:
        ti.fixed_point(
            lambda z: torch.tensor([[0.1], [0.9999]]) * z + 1,
            torch.zeros(2, 1),
            batch_dims=1,
            solver=ti.Picard(),
            max_steps=50,
            on_failure="raise",
        )
    solution = caught.value.solution
    assert solution is not None and solution.converged.tolist() == [True, False]
    assert "max_steps" in str(caught.value)


def test_warning_comes_once_per_line_of_the_users() -> None:
    def once() -> None:
        ti.fixed_point(lambda z: z + 1, torch.zeros(1), solver=ti.Picard(), max_steps=3)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            once()
        ti.fixed_point(lambda z: z + 1, torch.zeros(1), solver=ti.Picard(), max_steps=3)
    assert [w.category for w in caught] == [ti.ConvergenceWarning] * 2
    assert all(w.filename == __file__ for w in caught)
