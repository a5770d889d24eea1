"""Refinement: products in reduced precision first, in full after that; the results are those of full precision."""

from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit import _problem, _refinement
from torchimplicit._refinement import ROUGH, Pace, coarse_dtype
from torchimplicit.linear import ResidualJacobian
from torchimplicit.linear._operator import AutogradJacobian

CPU = torch.device("cpu")
REFINED = ti.Implicit(rtol=1e-5, linear_solver=ti.Cascade(neumann=ti.Neumann(slowest=0.97, mixed_precision=True)))


@pytest.fixture(autouse=True)
def _as_on_a_cpu_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has: torch computes in bfloat16 without instructions for it, too."""
    monkeypatch.setattr(_problem, "coarse_dtype", lambda _: torch.bfloat16)


def _equation(n: int = 64, batch: int = 8, radius: float = 0.8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(n, n, generator=generator) * radius / n**0.5
    return weight.requires_grad_(), torch.randn(batch, n, generator=generator).requires_grad_()


class Watched:
    """`tanh(z Wᵀ + x)`, which notes whether it is evaluated in reduced precision."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.seen: list[bool] = []

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return torch.tanh(z @ self.weight.T + x)


@pytest.mark.parametrize("feature", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_reduced_precision_is_used_where_a_processor_has_it(monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert coarse_dtype(CPU) is None
    monkeypatch.setattr(torch.cpu, feature, lambda: True)
    assert coarse_dtype(CPU) == torch.bfloat16
    assert coarse_dtype(torch.device("meta")) is None


def test_reduced_precision_is_used_where_a_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    has: dict[str, bool] = {"including_emulation": False}

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or has["including_emulation"]

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert coarse_dtype(torch.device("cuda")) is None
    has["including_emulation"] = True
    assert coarse_dtype(torch.device("cuda")) == torch.bfloat16


def test_without_reduced_precision_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_problem, "coarse_dtype", lambda _: None)
    weight, x = _equation()
    values = []
    for mixed in (False, True):
        fn = Watched(weight)
        adjoint = ti.Implicit(linear_solver=ti.Neumann(mixed_precision=mixed))
        solver = ti.Picard(mixed_precision=mixed)
        solution = ti.fixed_point(fn, torch.zeros_like(x), x, solver=solver, adjoint=adjoint, batch_dims=1)
        (grad,) = torch.autograd.grad(solution.value.sum(), weight)
        assert not any(fn.seen)
        values.append((solution.value.detach(), grad))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "solver",
    [
        ti.Picard(rtol=1e-6, mixed_precision=True),
        ti.Picard(rtol=1e-6, check_every=4, extrapolate_every=8, mixed_precision=True),
        ti.Anderson(rtol=1e-6, mixed_precision=True),
        ti.Broyden(rtol=1e-6, mixed_precision=True),
        ti.Newton(rtol=1e-6, mixed_precision=True),
        ti.Auto(rtol=1e-6, mixed_precision=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_solution_is_that_of_full_precision(solver: ti.solvers.Method) -> None:
    weight, x = _equation()
    fn = Watched(weight)
    z0 = torch.zeros_like(x)
    solution = ti.fixed_point(fn, z0, x, solver=solver, adjoint=REFINED, batch_dims=1)
    assert solution.converged.all()
    assert any(fn.seen)
    assert not fn.seen[-1]  # the one that counts
    exact = solution.value.detach().double()
    for _ in range(300):
        exact = torch.tanh(exact @ weight.detach().double().T + x.detach().double())
    residual = torch.tanh(solution.value.double() @ weight.double().T + x.double()) - solution.value.double()
    size = solution.value.double().square().mean(1).sqrt()
    assert (residual.square().mean(1).sqrt() <= 1.1e-6 * size).all()
    torch.testing.assert_close(solution.value.double(), exact, rtol=0, atol=2e-5)


def test_hardly_any_evaluation_is_in_full_precision() -> None:
    """The start, where the rough solve ends, after each of two Newton steps, and the one that is differentiated."""
    weight, x = _equation()
    plain, fn = Watched(weight), Watched(weight)
    for cell, mixed in ((plain, False), (fn, True)):
        solver = ti.Picard(rtol=1e-6, mixed_precision=mixed)
        solution = ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=REFINED, batch_dims=1)
        assert solution.converged.all()
    assert plain.seen.count(False) > 20
    assert fn.seen.count(False) <= 6
    assert fn.seen.count(True) >= 10


def test_steps_count_evaluations_and_products_and_have_their_limit() -> None:
    weight, x = _equation()
    for max_steps in (3, 9, 17, 25):
        solver = ti.Picard(rtol=1e-6, mixed_precision=True)
        solution = ti.fixed_point(
            Watched(weight),
            torch.zeros_like(x),
            x,
            solver=solver,
            batch_dims=1,
            max_steps=max_steps,
            on_failure="ignore",
            trace=True,
        )
        assert int(solution.steps.max()) <= max_steps
        assert not solution.converged.any()
        assert (solution.status == ti.Status.MAX_STEPS).all()
        assert solution.trace is not None
        torch.testing.assert_close(solution.trace[-1], solution.residual, rtol=1e-3, atol=0)


def test_gradient_is_that_of_full_precision() -> None:
    weight, x = _equation()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    fn = Watched(weight)
    solution = ti.fixed_point(fn, torch.zeros_like(x), x, solver=ti.Picard(rtol=1e-7), adjoint=REFINED, batch_dims=1)
    solution.value.backward(v)
    w, y = weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    z = torch.zeros_like(y)
    for _ in range(300):
        z = torch.tanh(z @ w.T + y)
    z.backward(v.double())
    assert weight.grad is not None and x.grad is not None and w.grad is not None and y.grad is not None
    assert (weight.grad.double() - w.grad).norm() <= 2e-5 * w.grad.norm()
    assert (x.grad.double() - y.grad).norm() <= 2e-5 * y.grad.norm()
    assert solution.adjoint.residual is not None
    assert (solution.adjoint.residual <= 1e-5).all()


def _exact_products(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether products of each backward pass were in full precision, by the graph they are taken on."""
    full: list[bool] = []
    product = AutogradJacobian._product

    def counted(self: AutogradJacobian, u: Tensor) -> Tensor:
        pending, seen = [self.output.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is not None and node not in seen:
                seen.add(node)
                pending.extend(following for following, _ in node.next_functions)
        full.append(not any(node.name().startswith("ToCopy") for node in seen))
        return product(self, u)

    monkeypatch.setattr(AutogradJacobian, "_product", counted)
    return full


def test_hardly_any_product_of_the_adjoint_is_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = _equation()
    full = _exact_products(monkeypatch)
    solution = ti.fixed_point(
        Watched(weight), torch.zeros_like(x), x, solver=ti.Picard(), adjoint=REFINED, batch_dims=1
    )
    solution.value.sum().backward()
    assert full.count(False) >= 15
    assert full.count(True) <= 5


@pytest.mark.parametrize("shape", [(8, 64), (2, 4, 64)])
def test_a_closed_form_is_refined_with_a_weight_that_was_cast_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    weight, x = _equation()
    x = x.detach().reshape(shape).requires_grad_()
    products: list[torch.dtype] = []
    matmul = torch.matmul

    def watched(a: Tensor, b: Tensor) -> Tensor:
        products.append(b.dtype)
        return matmul(a, b)

    solver = ti.Picard(rtol=1e-6, mixed_precision=True)
    cell = ti.nn.TanhEquilibrium(64, solver=solver, adjoint=REFINED)
    plain = ti.nn.TanhEquilibrium(64, solver=ti.Picard(rtol=1e-6), adjoint=ti.Implicit(rtol=1e-6))
    found = []
    for layer in (cell, plain):
        layer.linear.weight.data.copy_(weight.detach())
        products.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "matmul", watched)
            z = layer(x)
            forward = products.count(torch.bfloat16)
            z.square().sum().backward()
        found.append((z.detach(), layer.linear.weight.grad, x.grad, forward, products.count(torch.bfloat16) - forward))
        x.grad = None
    torch.testing.assert_close(found[0][:3], found[1][:3], rtol=2e-4, atol=1e-4)
    assert found[0][3] >= 15 and found[0][4] >= 15
    assert found[1][3:] == (0, 0)


def test_a_reduced_form_that_is_older_than_the_cell_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchimplicit.nn._equilibrium import TanhCell

    class Half(TanhCell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * super().forward(z, x)

        def linearize(self, z: Tensor, value: Tensor, x: Tensor) -> Any:
            return super().linearize(z, 2 * value, x)  # not that of the half, but no matter: a closed form of its own

    monkeypatch.setattr(TanhCell, "reduced", lambda *_: pytest.fail("knows nothing of the half"))
    torch.manual_seed(0)
    layer = ti.nn.FixedPoint(Half(64), solver=ti.Picard(rtol=1e-5, mixed_precision=True))
    with torch.no_grad():
        assert layer.solve(torch.randn(8, 64)).converged.all()


def test_a_closure_that_was_rebound_leaves_the_gradient_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = _equation()
    full = _exact_products(monkeypatch)
    scale = 1.0

    def fn(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(scale * (z @ weight.T) + x)

    solution = ti.fixed_point(fn, torch.zeros_like(x), x, solver=ti.Picard(), adjoint=REFINED, batch_dims=1)
    scale = -5.0
    (found,) = torch.autograd.grad(solution.value.sum(), weight)
    scale = 1.0
    plain = ti.fixed_point(fn, torch.zeros_like(x), x, solver=ti.Picard(), adjoint=ti.Implicit(rtol=1e-5), batch_dims=1)
    (expected,) = torch.autograd.grad(plain.value.sum(), weight)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert full.count(False) >= 15  # the recorded function it was, not the present one: it did converge


def test_double_precision_is_left_alone() -> None:
    weight, x = _equation()
    fn = Watched(weight.detach().double())
    ti.fixed_point(
        fn, torch.zeros_like(x).double(), x.detach().double(), solver=ti.Picard(mixed_precision=True), batch_dims=1
    )
    assert not any(fn.seen)


def test_a_tolerance_that_reduced_precision_meets_is_judged_in_full() -> None:
    weight, x = _equation()
    fn = Watched(weight.detach())
    solver = ti.Picard(rtol=2 * ROUGH, mixed_precision=True)
    solution = ti.fixed_point(fn, torch.zeros_like(x), x.detach(), solver=solver, batch_dims=1)
    assert not fn.seen[-1]
    residual = torch.tanh(solution.value @ weight.T + x) - solution.value
    told = solution.residual
    torch.testing.assert_close(residual.detach().square().mean(1).sqrt(), told, rtol=1e-4, atol=0)


def test_a_sample_that_fails_does_not_touch_the_others() -> None:
    weight, x = _equation()
    poisoned = x.detach().clone()
    poisoned[2] = torch.nan
    solver = ti.Picard(rtol=1e-6, mixed_precision=True)
    healthy = ti.fixed_point(Watched(weight), torch.zeros_like(x), x.detach(), solver=solver, batch_dims=1)
    other = ti.fixed_point(
        Watched(weight), torch.zeros_like(x), poisoned, solver=solver, batch_dims=1, on_failure="ignore"
    )
    keep = torch.arange(len(x)) != 2
    assert not other.converged[2]
    assert other.converged[keep].all()
    torch.testing.assert_close(other.value[keep], healthy.value[keep], rtol=0, atol=2e-6)


@pytest.mark.parametrize("rtol", [1e-5, 0.1, 0.4])
def test_a_map_without_a_fixed_point_does_not_converge(rtol: float) -> None:
    """Far enough out `z + c` passes every relative test; its residual has not fallen."""
    z0 = torch.ones(3, 5)
    solver = ti.Picard(rtol=rtol, mixed_precision=True)
    solution = ti.fixed_point(lambda z: z + 1.0, z0, solver=solver, batch_dims=1, on_failure="ignore")
    assert not solution.converged.any()
    slow = ti.fixed_point(
        lambda z: z + 1.0 / (1.0 + 1e-3 * z.abs()), z0, solver=solver, batch_dims=1, on_failure="ignore", max_steps=400
    )
    assert not slow.converged.any()


def test_a_sample_that_has_converged_at_the_start_stays_there() -> None:
    weight, x = _equation()
    first = ti.fixed_point(Watched(weight), torch.zeros_like(x), x.detach(), solver=ti.Picard(rtol=1e-6), batch_dims=1)
    start = first.value.detach().clone()
    start[1::2] = 0.0
    solver = ti.Picard(rtol=1e-5, mixed_precision=True)
    again = ti.fixed_point(Watched(weight), start, x.detach(), solver=solver, batch_dims=1)
    assert again.converged.all()
    torch.testing.assert_close(again.value[::2], start[::2], rtol=0, atol=0)


def test_refinement_that_does_not_converge_is_finished_in_full() -> None:
    """A rough Jacobian that is wrong altogether: the sum in full takes over, and nothing false is reported."""
    weight, x = _equation(20, 4, 0.6)
    weight, z = weight.detach(), x.detach()

    def jacobian(sign: float) -> AutogradJacobian:
        return AutogradJacobian.at(lambda z: sign * (z @ weight.T), z, lambda _: None)

    operator = ResidualJacobian(jacobian(1.0), shifted=True, record=lambda: jacobian(-1.0))
    b = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    found = ti.Neumann(mixed_precision=True).solve(operator, b, 1e-5)
    assert found.solved
    torch.testing.assert_close(found.value, torch.linalg.solve(operator.dense(), b), rtol=1e-4, atol=1e-4)


def test_rough_newton_steps_that_lead_nowhere_are_finished_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = _equation()
    taped = _problem.Problem.taped_jacobian

    def wrong(problem: _problem.Problem, z: Tensor) -> AutogradJacobian | None:
        right = taped(problem, z)
        assert right is not None
        return AutogradJacobian(right.output, right.state, right.count, lambda: lambda p: -0.5 * p)

    monkeypatch.setattr(_problem.Problem, "taped_jacobian", wrong)
    solver = ti.Picard(rtol=1e-6, mixed_precision=True)
    solution = ti.fixed_point(Watched(weight), torch.zeros_like(x), x.detach(), solver=solver, batch_dims=1)
    assert solution.converged.all()
    residual = torch.tanh(solution.value @ weight.T + x) - solution.value
    torch.testing.assert_close(residual.detach().square().mean(1).sqrt(), solution.residual, rtol=1e-2, atol=1e-9)


def test_a_rough_newton_step_that_is_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = _equation()
    weight = 0.8 * weight.detach() / torch.linalg.matrix_norm(weight.detach(), 2)  # plain steps never make it worse
    taped = _problem.Problem.taped_jacobian

    def wrong(problem: _problem.Problem, z: Tensor) -> AutogradJacobian | None:
        right = taped(problem, z)
        assert right is not None
        return AutogradJacobian(right.output, right.state, right.count, lambda: lambda p: 0.9 * p)

    monkeypatch.setattr(_problem.Problem, "taped_jacobian", wrong)
    solver = ti.Picard(rtol=1e-6, mixed_precision=True)
    solution = ti.fixed_point(Watched(weight), torch.zeros_like(x), x.detach(), solver=solver, batch_dims=1, trace=True)
    assert solution.converged.all()
    assert solution.trace is not None
    assert (solution.trace[1:] <= 2 * solution.trace[:-1]).all()  # nine times, if it were


def test_functions_that_draw_at_random_converge() -> None:
    """Dropout, whose masks are one for the length of a solve: there is no tape for these."""
    torch.manual_seed(0)
    cell = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Dropout(0.2), torch.nn.Tanh())
    with torch.no_grad():
        cell[0].weight.mul_(0.8)
    layer = ti.nn.FixedPoint(lambda z, x: cell(z) + x, solver=ti.Picard(rtol=1e-5, mixed_precision=True))
    x = torch.randn(6, 32)
    assert layer.solve(x).converged.all()


def test_mixed_precision_must_be_a_truth_value() -> None:
    with pytest.raises(ValueError, match="mixed_precision"):
        ti.Picard(mixed_precision="yes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="mixed_precision"):
        ti.Neumann(mixed_precision=1)  # pyright: ignore[reportArgumentType]


def test_first_look_must_be_a_count() -> None:
    with pytest.raises(ValueError, match="first_look"):
        ti.Neumann(first_look=0)


@pytest.mark.parametrize("first_look", [1, 3, 12, 40])
def test_neumann_converges_whenever_it_looks_first(first_look: int) -> None:
    weight, x = _equation()
    jacobian = AutogradJacobian.at(lambda z: Watched(weight.detach())(z, x.detach()), x.detach(), lambda _: None)
    operator = ResidualJacobian(jacobian, shifted=True)
    b = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = ti.Neumann(first_look=first_look, slowest=0.999).solve(operator, b, 1e-5)
    assert found.solved
    assert ((b - operator.mv(found.value)).norm(dim=1) <= 1.1e-5 * b.norm(dim=1)).all()


def test_neumann_refines_to_the_tolerance_asked_for() -> None:
    weight, x = _equation()
    fn, z = Watched(weight.detach()), x.detach()

    def record(coarse: bool) -> AutogradJacobian:
        with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
            return AutogradJacobian.at(lambda z: fn(z, x.detach()), z, lambda _: None)

    operator = ResidualJacobian(record(False), shifted=True, record=lambda: record(True))
    b = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = ti.Neumann(mixed_precision=True).solve(operator, b, 3e-6)
    exact = torch.linalg.solve(operator.dense().double(), b.double())
    assert found.solved
    assert fn.seen == [False, True]
    assert ((b - operator.mv(found.value)).norm(dim=1) <= 3.1e-6 * b.norm(dim=1)).all()
    torch.testing.assert_close(found.value.double(), exact, rtol=0, atol=1e-4)


def test_the_next_look_is_where_the_residual_is_expected_to_be_small() -> None:
    pace = Pace()
    assert pace.products(0.5) <= pace.products(0.1) <= pace.products(1e-9) == pace.products(_refinement.ROUGH_SYSTEM)
    pace.note(0.9**10, 10)
    slow = pace.products(0.5)
    pace.note(0.2**3, 3)
    assert pace.products(0.5) < slow
    before = pace.products(0.1)
    pace.note(1.0, 12)  # what did not fall tells nothing
    pace.note(0.5, 0)
    assert pace.products(0.1) == before
