"""`TanhEquilibrium(compiled=True)`: what it returns is what the layer returns without, whatever becomes of a sample."""

import copy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit import Status, _extension
from torchimplicit.nn import _compiled, _compiled_plan
from torchimplicit.nn._compiled_plan import plan_for
from torchimplicit.nn._shifted_tanh import shifted_tanh

pytestmark = pytest.mark.compiler
N = 20
ERROR = 4.0
"""Rounding units that the loops allow their tanh."""
PLAIN = ti.Picard(check_every=8, rtol=1e-11, atol=0.0)
EXACT = ti.Implicit(rtol=1e-12)


def make(radius: float = 0.7, dtype: torch.dtype = torch.float64, **options: object) -> ti.nn.TanhEquilibrium:
    torch.manual_seed(0)
    weight = torch.randn(N, N, dtype=torch.float64)
    weight = radius * weight / torch.linalg.eigvals(weight).abs().max()
    options.setdefault("compiled", True)
    layer = ti.nn.TanhEquilibrium(N, dtype=dtype, **options)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        layer.linear.weight.copy_(weight)
    return layer


def twin(layer: ti.nn.TanhEquilibrium) -> ti.nn.TanhEquilibrium:
    other = copy.deepcopy(layer)
    other.compiled = False
    return other


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def true_residual(layer: ti.nn.TanhEquilibrium, z: Tensor, x: Tensor) -> Tensor:
    z, x, weight = z.detach().double(), x.detach().double(), layer.linear.weight.detach().double()
    return torch.linalg.vector_norm(torch.tanh(z @ weight.t() + x) - z, dim=-1)


