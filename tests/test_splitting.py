"""Splitting methods: equilibria of monotone layers that plain iteration misses, in both passes."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.linear import ResidualJacobian, SuppliedJacobian
from torchimplicit.nn._activations import ReLU, activation_of
from torchimplicit.nn._affine import SlopedJacobian, SplitMap
from torchimplicit.nn._operators import DenseOperator

SOLVERS = [
    ti.PeacemanRachford(rtol=1e-10),
    ti.PeacemanRachford(step_size=0.2, rtol=1e-10),
    ti.ForwardBackward(rtol=1e-10),
    ti.ForwardBackward(step_size=0.01, rtol=1e-10),
]
NAMES = ["relu", "relu6", "hardtanh", "leaky_relu", "soft_threshold", "tanh", "softsign", "sigmoid", "softplus"]


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def wild(activation: str = "relu", size: float = 3.0, **options: Any) -> ti.nn.MonotoneLinear:
    """A layer whose W is so large that plain iteration diverges."""
    torch.manual_seed(1)
    layer = ti.nn.MonotoneLinear(3, 10, margin=0.5, activation=activation, **options)
    with torch.no_grad():
        for free in layer.cell.parametrizations.weight.parameters():
            free.mul_(size)
    return layer


@torch.no_grad()
def test_plain_iteration_fails_where_splitting_does_not() -> None:
    layer = wild(on_failure="ignore")
    x = torch.randn(5, 3)
    assert float(torch.linalg.eigvals(layer.weight).abs().max()) > 3.0
    layer.solver = ti.Picard()
    assert not bool(layer.solve(x).converged.any())
    layer.solver = None  # Auto's last stages are Newton's
    reference = layer.solve(x)
    assert bool(reference.converged.all())
    for solver in SOLVERS:
        layer.solver = solver
        found = layer.solve(x)
        assert bool(found.converged.all()), solver
        assert float((found.value - reference.value).abs().max()) < 1e-8
        z = found.value
        assert float((torch.relu(z @ layer.weight.T + layer.injection(x)) - z).abs().max()) < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [0.05, 1.0, 7.0])
def test_a_prox_satisfies_its_own_equation(name: str, alpha: float) -> None:
    activation = activation_of("test", name)
    p = torch.cat((torch.linspace(-9.0, 9.0, 181), torch.tensor([-40.0, 40.0])))[None]
    step = torch.full((1, 1), alpha)
    q = activation.prox(p, step)
    assert torch.equal(q, activation.prox(p, alpha))
    if alpha == 1.0:
        assert torch.allclose(q, activation(p), atol=1e-14, rtol=1e-14)
    # Moreau: q = prox_{αf}(p) if and only if q = σ(q + (p − q)/α).
    assert float((activation(q + (p - q) / alpha) - q).abs().max()) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_slope_is_the_derivative(name: str) -> None:
    activation = activation_of("test", name)
    p = torch.linspace(-4.05, 4.05, 82).requires_grad_()
    value = activation(p)
    (slope,) = torch.autograd.grad(value.sum(), p)
    assert torch.allclose(activation.slope(value.detach()), slope, atol=1e-14)
    assert 0.0 <= float(slope.min()) <= float(slope.max()) <= 1.0


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS[:3], ids=lambda s: f"{type(s).__name__}-{s.step_size}")
@pytest.mark.parametrize("name", ["tanh", "soft_threshold", "softplus"])
def test_the_equilibrium_is_right_for_every_activation_and_step_size(name: str, solver: ti.PeacemanRachford) -> None:
    layer = wild(name, solver=solver)
    x = torch.randn(4, 3)
    found = layer.solve(x)
    assert bool(found.converged.all())
    residual = activation_of("test", name)(found.value @ layer.weight.T + layer.injection(x)) - found.value
    assert float(residual.abs().max()) < 1e-8


@torch.no_grad()
def test_a_step_contracts_as_the_theory_says() -> None:
    layer = wild()
    x = torch.randn(1, 3)
    layer.solver = ti.PeacemanRachford(rtol=1e-14)
    exact = layer.solve(x).value.detach()
    weight, margin = layer.weight.detach(), 0.5
    norm = float(torch.linalg.matrix_norm(torch.eye(10) - weight, 2))
    alpha = margin / norm**2
    rate = (1 - 2 * alpha * margin + (alpha * norm) ** 2) ** 0.5
    layer.on_failure = "ignore"
    layer.init = lambda _: exact + torch.randn(1, 10)
    errors = []
    for steps in range(5):
        torch.manual_seed(3)
        layer.solver, layer.max_steps = ti.ForwardBackward(step_size=alpha), steps
        errors.append(float((layer.solve(x).value - exact).norm()))
    assert all(b <= rate * a * (1 + 1e-12) for a, b in pairwise(errors))


@torch.no_grad()
def test_peaceman_rachford_takes_at_most_half_the_evaluations_of_forward_backward() -> None:
    torch.manual_seed(1)
    layer, x = ti.nn.MonotoneLinear(3, 40, margin=0.5, on_failure="ignore"), torch.randn(16, 3)
    layer.solver = ti.PeacemanRachford(rtol=1e-6)
    found = layer.solve(x)
    assert bool(found.converged.all())
    for alpha in (None, 0.2, 0.3, 0.4, 0.5):
        layer.solver = ti.ForwardBackward(step_size=alpha, rtol=1e-6)
        other = layer.solve(x)
        assert 2 * found.evaluations <= other.evaluations, alpha


def test_a_resting_z_is_not_taken_for_a_solution() -> None:
    """The paper's code stops on the displacement of z, which is zero here though z = 0 solves nothing."""
    weight = torch.tensor([[0.115, 11.148], [-9.594, -1.4]])
    c = torch.tensor([[0.484, -1.132]])
    map_ = SplitMap(DenseOperator(weight, 0.557), ReLU())
    found = ti.fixed_point(map_, torch.zeros(1, 2), c, batch_dims=1, solver=ti.PeacemanRachford(step_size=1.0))
    assert torch.allclose(found.value, torch.tensor([[0.484 / 0.885, 0.0]]), atol=1e-8)


