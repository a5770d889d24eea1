"""First derivatives: against unrolled differentiation, closed forms and finite differences, however fn reads."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import torchimplicit as ti
from tests.problems import EXACT, SOLVERS, TIGHT, TanhProblem, gradients, unrolled

EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def assert_equal(ours: list[Tensor], truth: list[Tensor], tolerance: float = 1e-9) -> None:
    for ours_, truth_ in zip(ours, truth, strict=True):
        torch.testing.assert_close(ours_, truth_, rtol=tolerance, atol=tolerance)


@EVERY_SOLVER
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_closure_gradients_equal_unrolled_ones(solver: ti.solvers.Solver, batch_dims: int) -> None:
    p = TanhProblem.make()
    sol = ti.fixed_point(p.map, p.start, solver=solver, adjoint=EXACT, batch_dims=batch_dims)
    assert sol.converged.all()
    assert_equal(gradients(sol.value, p.leaves), gradients(unrolled(p.map, p.start), p.leaves))


@EVERY_SOLVER
def test_argument_gradients_equal_unrolled_ones(solver: ti.solvers.Solver) -> None:
    p = TanhProblem.make()

    def fn(z: Tensor, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return torch.tanh(z @ weights["w"].T + x + weights["b"])

    weights = {"w": p.weight, "b": p.bias}
    sol = ti.fixed_point(fn, p.start, p.x, weights, solver=solver, adjoint=EXACT, batch_dims=1)
    assert_equal(gradients(sol.value, p.leaves), gradients(unrolled(p.map, p.start), p.leaves))


class Cell(torch.nn.Module):
    """Two layers, so that the gradient of an inner weight passes through an outer one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(n, 2 * n)
        self.outer = torch.nn.Linear(2 * n, n)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.6 * self.outer(torch.tanh(self.inner(z))) + x)


@EVERY_SOLVER
def test_parameter_gradients_equal_unrolled_ones(solver: ti.solvers.Solver) -> None:
    cell = Cell(5).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *cell.parameters()]
    layer = ti.nn.FixedPoint(cell, solver=solver, adjoint=EXACT)
    truth = gradients(unrolled(lambda z: cell(z, x), torch.zeros_like(x)), leaves)
    assert_equal(gradients(layer(x), leaves), truth)