def dense_gradients(layer: ti.nn.TanhEquilibrium, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of W and x by the implicit function theorem, with a dense matrix for each sample."""
    z, v, weight = z.detach().double(), v.double(), layer.linear.weight.detach().double()
    slope = 1 - z * z
    matrix = torch.eye(N, dtype=torch.float64) - slope[:, :, None] * weight
    scaled = slope * torch.linalg.solve(matrix.mT, v)
    return scaled.t() @ z, scaled


@pytest.fixture
def looped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which loops were used, in order."""
    seen: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            seen.append(name)
            return getattr(tanh_loops(), name)

    tanh_loops = _compiled.tanh_loops
    monkeypatch.setattr(_compiled, "tanh_loops", Watched)
    return seen


def test_tanh_is_as_near_as_it_says() -> None:
    tanh = _compiled.tanh_loops().tanh
    bits = torch.arange(0x30000000, 0x41300000, 101, dtype=torch.int32)  # 5e-10 to 11
    p = torch.cat((bits.view(torch.float32), torch.tensor([0.0, 1e-30, 50.0, torch.inf])))
    for sign in (1.0, -1.0):
        true = torch.tanh(sign * p.double())
        error = (tanh(sign * p).double() - true).abs()
        assert bool((error <= ERROR * torch.finfo(torch.float32).eps * true.abs()).all())
        assert float(tanh(sign * p).abs().max()) <= 1.0
    assert bool(tanh(torch.tensor([torch.nan])).isnan())
    # Where torch's is 1 there is no slope left.
    far = torch.tensor([9.1, 20.0, 1e30, torch.inf])
    assert tanh(far).tolist() == [1.0] * 4 and tanh(-far).tolist() == [-1.0] * 4
    q = draw(5)
    torch.testing.assert_close(tanh(q), torch.tanh(q), rtol=0, atol=0)


@pytest.mark.parametrize("solver", [None, ti.Picard(check_every=8, extrapolate_every=8)], ids=["default", "picard"])
def test_single_precision(solver: ti.Picard | None, looped: list[str]) -> None:
    layer = make(dtype=torch.float32, solver=solver)
    x, v = draw(50, N, dtype=torch.float32).requires_grad_(), draw(50, N, dtype=torch.float32, seed=2)
    found = layer.solve(x)
    assert bool(found.converged.all()) and int(found.status.abs().max()) == 0 and found.trace is None
    # The tolerance holds of the true tanh, not only of the one in the loop.
    true = true_residual(layer, found.value, x)
    value = torch.linalg.vector_norm(found.value.detach().double(), dim=1)
    assert bool((true <= (torch.finfo(torch.float32).eps ** (2 / 3)) * 1.01 * value).all())
    torch.testing.assert_close(found.residual.double(), true / N**0.5, rtol=0.1, atol=2e-7)
    assert 8 <= int(found.steps.max()) <= 40 and found.evaluations >= int(found.steps.max()) + 1
    found.value.backward(v)
    assert looped == [*(["shifted"] if solver is None else []), "solution", "gradient"]
    exact = twin(layer).double().solve(x.detach().double()).value
    torch.testing.assert_close(found.value.detach().double(), exact.detach(), rtol=1e-4, atol=5e-5)
    assert layer.linear.weight.grad is not None and x.grad is not None
    for grad, true in zip((layer.linear.weight.grad, x.grad), dense_gradients(layer, exact, v), strict=True):
        assert float((grad - true).norm() / true.norm()) < 1e-4
    report = found.adjoint
    assert report.status is not None and report.residual is not None and report.steps is not None
    assert int(report.status.abs().max()) == 0 and float(report.residual.max()) <= 2.5e-5
    assert report.evaluations is not None and report.evaluations > int(report.steps.max()) > 0


def test_gradients_against_differences_and_a_dense_solve(looped: list[str]) -> None:
    layer = make(solver=PLAIN, adjoint=EXACT)
    weight = layer.linear.weight.detach().clone().requires_grad_()
    x, v = draw(3, N).requires_grad_(), draw(3, N, seed=2)

    def solution(weight: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            layer.linear.weight.copy_(weight)
        z = layer(x)
        if not weight.requires_grad:
            return z
        grads = torch.autograd.grad(z, (layer.linear.weight, x), v, retain_graph=True)
        seen.append(grads)
        return z

    seen: list[tuple[Tensor, ...]] = []
    z = solution(weight, x)
    (of_weight, of_x), step = seen[0], 1e-6
    for true, found in zip(dense_gradients(layer, z, v), (of_weight, of_x), strict=True):
        torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-10)
    for place in ((0, 3), (7, 7), (19, 2)):
        sides = []
        for sign in (1.0, -1.0):
            moved = weight.detach().clone()
            moved[place] += sign * step
            with torch.no_grad():
                sides.append(float((solution(moved, x) * v).sum()))
        torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), float(of_weight[place]), rtol=1e-5, atol=1e-7)
    assert "solution" in looped and "gradient" in looped


def test_second_derivatives_and_transforms() -> None:
    layer = make(solver=PLAIN, adjoint=EXACT)
    plain = twin(layer)
    x, v, w = draw(3, N), draw(3, N, seed=2), draw(3, N, seed=3)

    def second(layer: ti.nn.TanhEquilibrium) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        cotangent = v.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(leaf), leaf, cotangent, create_graph=True)
        return torch.autograd.grad(first, (leaf, cotangent, layer.linear.weight), w)

    def lanes(layer: ti.nn.TanhEquilibrium) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf), leaf, torch.stack((v, w)), is_grads_batched=True)

    def jacobian(layer: ti.nn.TanhEquilibrium) -> tuple[Tensor, ...]:
        return (torch.func.jacrev(layer)(x[:2]),)

    def tangent(layer: ti.nn.TanhEquilibrium) -> tuple[Tensor, ...]:
        return torch.func.jvp(layer, (x,), (v,))

    def mapped(layer: ti.nn.TanhEquilibrium) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        z = layer(leaf)
        return (torch.func.vmap(lambda u: torch.autograd.grad(z, leaf, u, retain_graph=True)[0])(torch.stack((v, w))),)

    for derivative in (second, lanes, jacobian, tangent, mapped):
        for found, true in zip(derivative(layer), derivative(plain), strict=True):
            torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(N,), (1, N), (2, N), (37, N), (2, 3, N), (0, N)], ids=str)