def test_what_a_cell_returns_must_be_what_its_parts_say() -> None:
    class Wrong(SplitMap):
        def __call__(self, z: Tensor, c: Tensor) -> Tensor:
            return super().__call__(z, c) + 0.1

    map_ = Wrong(DenseOperator(torch.zeros(2, 2), 1.0), ReLU())
    with pytest.raises(ValueError, match="same equation"):
        ti.fixed_point(map_, torch.zeros(1, 2), torch.ones(1, 2), batch_dims=1, solver=ti.PeacemanRachford())


@pytest.mark.parametrize("solver", [ti.ForwardBackward(), ti.PeacemanRachford()], ids=lambda s: type(s).__name__)
def test_a_cell_without_parts_is_refused(solver: ti.PeacemanRachford) -> None:
    with pytest.raises(TypeError, match="supply its parts by a method `splitting`"):
        ti.fixed_point(torch.cos, torch.zeros(2), solver=solver)


@pytest.mark.parametrize("method", ["peaceman-rachford", "forward-backward"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_adjoint_system_is_solved_by_splitting(method: Any, transposed: bool) -> None:
    operator = wild(size=2.0).cell.operator(None)
    torch.manual_seed(2)
    slope = torch.rand(6, 10) * (torch.rand(6, 10) < 0.6)  # zeros among them
    jacobian = SlopedJacobian(slope, operator, operator)
    system = ResidualJacobian(
        SuppliedJacobian(jacobian, torch.Size((6, 10)), (6, 10), lambda _: None), True, transposed
    )
    b = torch.randn(6, 10)
    with torch.no_grad():
        found = ti.Splitting(method=method, fallback=ti.CG(max_steps=1)).solve(system, b, 1e-8)
        matrix = torch.eye(10) - slope[:, :, None] * operator.dense()
        exact = torch.linalg.solve(matrix.mT if transposed else matrix, b)
    assert found.solved and float(found.residual.max()) <= 1e-8
    assert float((found.value - exact).abs().max()) < 1e-6


def test_what_splitting_does_not_solve_goes_to_the_fallback() -> None:
    operator = wild().cell.operator(None)
    jacobian = SlopedJacobian(torch.ones(2, 10), operator, operator)
    system = ResidualJacobian(SuppliedJacobian(jacobian, torch.Size((2, 10)), (2, 10), lambda _: None), True, True)
    with torch.no_grad():
        found = ti.Splitting(max_steps=2).solve(system, torch.randn(2, 10), 1e-9)
        alone = ti.Splitting(max_steps=2, fallback=ti.CG(max_steps=1)).solve(system, torch.randn(2, 10), 1e-9)
    assert found.solved and float(found.residual.max()) < 1e-9
    assert not alone.solved


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_gradients_agree_with_those_of_a_dense_adjoint(name: str) -> None:
    x, grads = torch.randn(4, 3), []
    for adjoint in (ti.Implicit(linear_solver=ti.Splitting(), rtol=1e-12), ti.Implicit(linear_solver=ti.LU())):
        layer = wild(name, solver=ti.PeacemanRachford(rtol=1e-13), adjoint=adjoint)
        given = x.clone().requires_grad_()
        layer(given).sin().sum().backward()
        grads.append([given.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*grads, strict=True):
        assert float((one - other).abs().max()) < 1e-10 * (1 + float(other.abs().max()))


def test_gradients_agree_with_unrolled_differentiation() -> None:
    layer = wild("tanh", 1.0, solver=ti.PeacemanRachford(rtol=1e-13))
    x = torch.randn(2, 3)
    layer(x).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    z = torch.zeros(2, 10)
    weight, c = layer.weight, layer.injection(x)
    for _ in range(400):
        z = 0.7 * z + 0.3 * torch.tanh(z @ weight.T + c)
    z.square().sum().backward()
    for one, p in zip(found, layer.parameters(), strict=True):
        assert float((one - p.grad).abs().max()) < 1e-9


@torch.no_grad()
def test_samples_that_are_done_leave_and_others_do_not_notice() -> None:
    layer = wild()
    x = torch.randn(6, 3) * torch.tensor([1e-3, 1e-3, 1e-3, 1e-3, 1.0, 30.0])[:, None]
    for solver in (ti.PeacemanRachford(check_every=1), ti.ForwardBackward()):
        layer.solver = solver
        together = layer.solve(x)
        alone = torch.cat([layer(row[None]) for row in x])
        assert bool(together.converged.all())
        assert float((together.value - alone).abs().max()) < 1e-8


@torch.no_grad()
def test_a_sample_without_progress_takes_the_safe_step_size() -> None:
    weight = torch.tensor([[0.95, 30.0], [-30.0, 0.95]])  # skew but for the margin: 1/√(m L) is far too long a step
    map_, c = SplitMap(DenseOperator(weight, 0.05), ReLU()), torch.tensor([[1.0, 2.0]])
    found = ti.fixed_point(map_, torch.zeros(1, 2), c, batch_dims=1, solver=ti.PeacemanRachford())
    safe = ti.fixed_point(map_, torch.zeros(1, 2), c, batch_dims=1, solver=ti.PeacemanRachford(step_size="safe"))
    assert bool(found.converged.all()) and bool(safe.converged.all())
    assert float((found.value - safe.value).abs().max()) < 1e-7


@pytest.mark.parametrize("options", [{"step_size": 0.0}, {"step_size": -1.0}, {"step_size": float("nan")}])
@pytest.mark.parametrize("kind", [ti.PeacemanRachford, ti.ForwardBackward, ti.Splitting])
def test_step_sizes_are_positive(kind: Any, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="step_size"):
        kind(**options)


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(TypeError, match="did you mean 'step_size'"):
        ti.PeacemanRachford(stepsize=1.0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="did you mean 'soft_threshold'"):
        ti.nn.MonotoneLinear(2, 2, activation="softthreshold")
