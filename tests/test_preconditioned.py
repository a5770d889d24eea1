"""`PreconditionedPicard`: steps of `TanhEquilibrium` that contract faster, and the adjoint by the same matrix."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torchimplicit as ti
from torchimplicit.nn import _equilibrium, _shifted_tanh
from torchimplicit.nn._shifted_tanh import ShiftedTanh, shifted_tanh

N, BATCH = 24, 40  # more than the direct solver of the adjoint takes
SOLVER = ti.PreconditionedPicard(check_every=8)


def _weight(radius: float = 0.9, n: int = N, seed: int = 0) -> Tensor:
    weight = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weight * (radius / torch.linalg.eigvals(weight).abs().max())


def _inputs(batch: int = BATCH, n: int = N, seed: int = 1) -> Tensor:
    return torch.randn(batch, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _layer(weight: Tensor, **options: object) -> ti.nn.TanhEquilibrium:
    layer = ti.nn.TanhEquilibrium(weight.shape[0], dtype=weight.dtype, **{"solver": SOLVER, **options})  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        layer.linear.weight.copy_(weight)
    return layer


def _solution(weight: Tensor, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(3000):
        z = torch.tanh(z @ weight.T + x)
    assert float((torch.tanh(z @ weight.T + x) - z).abs().max()) < 1e-13
    return z


def _form(weight: Tensor) -> ShiftedTanh:
    form = shifted_tanh(weight)
    assert form is not None
    return form


WEIGHTS = {
    "random": _weight(),
    "large": _weight(1.1),
    "symmetric": (lambda w: 0.95 * (w + w.T) / torch.linalg.eigvalsh(w + w.T).abs().max())(_weight()),
    "orthogonal": 0.95 * torch.linalg.qr(_weight())[0],
    "non-negative": (lambda w: 0.98 * w / torch.linalg.eigvals(w).abs().max())(_weight().abs()),
    "nilpotent": _weight().triu(1),
    "zero": torch.zeros(N, N, dtype=torch.float64),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_solution_is_that_of_plain_steps_which_need_more(name: str) -> None:
    weight, x = WEIGHTS[name], _inputs()
    found = _layer(weight, solver=ti.PreconditionedPicard()).solve(x)
    plain = _layer(weight, solver=ti.Picard()).solve(x)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, _solution(weight, x), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(found.residual, _residual(weight, x, found.value), rtol=1e-3, atol=1e-15)
    assert int(found.steps.max()) <= int(plain.steps.max())
    if name not in ("zero", "nilpotent"):
        assert float(found.steps.double().mean()) < 0.7 * float(plain.steps.double().mean())


def _residual(weight: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (torch.tanh(z @ weight.T + x) - z).square().mean(dim=1).sqrt()


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("radius", [0.9, 2.0])
def test_a_step_is_newtons_with_one_slope(radius: float, times: int) -> None:
    weight, x, z = _weight(radius), _inputs(), _inputs(seed=2)
    form = _form(weight)
    matrix = torch.linalg.inv(torch.eye(N, dtype=torch.float64) - form.shift * weight)
    found, value = form.repeat(z, times, x)
    for _ in range(times):
        z = z + (torch.tanh(z @ weight.T + x) - z) @ matrix.T
    torch.testing.assert_close(found, z, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(value, torch.tanh(z @ weight.T + x), rtol=1e-11, atol=1e-11)


def test_blocks_of_steps_are_the_steps() -> None:
    weight, x = _weight(), _inputs()
    form = _form(weight)
    z = torch.zeros_like(x)
    whole, _ = form.repeat(z, 6, x)
    for _ in range(3):
        z, _ = form.repeat(z, 2, x)
    torch.testing.assert_close(z, whole, rtol=1e-12, atol=1e-12)
    # What is remembered of a state belongs to that state alone.
    other = _inputs(seed=3)
    torch.testing.assert_close(form.repeat(other, 1, x)[0], _form(weight).repeat(other, 1, x)[0])


def test_the_trace_is_of_the_same_steps() -> None:
    layer, x = _layer(_weight(), solver=ti.PreconditionedPicard()), _inputs()
    traced = layer.solve(x, trace=True)
    assert traced.trace is not None
    torch.testing.assert_close(traced.steps, layer.solve(x).steps)
    torch.testing.assert_close(traced.value, layer.solve(x).value)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("terms", [1, 3, 4, 5, 16])
def test_an_approach_tells_what_it_leaves(terms: int, transposed: bool) -> None:
    weight, x, p = _weight(), _inputs(), _inputs(seed=4)
    z = _solution(weight, x)
    jacobian = _form(weight).linearize(z, z, x)
    dense = (1 - z**2)[:, :, None] * weight
    matrix = torch.eye(N, dtype=torch.float64) - (dense.mT if transposed else dense)
    u, rest = jacobian.approach(p, terms, transposed)
    torch.testing.assert_close(rest, p - (matrix @ u[:, :, None])[:, :, 0], rtol=1e-10, atol=1e-12)
    if terms == 16:
        assert float((rest.norm(dim=1) / p.norm(dim=1)).max()) < 1e-3
    some = torch.tensor([3, 5, 30])
    part = jacobian.select(some).approach(p[some], terms, transposed)
    torch.testing.assert_close(part[0], u[some])
    torch.testing.assert_close(part[1], rest[some])


@pytest.mark.parametrize("solver", [SOLVER, ti.Auto()], ids=["preconditioned", "auto"])
@pytest.mark.parametrize("name", ["random", "large", "symmetric"])
def test_the_gradient_is_that_of_the_dense_system(name: str, solver: ti.solvers.Method) -> None:
    weight, x, v = WEIGHTS[name], _inputs().requires_grad_(), _inputs(seed=5)
    layer = _layer(weight, solver=solver)
    solution = layer.solve(x)
    solution.value.backward(v)
    z = _solution(weight, x.detach())
    slope = 1 - z**2
    matrix = torch.eye(N, dtype=torch.float64) - slope[:, :, None] * weight
    u = slope * torch.linalg.solve(matrix.mT, v[:, :, None])[:, :, 0]
    assert x.grad is not None
    assert bool((solution.adjoint.status == int(ti.Status.CONVERGED)).all())
    torch.testing.assert_close(x.grad, u, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(layer.linear.weight.grad, u.T @ z, rtol=1e-7, atol=1e-7)


def test_derivatives_against_finite_differences() -> None:
    options = {"rtol": 1e-13, "atol": 1e-14}
    layer = _layer(_weight(0.8, 4), solver=ti.PreconditionedPicard(check_every=4, **options))  # pyright: ignore[reportArgumentType]
    x, weight = _inputs(3, 4).requires_grad_(), layer.linear.weight

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"cell.linear.weight": weight}, x)

    assert torch.autograd.gradcheck(function, (x, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, weight))


def test_forward_mode_is_that_of_the_dense_system() -> None:
    weight, x, t = _weight(), _inputs(), _inputs(seed=6)
    z = _solution(weight, x)
    slope = 1 - z**2
    matrix = torch.eye(N, dtype=torch.float64) - slope[:, :, None] * weight
    expected = torch.linalg.solve(matrix, (slope * t)[:, :, None])[:, :, 0]
    _, tangent = torch.func.jvp(_layer(weight), (x,), (t,))
    torch.testing.assert_close(tangent, expected, rtol=1e-7, atol=1e-8)


def test_a_truncated_series_stays_what_it_is() -> None:
    weight, x, v = _weight(), _inputs().requires_grad_(), _inputs(seed=5)
    layer = _layer(weight, adjoint=ti.NeumannSeries(terms=3))
    z = layer(x)
    (found,) = torch.autograd.grad(z, x, v)
    slope = 1 - z.detach() ** 2
    total = term = v
    for _ in range(3):
        term = (slope * term) @ weight
        total = total + term
    torch.testing.assert_close(found, slope * total, rtol=1e-9, atol=1e-10)


def _spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[ShiftedTanh], ShiftedTanh]) -> None:
    def make(weight: Tensor) -> ShiftedTanh | None:
        form = shifted_tanh(weight)
        return None if form is None else spoil(form)

    monkeypatch.setattr(_equilibrium, "shifted_tanh", make)


SPOILT: dict[str, Callable[[ShiftedTanh], ShiftedTanh]] = {
    "diverges": lambda form: ShiftedTanh(form.weight, form.shift, -8 * form.product),
    "another equation": lambda form: ShiftedTanh(form.weight, form.shift, 0.5 * form.product),
    "rounded": lambda form: ShiftedTanh(form.weight, form.shift, form.product.bfloat16().double()),
    "other weights": lambda form: ShiftedTanh(form.weight, form.shift, _form(_weight(seed=9)).product),
}


@pytest.mark.parametrize("check_every", [1, 8])
@pytest.mark.parametrize("solver", [ti.PreconditionedPicard, ti.Auto])
@pytest.mark.parametrize("name", SPOILT)
def test_a_wrong_matrix_costs_steps_and_nothing_else(
    name: str, solver: type[ti.solvers.Method], check_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoilt(monkeypatch, SPOILT[name])
    weight, x, v = _weight(0.7), _inputs().requires_grad_(), _inputs(seed=5)
    layer = _layer(weight, solver=solver(check_every=check_every))
    solution = layer.solve(x)
    solution.value.backward(v)
    z = _solution(weight, x.detach())
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.value, z, rtol=0.0, atol=1e-8)
    slope = 1 - z**2
    matrix = torch.eye(N, dtype=torch.float64) - slope[:, :, None] * weight
    u = slope * torch.linalg.solve(matrix.mT, v[:, :, None])[:, :, 0]
    torch.testing.assert_close(x.grad, u, rtol=1e-7, atol=1e-8)


def test_one_sample_that_goes_astray_disturbs_no_other() -> None:
    weight = 0.9 * torch.eye(N, dtype=torch.float64)

    class Astray(ShiftedTanh):
        def repeat(self, z: Tensor, times: int, x: Tensor) -> tuple[Tensor, Tensor]:
            z, _ = super().repeat(z, times, x)
            lost = x[:, :1] > 100
            z = torch.where(lost, -z + 1, z)
            return z, torch.tanh(z @ self.weight.T + x)

    class Cell(_equilibrium.TanhCell):
        def preconditioned(self) -> ShiftedTanh | None:
            form = shifted_tanh(self.linear.weight)
            return None if form is None else Astray(form.weight, form.shift, form.product)

    cell = Cell(N, dtype=torch.float64)
    with torch.no_grad():
        cell.linear.weight.copy_(weight)
    x = _inputs()
    x[7] = 0.01
    x[7, 0] = 200.0
    layer = ti.nn.FixedPoint(cell, solver=SOLVER)
    together, alone = layer.solve(x), layer.solve(torch.cat([x[:7], x[8:]]))
    assert bool(together.converged.all())
    others = torch.arange(BATCH) != 7
    torch.testing.assert_close(together.value[others], alone.value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(together.steps[others], alone.steps)
    assert int(together.steps[7]) > int(together.steps[others].max())


@pytest.mark.parametrize("entry", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_fail_as_they_do_with_plain_steps(entry: float) -> None:
    weight = _weight()
    weight[2, 3] = entry
    x = _inputs()
    for solver in (SOLVER, ti.Picard()):
        solution = _layer(weight, solver=solver, on_failure="ignore").solve(x)
        assert not bool(solution.converged.any())
        assert bool(solution.value.isfinite().all())


def test_a_singular_matrix_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shifted_tanh, "_spectral_radius", lambda _: 1.0)
    monkeypatch.setattr(_shifted_tanh, "_PART", 0.5)
    weight = torch.diag(torch.full((N,), 2.0, dtype=torch.float64))
    assert shifted_tanh(weight) is None
    assert bool(_layer(weight, solver=SOLVER).solve(_inputs()).converged.all())


@pytest.mark.parametrize("solver", [SOLVER, ti.Auto(check_every=8)], ids=["preconditioned", "auto"])
def test_a_sample_alone_takes_the_same_steps(solver: ti.solvers.Method) -> None:
    layer, x = _layer(_weight(), solver=solver), _inputs()
    together, alone = layer.solve(x), layer.solve(x[3:4])
    torch.testing.assert_close(together.value[3:4], alone.value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(together.steps[3:4], alone.steps)


def test_auto_begins_with_it() -> None:
    weight, x = _weight(), _inputs()
    found = _layer(weight, solver=ti.Auto()).solve(x)
    assert found.evaluations == _layer(weight, solver=SOLVER).solve(x).evaluations
    assert bool(found.converged.all())


@pytest.mark.parametrize("radius", [1.3, 2.0, 4.0])
def test_auto_goes_on_where_it_does_not_contract(radius: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = _weight(radius), _inputs()
    alone = _layer(weight, on_failure="ignore").solve(x)
    found = _layer(weight, solver=ti.Auto(), on_failure="ignore").solve(x)
    monkeypatch.setattr(_equilibrium, "shifted_tanh", lambda _: None)
    without = _layer(weight, solver=ti.Auto(), on_failure="ignore").solve(x)
    assert int(found.converged.sum()) >= int(alone.converged.sum())
    assert int(found.converged.sum()) >= int(without.converged.sum())
    assert float(_residual(weight, x, found.value.detach())[found.converged].max()) < 1e-8


@pytest.mark.parametrize("call", ["function", "root"])
def test_what_cannot_be_preconditioned_is_refused(call: str) -> None:
    x, cell = _inputs(), _equilibrium.TanhCell(N, dtype=torch.float64)
    calls: dict[str, Callable[[], object]] = {
        "function": lambda: ti.fixed_point(lambda z, x: 0.5 * z + x, torch.zeros_like(x), x, solver=SOLVER),
        "root": lambda: ti.root(cell, torch.zeros_like(x), x, solver=SOLVER),
    }
    with pytest.raises(ValueError, match=r"needs a cell with a method `preconditioned`.*use solver=torchimplicit"):
        calls[call]()


class _Steeper(_equilibrium.TanhCell):
    """Another map, of which nobody told the methods that know the first."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x) + 0.1