@EVERY_SOLVER
@pytest.mark.parametrize("call", ["fixed_point", "root"])
def test_gradcheck_for_closures_and_arguments(solver: ti.solvers.Solver, call: str) -> None:
    if call == "root" and not isinstance(solver, ti.Newton):
        solver = type(solver)(rtol=TIGHT)
    p = TanhProblem.make(batch=2, n=3)

    def by_closure(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        def fn(z: Tensor) -> Tensor:
            value = torch.tanh(z @ weight.T + x + bias)
            return value if call == "fixed_point" else z - value

        return getattr(ti, call)(fn, torch.zeros_like(x), solver=solver, adjoint=EXACT, batch_dims=1).value

    def by_argument(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        def fn(z: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
            value = torch.tanh(z @ weight.T + x + bias)
            return value if call == "fixed_point" else z - value

        solve = getattr(ti, call)
        return solve(fn, torch.zeros_like(x), weight, bias, x, solver=solver, adjoint=EXACT, batch_dims=1).value

    assert gradcheck(by_closure, p.leaves, atol=1e-8, rtol=1e-6)
    assert gradcheck(by_argument, p.leaves, atol=1e-8, rtol=1e-6)


@EVERY_SOLVER
def test_gradcheck_for_the_parameters_of_a_layer(solver: ti.solvers.Solver) -> None:
    layer = ti.nn.TanhEquilibrium(3, solver=solver, adjoint=EXACT, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"cell.linear.weight": weight}, (x,))

    weight = layer.linear.weight.detach().clone().requires_grad_()
    assert gradcheck(fn, (x, weight), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("linear", [None, ti.LU(), ti.GMRES(), ti.Neumann(), ti.Cascade(small=0)], ids=str)
def test_every_linear_solver_gives_the_same_gradient(linear: ti.linear.LinearSolver | None) -> None:
    p = TanhProblem.make(n=24)
    sol = ti.fixed_point(
        p.map, p.start, solver=SOLVERS["newton"], adjoint=ti.Implicit(linear, rtol=TIGHT), batch_dims=1
    )
    truth = gradients(unrolled(p.map, p.start), p.leaves)
    assert_equal(gradients(sol.value, p.leaves), truth)
    assert sol.adjoint.status is not None and sol.adjoint.residual is not None
    assert (sol.adjoint.status == ti.Status.CONVERGED).all()
    assert (sol.adjoint.residual <= TIGHT).all()


def test_root_has_the_closed_form_derivative_of_each_sample() -> None:
    a = torch.tensor([2.0, 10.0, 30.0, -2.0], dtype=torch.float64, requires_grad=True)
    sol = ti.root(lambda z, a: z**3 + z - a, torch.zeros_like(a), a, batch_dims=1)
    z = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(sol.value.detach(), z)
    (gradient,) = torch.autograd.grad(sol.value.sum(), a)
    torch.testing.assert_close(gradient, 1 / (3 * z**2 + 1))


def test_gradient_where_the_map_is_no_contraction() -> None:
    """At this equilibrium ρ(J) = 3: only a real linear solve gives the derivative."""
    a = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    matrix = torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64)
    for solver in (ti.Newton(), ti.Anderson()):
        sol = ti.fixed_point(lambda z: z @ matrix.T + a, torch.zeros_like(a), solver=solver)
        inverse = torch.linalg.inv(torch.eye(2, dtype=torch.float64) - matrix)
        torch.testing.assert_close(sol.value.detach(), inverse @ a.detach())
        weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
        (gradient,) = torch.autograd.grad(sol.value @ weights, a)
        torch.testing.assert_close(gradient, inverse.T @ weights)


@pytest.mark.parametrize("solver", [SOLVERS["anderson"], SOLVERS["newton"]], ids=["anderson", "newton"])
def test_pytree_state_and_arguments(solver: ti.solvers.Solver) -> None:
    a = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)

    def fn(z: dict[str, Tensor]) -> dict[str, Tensor]:
        mixed = z["v"].sum(dim=2)
        return {"u": 0.5 * torch.sin(z["u"] + mixed) + a, "v": 0.3 * torch.cos(z["v"]) + b * z["u"][:, None] / 4}

    z0 = {"u": torch.zeros_like(a), "v": torch.zeros_like(b)}
    sol = ti.fixed_point(fn, z0, solver=solver, adjoint=EXACT, batch_dims=1)
    z = z0
    for _ in range(300):
        z = fn(z)
    ours = gradients(sol.value["u"].sum(1) * sol.value["v"].sum((1, 2)), [a, b])
    assert_equal(ours, gradients(z["u"].sum(1) * z["v"].sum((1, 2)), [a, b]))


@pytest.mark.parametrize("solver", [SOLVERS["picard"], SOLVERS["anderson"], SOLVERS["newton"]], ids=str)
def test_complex_state_that_is_not_holomorphic(solver: ti.solvers.Solver) -> None:
    a = torch.tensor([0.3 + 0.2j, -0.1 + 0.4j], dtype=torch.complex128, requires_grad=True)

    def fn(z: Tensor, a: Tensor) -> Tensor:
        return a + 0.3 * z.conj() * z + 0.2j * torch.sin(z)

    def solve(a: Tensor) -> Tensor:
        return ti.fixed_point(fn, torch.zeros_like(a), a, solver=solver, adjoint=EXACT, batch_dims=1).value

    assert gradcheck(solve, (a,), atol=1e-8, rtol=1e-6)
    z = unrolled(lambda z: fn(z, a), torch.zeros_like(a))
    (truth,) = torch.autograd.grad((z * z.conj()).real.sum() + z.imag.sum(), a)
    ours = solve(a)
    (gradient,) = torch.autograd.grad((ours * ours.conj()).real.sum() + ours.imag.sum(), a)
    torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-9)


def test_scalar_and_higher_batch_dims() -> None:
    a = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    z = ti.root(lambda z: z**3 + z - a, torch.ones((), dtype=torch.float64)).value
    assert z.shape == ()
    assert torch.autograd.grad(z, a)[0].item() == pytest.approx(1 / 13)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    sol = ti.fixed_point(lambda z: 0.5 * torch.cos(z) + x, torch.zeros_like(x), batch_dims=2, adjoint=EXACT)
    assert sol.status.shape == sol.steps.shape == sol.residual.shape == (2, 3)
    (gradient,) = torch.autograd.grad(sol.value.sum(), x)
    torch.testing.assert_close(gradient, 1 / (1 + 0.5 * torch.sin(sol.value.detach())), rtol=1e-8, atol=1e-8)


def test_loop_variable_in_a_closure_keeps_its_own_gradient() -> None:
    """The closure's x is another tensor by the time of the backward pass; gradients must go to the ones solved with."""
    xs = [torch.full((1, 2), v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.7, -0.4)]
    total = torch.zeros((), dtype=torch.float64)
    zero = torch.zeros(1, 2).double()
    for x in xs:
        total = total + ti.fixed_point(lambda z: 0.5 * torch.sin(z) + x, zero, batch_dims=1).value.sum()  # noqa: B023
    total.backward()
    for leaf in xs:
        z = unrolled(lambda z, leaf=leaf: 0.5 * torch.sin(z) + leaf, zero).detach()
        torch.testing.assert_close(leaf.grad, 1 / (1 - 0.5 * torch.cos(z)))