def test_any_number_of_samples_and_dims(shape: tuple[int, ...], looped: list[str]) -> None:
    layer = make(solver=PLAIN)
    plain = twin(layer)
    x = draw(*shape).requires_grad_()
    found, true = layer.solve(x), plain.solve(x)
    assert looped == (["solution"] if x.numel() else [])
    torch.testing.assert_close(found.value, true.value, rtol=1e-8, atol=1e-9)
    for name in ("status", "converged", "residual", "steps"):
        assert getattr(found, name).shape == shape[:-1], name
    assert bool((found.steps % 8 == 0).all())
    (one,), (two,) = (torch.autograd.grad(s.value.sum(), x) for s in (found, true))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_no_sample_depends_on_another() -> None:
    layer = make(solver=PLAIN)
    x = draw(6, N)
    found = layer.solve(x)
    other = x.clone()
    other[3] *= 1e-3
    other[4] = torch.nan
    layer.on_failure = "ignore"
    again = layer.solve(other)
    rows = [0, 1, 2, 5]
    # A product of a batch of another size may be rounded otherwise.
    torch.testing.assert_close(again.value[rows], found.value[rows], rtol=0, atol=1e-15)
    assert bool((again.steps[rows] == found.steps[rows]).all())
    assert int(again.status[4]) == int(Status.NONFINITE) and bool(again.value.isfinite().all())
    assert bool((layer.solve(torch.zeros(3, N, dtype=torch.float64)).steps == 0).all())


@pytest.mark.parametrize("max_steps", [None, 24])
def test_samples_that_do_not_converge_are_told_as_ever(max_steps: int | None, looped: list[str]) -> None:
    layer = make(radius=3.0, solver=PLAIN, max_steps=max_steps, on_failure="ignore")
    plain = twin(layer)
    x = draw(8, N)
    x[:3] *= 30.0  # saturated: these converge at once
    x.requires_grad_()
    found, true = layer.solve(x), plain.solve(x)
    assert looped == ["solution"]
    assert 0 < int(found.converged.sum()) < 8
    assert found.status.tolist() == true.status.tolist() and found.steps.tolist() == true.steps.tolist()
    torch.testing.assert_close(found.value, true.value, rtol=1e-8, atol=1e-8)
    for a, b in ((layer, plain), (layer, plain)):
        (one,), (two,) = (torch.autograd.grad(m(x).sum(), x) for m in (a, b))
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)
    layer.adjoint = ti.Implicit(unconverged="zero")
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert bool((grad[~found.converged] == 0).all()) and bool((grad[found.converged] != 0).any())
    layer.on_failure = "raise"
    with pytest.raises(ti.ConvergenceError, match="did not converge"):
        layer(x)