class _Told(_Steeper):
    """The same, which says of its Jacobian, but not of what else its parent can do."""

    def linearize(self, z: Tensor, value: Tensor, x: Tensor) -> object:
        cell = copy.copy(self)

        class Jacobian:
            slope = 0.5 * (1 - (value - 0.1).square())

            def mv(self, p: Tensor) -> Tensor:
                return self.slope * (p @ cell.linear.weight.detach().T)

            def rmv(self, u: Tensor) -> Tensor:
                return (self.slope * u) @ cell.linear.weight.detach()

            def dense(self) -> Tensor:
                return self.slope[:, :, None] * cell.linear.weight.detach()

        return Jacobian()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("solver", [SOLVER, ti.Picard(check_every=8), ti.Anderson(), ti.Auto()], ids=repr)
@pytest.mark.parametrize("cell", [_Steeper, _Told])
def test_a_subclass_with_another_map_is_solved_as_that(
    cell: type[_equilibrium.TanhCell], solver: ti.solvers.Method
) -> None:
    module = cell(N, dtype=torch.float64)
    with torch.no_grad():
        module.linear.weight.copy_(_weight(1.5))
    x = _inputs().requires_grad_()
    solution = ti.nn.FixedPoint(module, solver=solver).solve(x)
    z = torch.zeros(BATCH, N, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(2000):
            z = module(z, x)
    torch.testing.assert_close(solution.value, z, rtol=0.0, atol=1e-8)
    (grad,) = torch.autograd.grad(solution.value.sum(), x)
    assert grad.abs().min() > 0


class _Coupled(_equilibrium.TanhCell):
    """A map that couples its samples, and has inherited the promise not to."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x) + 0.2 * z.mean(dim=0)


def test_a_promise_older_than_the_forward_is_none() -> None:
    module = _Coupled(N, dtype=torch.float64)
    with torch.no_grad():
        module.linear.weight.copy_(_weight(0.7))
    x = _inputs() * torch.linspace(0.1, 10, BATCH, dtype=torch.float64)[:, None]
    solution = ti.nn.FixedPoint(module, solver=ti.Picard()).solve(x)
    with torch.no_grad():
        assert float((module(solution.value, x) - solution.value).norm()) < 1e-7


@pytest.mark.parametrize("solver", [SOLVER, ti.Auto()], ids=["preconditioned", "auto"])
def test_a_weight_that_is_drawn_is_read_once(solver: ti.solvers.Method) -> None:
    class Drawn(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return nn.functional.dropout(weight, 0.2, training=True)

    layer = _layer(_weight(0.5), solver=solver)
    parametrize.register_parametrization(layer.cell.linear, "weight", Drawn())
    seed = torch.random.get_rng_state()
    solution = layer.solve(_inputs())
    torch.random.set_rng_state(seed)
    weight = layer.cell.linear.weight.detach()
    torch.testing.assert_close(solution.value.detach(), _solution(weight, _inputs()), rtol=0.0, atol=1e-8)


def test_hooks_and_autocast_take_plain_steps() -> None:
    weight, x = _weight().float(), _inputs().float()
    layer, seen = _layer(weight), []
    handle = layer.linear.register_forward_hook(lambda *_: seen.append(1))
    solution = layer.solve(x)
    handle.remove()
    assert len(seen) >= int(solution.steps.max())
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(layer.solve(x).converged.all())


def test_samples_that_are_done_leave() -> None:
    weight = _weight(0.95)
    x = _inputs(60) * torch.logspace(-1, 1, 60, dtype=torch.float64)[:, None]
    solution = _layer(weight, solver=ti.PreconditionedPicard(check_every=2)).solve(x)
    assert bool(solution.converged.all())
    assert int(solution.steps.max()) > 2 * int(solution.steps.min())
    torch.testing.assert_close(solution.value, _solution(weight, x), rtol=0.0, atol=1e-7)


def test_mixed_precision_is_accepted() -> None:
    weight, x = _weight().float(), _inputs().float()
    solution = _layer(weight, solver=ti.PreconditionedPicard(check_every=8, mixed_precision=True)).solve(x)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.value.double(), _solution(weight.double(), x.double()), rtol=0.0, atol=1e-4)


def test_a_weight_changed_before_the_backward_pass_is_an_error() -> None:
    layer = _layer(_weight())
    z = layer(_inputs().requires_grad_())
    with torch.no_grad():
        layer.linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_spectral_radius_is_about_right() -> None:
    for name, weight in WEIGHTS.items():
        true = float(torch.linalg.eigvals(weight).abs().max())
        found = _shifted_tanh._spectral_radius(weight)
        if name == "nilpotent":
            assert found < 1.0
        else:
            assert abs(found - true) <= 0.3 * true