def test_functional_call_gradients_go_to_the_swapped_parameters() -> None:
    layer = ti.nn.TanhEquilibrium(3, dtype=torch.float64, adjoint=EXACT, solver=SOLVERS["newton"])
    other = (0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    x = torch.randn(4, 3, dtype=torch.float64)
    value = torch.func.functional_call(layer, {"cell.linear.weight": other}, (x,))
    truth = gradients(unrolled(lambda z: torch.tanh(z @ other.T + x), torch.zeros_like(x)), [other])
    assert_equal(gradients(value, [other]), truth)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e8])
def test_gradient_accuracy_does_not_depend_on_the_loss_scale(scale: float) -> None:
    p = TanhProblem.make(n=20, dtype=torch.float64)
    sol = ti.fixed_point(p.map, p.start, batch_dims=1)
    reference = torch.autograd.grad(sol.value.sum(), p.leaves, retain_graph=True)
    scaled = torch.autograd.grad(scale * sol.value.sum(), p.leaves, retain_graph=True)
    assert_equal([g / scale for g in scaled], list(reference), 1e-12)


def test_start_has_an_exactly_zero_gradient() -> None:
    p = TanhProblem.make()
    z0 = torch.zeros_like(p.x).requires_grad_()
    value = ti.fixed_point(p.map, z0, batch_dims=1, adjoint=EXACT).value
    g0, gw = torch.autograd.grad(value.sum(), [z0, p.weight])
    assert torch.equal(g0, torch.zeros_like(z0))
    assert gw.abs().max() > 0.1


def test_nothing_is_tracked_where_nothing_requires_a_gradient() -> None:
    p = TanhProblem.make()
    frozen = TanhProblem(p.weight.detach(), p.bias.detach(), p.x.detach())
    assert not ti.fixed_point(frozen.map, p.start, batch_dims=1).value.requires_grad
    with torch.no_grad():
        assert not ti.fixed_point(p.map, p.start, batch_dims=1).value.requires_grad
    with torch.inference_mode():
        sol = ti.fixed_point(p.map, p.start.clone(), batch_dims=1, solver=ti.Newton())
    assert sol.converged.all() and sol.value.is_inference()
    assert ti.fixed_point(p.map, p.start, batch_dims=1).value.requires_grad


def test_solution_is_differentiable_in_what_only_the_solution_depends_on() -> None:
    """z depends on x alone here, and the loss on z and on x directly."""
    x = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    z = ti.fixed_point(lambda z: 0.5 * z + x, torch.zeros_like(x)).value
    (z * x).sum().backward()  # z = 2x
    torch.testing.assert_close(x.grad, 4 * x.detach())


def test_backward_twice_needs_retain_graph_and_gives_the_same() -> None:
    p = TanhProblem.make()
    value = ti.fixed_point(p.map, p.start, batch_dims=1).value
    first = torch.autograd.grad(value.sum(), p.leaves, retain_graph=True)
    second = torch.autograd.grad(value.sum(), p.leaves)
    assert_equal(list(first), list(second), 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value.sum(), p.leaves)


def test_no_gradient_is_left_behind_and_the_graph_is_freed() -> None:
    p = TanhProblem.make()

    def fn(z: Tensor) -> Tensor:
        return p.map(z)

    watch = weakref.ref(fn)
    sol = ti.fixed_point(fn, p.start, batch_dims=1)
    sol.value.sum().backward()
    del sol, fn
    gc.collect()
    assert watch() is None
    assert all(leaf.grad is not None for leaf in p.leaves)


def test_in_place_change_of_a_parameter_before_backward_is_an_error() -> None:
    layer = ti.nn.TanhEquilibrium(3, dtype=torch.float64)
    value = layer(torch.randn(2, 3, dtype=torch.float64))
    with torch.no_grad():
        layer.linear.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_float32_gradient_is_as_good_as_the_dtype() -> None:
    p = TanhProblem.make(n=30, dtype=torch.float32)
    sol = ti.fixed_point(p.map, p.start, batch_dims=1)
    truth = TanhProblem(*[t.detach().double().requires_grad_() for t in p.leaves])
    exact = gradients(unrolled(truth.map, truth.start), truth.leaves)
    for ours, reference in zip(gradients(sol.value, p.leaves), exact, strict=True):
        error = (ours.double() - reference).norm() / reference.norm()
        assert error < 2e-4, error