def test_an_adjoint_that_does_not_converge_is_solved_otherwise() -> None:
    # Solvable, but its series takes thousands of terms.
    layer = make(radius=0.5, solver=PLAIN)
    with torch.no_grad():
        layer.linear.weight.copy_(0.9995 * torch.eye(N, dtype=torch.float64))
    x = 1e-4 * draw(4, N).sign()
    layer.solver = ti.Picard(check_every=8, rtol=1e-11, atol=0.0, extrapolate_every=8)
    x.requires_grad_()
    found = layer.solve(x)
    assert bool(found.converged.all())
    v = draw(4, N, seed=2)
    found.value.backward(v)
    true = dense_gradients(layer, found.value, v)
    assert x.grad is not None and layer.linear.weight.grad is not None
    torch.testing.assert_close(x.grad, true[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(layer.linear.weight.grad, true[0], rtol=1e-6, atol=1e-9)
    assert found.adjoint.status is not None and int(found.adjoint.status.abs().max()) == 0


def test_newton_goes_on_where_the_plain_steps_end(looped: list[str]) -> None:
    solver = ti.Newton(warmup=12, check_every=12, rtol=1e-11)
    layer = make(radius=0.95, solver=solver, adjoint=EXACT)
    x, v = draw(5, N).requires_grad_(), draw(5, N, seed=2)
    found = layer.solve(x)
    assert looped == ["solution"] and bool(found.converged.all())
    assert bool((found.steps > 12).all()) and bool((found.steps < 24).all())
    assert float(true_residual(layer, found.value, x).max()) < 1e-9
    found.value.backward(v)
    assert looped == ["solution", "gradient"]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense_gradients(layer, found.value, v)[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "linear",
    [
        {"linear_solver": ti.GMRES(restart=6, max_steps=18)},
        {"linear_solver": ti.Cascade(dense_limit=0), "forcing": 0.03},
        {"linear_solver": ti.Cascade(dense_limit=0), "atol": 1e-3},
        {},
    ],
    ids=["restarted", "forced", "absolute", "default"],
)
def test_newtons_steps_for_the_few_that_are_left(
    dtype: torch.dtype, linear: dict[str, Any], looped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = ti.NewtonKrylov(warmup=12, check_every=12, **linear)
    layer = make(radius=0.97, solver=solver, adjoint=ti.Implicit(rtol=1e-5), dtype=dtype)

    def refuse(*_: object) -> None:
        raise AssertionError("the loop left something")

    x = draw(8, N, dtype=dtype)
    x[:5] *= 0.02  # nearly linear: these are slow
    with monkeypatch.context() as patch:
        patch.setattr(_compiled, "_finish", refuse)
        found = layer.solve(x)
    assert looped == ["solution"] and bool(found.converged.all())
    assert 13 <= int(found.steps.max()) <= 22 and found.evaluations >= int(found.steps.max())
    true = true_residual(layer, found.value, x)
    value = torch.linalg.vector_norm(found.value.detach().double(), dim=1)
    limit = (torch.finfo(dtype).eps ** (2 / 3) + 2 * torch.finfo(dtype).eps) * value
    if solver.atol is not None:
        limit = limit + solver.atol * N**0.5
    assert bool((true <= limit).all())
    torch.testing.assert_close(found.residual.double(), true / N**0.5, rtol=0.1, atol=2 * torch.finfo(dtype).eps)


def test_what_newtons_steps_cannot_do_is_done_as_ever() -> None:
    solver = ti.NewtonKrylov(warmup=12, check_every=12)
    many = 24  # more than are solved one by one
    for radius, batch in ((0.97, many), (4.0, 6)):
        layer = make(radius=radius, solver=solver, on_failure="ignore")
        x = 0.1 * draw(batch, N)
        found, true = layer.solve(x), twin(layer).solve(x)
        assert found.status.tolist() == true.status.tolist()
        done = found.converged
        assert bool(done.any())
        assert float(true_residual(layer, found.value[done], x[done]).max()) < 1e-8
        if radius < 1:  # elsewhere there may be several
            torch.testing.assert_close(found.value, true.value, rtol=1e-6, atol=1e-7)


def test_a_newton_step_that_is_none_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = ti.NewtonKrylov(warmup=12, check_every=12)
    layer = make(radius=6.0, solver=solver, on_failure="ignore")
    plan = plan_for(solver, None, None, N, torch.float64)
    assert plan is not None and plan.resumes
    x, left = draw(12, N), []
    finish = _compiled._finish

    def watch(*args: Any) -> Any:
        left.append(args[3])
        reached.append(args[1])
        return finish(*args)

    reached: list[Tensor] = []
    monkeypatch.setattr(_compiled, "_finish", watch)
    found = layer.solve(x)
    tensors = layer.linear.weight.detach(), x, torch.zeros_like(x)
    before, *_ = _compiled.tanh_loops().solution(*tensors, None, 0.0, *plan.limits, *plan.forward, 0, 0, 0.0, 0.0, 1.0)
    assert len(left[0])  # some of whom Newton's steps are of no use
    now, then = (true_residual(layer, z[left[0]], x[left[0]]) for z in (reached[0], before))
    assert bool((now <= then).all())
    # What is still left is told.
    x[2] = torch.nan
    found = layer.solve(x)
    assert int(found.status[2]) == int(Status.NONFINITE) and not bool(found.converged[2])
    assert found.converged.tolist() == (found.status == int(Status.CONVERGED)).tolist()


@pytest.mark.parametrize("batch", [1, 7, 40])
@pytest.mark.parametrize("every", [None, 4])
def test_mixed_precision(batch: int, every: int | None, looped: list[str]) -> None:
    series = ti.Neumann(mixed_precision=True)
    solver = ti.Picard(mixed_precision=True, check_every=every or 1, extrapolate_every=every)
    layer = make(dtype=torch.float32, solver=solver, adjoint=ti.Implicit(linear_solver=series))
    x, v = draw(batch, N, dtype=torch.float32).requires_grad_(), draw(batch, N, dtype=torch.float32, seed=2)
    found = layer.solve(x)
    assert bool(found.converged.all())
    true = true_residual(layer, found.value, x)
    value = torch.linalg.vector_norm(found.value.detach().double(), dim=1)
    assert bool((true <= torch.finfo(torch.float32).eps ** (2 / 3) * 1.01 * value).all())
    torch.testing.assert_close(found.residual.double(), true / N**0.5, rtol=0.1, atol=2e-7)
    found.value.backward(v)
    assert looped == ["solution", "gradient"]
    exact = twin(layer).double().solve(x.detach().double()).value
    assert layer.linear.weight.grad is not None and x.grad is not None
    for grad, dense in zip((layer.linear.weight.grad, x.grad), dense_gradients(layer, exact, v), strict=True):
        assert float((grad - dense).norm() / dense.norm()) < 1e-4
    report = found.adjoint
    assert report.residual is not None and float(report.residual.max()) <= 2.5e-5
    # With nothing but bfloat16 the residual would be a thousand times as large.
    double = make(solver=solver, adjoint=ti.Implicit(linear_solver=series))
    assert float(true_residual(double, double(x.detach().double()), x).max()) < 1e-9


def test_mixed_precision_where_it_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    solver, adjoint = ti.Picard(mixed_precision=True), ti.Implicit(linear_solver=ti.Neumann(mixed_precision=True))
    for fast, dtype, expected in (
        (True, torch.float32, True),
        (True, torch.float64, False),
        (False, torch.float32, False),
    ):
        monkeypatch.setattr(_compiled_plan, "coarse_dtype", lambda _, fast=fast: torch.bfloat16 if fast else None)
        _compiled_plan._made.cache_clear()
        plan = plan_for(solver, adjoint, None, N, dtype)
        assert plan is not None and plan.forward[3] == plan.backward[3] == expected
    _compiled_plan._made.cache_clear()


def test_mixed_precision_where_it_does_not_converge(looped: list[str]) -> None:
    solver = ti.Picard(mixed_precision=True)
    layer = make(radius=3.0, dtype=torch.float32, solver=solver, max_steps=200, on_failure="ignore")
    x = draw(8, N, dtype=torch.float32)
    x[:3] *= 30.0
    x[3] = torch.nan
    found, true = layer.solve(x), twin(layer).solve(x)
    assert looped == ["solution"]
    assert bool(found.converged[:3].all()) and int(found.status[3]) == int(Status.NONFINITE)
    assert found.converged.tolist() == true.converged.tolist()
    done = found.converged
    assert bool((true_residual(layer, found.value[done], x[done]) < 1e-4).all())


@pytest.mark.parametrize(
    "solver",
    [
        None,
        ti.PreconditionedPicard(check_every=6, rtol=1e-11, atol=0.0),
        PLAIN,
        ti.Picard(check_every=8, extrapolate_every=8, rtol=1e-11, atol=0.0),
        ti.Picard(mixed_precision=True, check_every=8),
    ],
    ids=["default", "preconditioned", "plain", "extrapolated", "mixed"],
)
def test_a_loop_does_it_by_itself(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In about as many evaluations as the solver takes: nothing is left to hide a mistake in the steps."""
    mixed = solver is not None and solver.mixed_precision
    dtype = torch.float32 if mixed else torch.float64
    series = ti.Cascade(small=0, neumann=ti.Neumann(mixed_precision=mixed))
    adjoint = ti.Implicit(rtol=1e-5 if mixed else 1e-11, linear_solver=series)
    layer = make(radius=0.9, solver=solver, adjoint=adjoint, dtype=dtype)
    plain = twin(layer)
    x, v = 0.3 * draw(9, N, dtype=dtype), draw(9, N, dtype=dtype, seed=2)
    x.requires_grad_()
    true = plain.solve(x)
    (true_gradient,) = torch.autograd.grad(true.value, x, v)

    def refuse(*_: object) -> None:
        raise AssertionError("the loop left something")

    monkeypatch.setattr(_compiled, "_finish", refuse)
    monkeypatch.setattr(_compiled._Backward, "thoroughly", refuse)
    found = layer.solve(x)
    (gradient,) = torch.autograd.grad(found.value, x, v)
    close = {"rtol": 1e-4, "atol": 1e-4} if mixed else {"rtol": 1e-8, "atol": 1e-9}
    torch.testing.assert_close(found.value, true.value, **close)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(gradient, true_gradient, **close)  # pyright: ignore[reportArgumentType]
    if not mixed:
        assert found.evaluations <= 1.2 * true.evaluations + 12
        assert found.adjoint.evaluations is not None and true.adjoint.evaluations is not None
        assert found.adjoint.evaluations <= 1.2 * true.adjoint.evaluations + 12


def test_a_wrong_matrix_costs_time_and_never_truth() -> None:
    """The residual is that of the equation, whatever the steps are made with."""
    layer, x = make(radius=0.9), 0.3 * draw(5, N)
    weight = layer.linear.weight.detach()
    product, shift = _compiled.tanh_loops().shifted(weight)
    limits, pace, no_newton = (1e-6, 0.0, 0.0), (100_000, 6, False, False, 100, 0.99), (0, 0, 0.0, 0.0)
    for error in (1.0, 1.001):
        z, _, norm, _, done, evaluations, clean = _compiled.tanh_loops().solution(
            weight, x, torch.zeros_like(x), error * product, shift, *limits, *pace, *no_newton, 1.0
        )
        assert clean == bool(done.all()) == (error == 1.0)
        assert evaluations < 400  # who does not come on is given up
        torch.testing.assert_close(norm, true_residual(layer, z, x), rtol=1e-6, atol=1e-14)


def test_a_block_of_products_in_bfloat16() -> None:
    layer, x, v = make(radius=0.9, dtype=torch.float32), draw(5, N), draw(5, N, seed=2)
    value = layer(x.float()).detach()
    weight, slope = layer.linear.weight.detach().double(), 1 - value.double() ** 2
    term, series = v, v.clone()
    for _ in range(3):
        term = (slope * term) @ weight
        series += term
    pace = (3, 3, True, True, 100, 0.7)
    tensors = layer.linear.weight.detach(), value, value, v.float()
    found, *_ = _compiled.tanh_loops().gradient(*tensors, None, 0.0, 1e-9, *pace, False)
    assert float((found - slope * series).norm() / (slope * series).norm()) < 0.01


def test_extrapolation_ends_where_it_is_of_no_use() -> None:
    """Sample by sample, as in `Picard(extrapolate_every=4)`: with a matrix that is far from normal."""
    generator = torch.Generator().manual_seed(3)
    normal, upper = (torch.randn(N, N, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = normal + torch.triu(2 * upper)
    layer = make(solver=ti.Picard(rtol=1e-10, atol=0.0, check_every=4, extrapolate_every=4))
    with torch.no_grad():
        layer.linear.weight.copy_(0.96 * weight / torch.linalg.eigvals(weight).abs().max())
    x = 1e-2 * draw(6, N)
    found, true = layer.solve(x), twin(layer).solve(x)
    assert bool(found.converged.all()) and int(true.steps.max() - true.steps.min()) > 40
    assert int((found.steps - true.steps).abs().max()) <= 16


def test_a_residual_must_have_fallen_to_be_evidence() -> None:
    layer = make(solver=ti.Picard(check_every=8, rtol=1e-3, atol=0.0))
    with torch.no_grad():
        layer.linear.weight.copy_(0.99 * torch.eye(N, dtype=torch.float64))
    x = 1e-7 * draw(3, N).sign()
    solution = 100 * x
    start = 1.115 * solution  # where the residual is just above the tolerance
    found, true = layer.solve(x, start=start), twin(layer).solve(x, start=start)
    assert bool(found.converged.all()) and found.steps.tolist() == true.steps.tolist()
    assert int(found.steps.min()) > 32  # after eight it is below, but by no half of it


def test_a_residual_that_rounding_hides_is_no_evidence() -> None:
    layer = make(solver=ti.Picard(check_every=8, rtol=0.0, atol=1e-19), max_steps=64, on_failure="ignore")
    x = draw(3, N)
    layer.solver = ti.Picard(check_every=8, rtol=0.0, atol=1e-30)
    solution = layer.solve(x).value.detach()
    start = solution * (1 + torch.finfo(torch.float64).eps)
    found, true = layer.solve(x, start=start), twin(layer).solve(x, start=start)
    assert found.status.tolist() == true.status.tolist()
    assert not bool(found.converged.any())


def test_a_start_that_is_not_finite_is_no_measure() -> None:
    """Nor is one whose square overflows: a residual that fell from infinity is no small one."""
    layer = make(solver=ti.Picard(check_every=1), on_failure="ignore")
    x = draw(4, N)
    start = torch.zeros_like(x)
    start[1, 3], start[2, 3] = torch.inf, 1e200
    found, true = layer.solve(x, start=start), twin(layer).solve(x, start=start)
    assert found.status.tolist() == true.status.tolist() and found.steps.tolist() == true.steps.tolist()
    assert bool((true_residual(layer, found.value[found.converged], x[found.converged]) < 1e-8).all())


@pytest.mark.parametrize("solver", [None, PLAIN], ids=["preconditioned", "plain"])
def test_a_gradient_whose_square_overflows(solver: ti.Picard | None) -> None:
    layer = make(solver=solver)
    x, v = draw(3, N).requires_grad_(), draw(3, N, seed=2)
    (true,) = torch.autograd.grad(layer(x), x, v)
    (huge,) = torch.autograd.grad(layer(x), x, v * 2.0**600)
    torch.testing.assert_close(huge / 2.0**600, true, rtol=1e-3, atol=1e-4)


def test_a_tiny_gradient_is_not_taken_for_zero() -> None:
    for dtype, size in ((torch.float64, 1e-200), (torch.float32, 1e-30)):
        layer = make(solver=None, dtype=dtype)
        x = draw(3, N, dtype=dtype).requires_grad_()
        v = draw(3, N, dtype=dtype, seed=2)
        (true,) = torch.autograd.grad(layer(x), x, v)
        (tiny,) = torch.autograd.grad(layer(x), x, v * size)
        torch.testing.assert_close(tiny / size, true, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weight", ["small", "large", "defective"])
def test_the_matrix_of_the_shifted_steps(weight: str) -> None:
    """In single precision it is a series, where that converges fast enough."""
    n = 30
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) / n**0.5
    if weight == "large":
        matrix = 20 * matrix
    if weight == "defective":  # not normal: powers grow before they fall
        matrix = torch.diag_embed(torch.full((n - 1,), 8.0), offset=1) + 0.5 * torch.eye(n)
    for dtype in (torch.float32, torch.float64):
        w = matrix.to(dtype)
        product, shift = _compiled.tanh_loops().shifted(w)
        expected = shifted_tanh(w)
        assert expected is not None
        assert shift == pytest.approx(expected.shift, rel=1e-4)
        true = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - shift * w.double(), w.double()).T
        assert float((product - true).norm() / true.norm()) < 50 * torch.finfo(dtype).eps
    zero, shift = _compiled.tanh_loops().shifted(torch.zeros(3, 3))
    assert shift == 0.5 and not bool(zero.any())
    for bad in (torch.nan, torch.inf):
        assert _compiled.tanh_loops().shifted(torch.full((3, 3), bad))[0] is None


@pytest.mark.parametrize(
    "options",
    [
        {"solver": ti.Anderson()},
        {"solver": ti.Picard(damping=0.9)},
        {"solver": ti.Picard(norm="max")},
        {"adjoint": ti.JacobianFree()},
        {"adjoint": ti.Implicit(linear_solver=ti.LU())},
        {"adjoint": ti.Implicit(warm_start=ti.WarmStart())},
        {"depth": 3},
    ],
    ids=["anderson", "damped", "largest", "jacobian-free", "lu", "warm-start", "depth"],
)
def test_what_is_not_compiled_is_solved_as_ever(options: dict[str, object], looped: list[str]) -> None:
    layer = make(**options)  # pyright: ignore[reportArgumentType]
    x = draw(4, N).requires_grad_()
    (one,), (two,) = (torch.autograd.grad(m(x).sum(), x) for m in (layer, twin(layer)))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        make()(x)
    make().solve(x, trace=True)
    assert looped == []


def test_a_start_and_a_memory() -> None:
    layer = make(solver=PLAIN, init=ti.nn.Previous())
    x = draw(4, N)
    first, again = layer.solve(x), layer.solve(x)
    assert bool((first.steps > 0).all()) and bool((again.steps == 0).all())
    torch.testing.assert_close(again.value, first.value, rtol=0, atol=0)
    start = layer.solve(x + 1e-3, start=first.value.detach())
    assert bool(start.converged.all()) and bool((start.steps <= first.steps).all())
    # What would be the value if the start were zero.
    layer.init = None
    other, true = (m.solve(x, start=torch.tanh(x)) for m in (layer, twin(layer)))
    assert other.steps.tolist() == true.steps.tolist() and int(other.steps.min()) > 0


def test_a_weight_changed_before_the_backward_pass_is_an_error() -> None:
    layer = make(solver=PLAIN)
    z = layer(draw(3, N).requires_grad_())
    with torch.no_grad():
        layer.linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_parametrized_weight_learns() -> None:
    layer = make(solver=PLAIN, adjoint=EXACT)
    torch.nn.utils.parametrizations.weight_norm(layer.linear)
    x = draw(3, N)
    grads = []
    for m in (layer, twin(layer)):
        m(x).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


def test_no_compiler_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_compiled, "tanh_loops", _compiled.tanh_loops.__wrapped__)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler.*CXX.*leave compiled=True out.*no-such-compiler"):
        make()(draw(3, N))
    monkeypatch.setenv("CXX", f"{shlex.quote(sys.executable)} -c 'import sys; sys.exit(\"so it fails\")'")
    with pytest.raises(RuntimeError, match="so it fails"):
        make()(draw(3, N))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(_extension, "_COMPILERS", ("no-such-compiler",))
    with pytest.raises(RuntimeError, match="none was found"):
        make()(draw(3, N))
    with pytest.raises(TypeError, match="compiled=1 is not valid"):
        ti.nn.TanhEquilibrium(3, compiled=1)  # pyright: ignore[reportArgumentType]


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of the user's, under a name that another source does not have."""
    source = tmp_path / "_one"
    source.mkdir()
    (source / "operators.cpp").write_text('#include "one.h"\n')
    (source / "one.h").write_text("int one() { return 1; }\n")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = _extension.library(source, _extension.library_folder())
    assert made.parent == tmp_path / "cache" / "torchimplicit" and made.exists()
    when = made.stat().st_mtime_ns
    assert _extension.library(source, made.parent) == made and made.stat().st_mtime_ns == when
    (source / "one.h").write_text("int one() { return 2; }\n")
    assert _extension.library(source, made.parent) != made
    assert len(list(made.parent.iterdir())) == 2
    # Where there is no such folder, it is kept for this process alone.
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = _extension.library_folder()
    assert folder.parent == tmp_path and folder.name.startswith("torchimplicit-")
    assert _extension.library(source, folder).exists()
