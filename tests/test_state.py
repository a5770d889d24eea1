"""Cells that draw random numbers or change their buffers: functions while they are solved, called once afterwards."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import torchimplicit as ti
from torchimplicit._purity import Purity

from .problems import EXACT, TIGHT

SOLVERS: dict[str, Any] = {
    "default": None,
    "picard": ti.Picard(rtol=TIGHT),
    "anderson": ti.Anderson(rtol=TIGHT),
    "broyden": ti.Broyden(rtol=TIGHT),
    "newton": ti.Newton(rtol=TIGHT),
    "newton_krylov": ti.NewtonKrylov(rtol=TIGHT),
}
EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
DOUBLE = torch.float64


class Dropout(nn.Module):
    """`tanh(drop(W z) / 2 + x)`, a contraction whatever is dropped."""

    def __init__(self, features: int = 6, p: float = 0.4) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False, dtype=DOUBLE)
        nn.init.orthogonal_(self.linear.weight, gain=0.9)
        self.dropout = nn.Dropout(p)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.dropout(self.linear(z)) + x)


class Normed(nn.Module):
    """`tanh(norm(z) / 4 + x)` with batch norm: a function of the batch, with running statistics beside it."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, dtype=DOUBLE)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.25 * self.norm(z) + x)


class Counting(nn.Module):
    """`z / 2 + x + count`, which changes `count` at every call: in place, by assignment, or from nothing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.count: Tensor | None
        self.register_buffer("count", None if how == "from nothing" else torch.zeros((), dtype=DOUBLE))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        if self.count is None:
            self.count = torch.ones((), dtype=DOUBLE)
        elif self.how == "in place":
            self.count += 1
        else:
            self.count = self.count + 1
        return 0.5 * z + x + self.count


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (8, 6)), dtype=DOUBLE)


def held(cell: Callable[..., Tensor], state: Tensor) -> Callable[..., Tensor]:
    """The cell with the random numbers that follow a state of the generator, at every call."""

    def call(*args: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return cell(*args)

    return call


def unrolled(cell: Callable[..., Tensor], x: Tensor, steps: int = 150) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = cell(z, x)
    return z


def after_one(cell: Callable[..., Any], z: Tensor, *args: Any) -> Tensor:
    """The state of the generator that one evaluation leaves, from the present one, which is put back."""
    before = torch.get_rng_state()
    with torch.no_grad():
        cell(z, *args)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert not torch.equal(before, after)
    return after


# --- Random numbers


@EVERY_SOLVER
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_dropout_is_solved_with_the_mask_of_its_first_evaluation(solver: Any, batch_dims: int) -> None:
    cell, x = Dropout(), inputs()
    before = torch.get_rng_state()
    solution = ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, batch_dims=batch_dims)
    assert solution.converged.all()
    mine = held(cell, before)
    torch.testing.assert_close(mine(solution.value, x), solution.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(solution.value, unrolled(mine, x), rtol=0, atol=1e-9)


@EVERY_SOLVER
def test_one_evaluation_of_random_numbers_is_used_whatever_the_steps(solver: Any) -> None:
    cell, x = Dropout(), inputs().requires_grad_()
    expected = after_one(cell, torch.zeros_like(x), x)
    solution = ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, batch_dims=1)
    assert solution.evaluations > 3
    assert torch.equal(torch.get_rng_state(), expected)
    solution.value.sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("name", ["FixedPoint", "Root", "minimize", "least_squares"])
@pytest.mark.parametrize("grad", [True, False])
def test_layers_and_minima_use_one_evaluation_of_random_numbers(name: str, grad: bool) -> None:
    cell, x = Dropout(), inputs()

    def equation(z: Tensor, x: Tensor) -> Tensor:
        return z - cell(z, x)

    def objective(z: Tensor, x: Tensor) -> Tensor:
        return equation(z, x).square().sum(dim=1)

    call: Callable[..., Any] = {
        "FixedPoint": ti.nn.FixedPoint(cell).solve,
        "Root": ti.nn.Root(equation).solve,
        "minimize": lambda x: ti.minimize(objective, torch.zeros_like(x), x, batch_dims=1),
        "least_squares": lambda x: ti.least_squares(equation, torch.zeros_like(x), x, batch_dims=1),
    }[name]
    before, expected = torch.get_rng_state(), after_one(cell, torch.zeros_like(x), x)
    with torch.set_grad_enabled(grad):
        solution = call(x)
    assert solution.converged.all()
    assert torch.equal(torch.get_rng_state(), expected)
    torch.testing.assert_close(solution.value, unrolled(held(cell, before), x), rtol=0, atol=1e-4)


@EVERY_SOLVER
def test_gradients_of_dropout_are_those_of_the_unrolled_iteration_with_the_same_mask(solver: Any) -> None:
    cell, x = Dropout(), inputs(4, 6).requires_grad_()
    wanted = [x, cell.linear.weight]
    before = torch.get_rng_state()
    value = ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=EXACT, batch_dims=1).value
    found = torch.autograd.grad(value.pow(2).sum(), wanted)
    expected = torch.autograd.grad(unrolled(held(cell, before), x).pow(2).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_gradients_of_dropout_are_the_finite_differences_with_the_same_mask() -> None:
    cell = Dropout(3)

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        solver = ti.Newton(rtol=TIGHT)
        return ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=EXACT, batch_dims=1).value

    assert torch.autograd.gradcheck(value, inputs(2, 3).requires_grad_())


def _seeded(cell: nn.Module) -> Callable[[Tensor], Tensor]:
    """The solution with the masks of one seed, as a function of the input."""

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        solver = ti.Newton(rtol=TIGHT)
        return ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=EXACT, batch_dims=1).value

    return value


def test_second_derivatives_and_forward_mode_have_the_same_mask() -> None:
    value, x = _seeded(Dropout(3)), inputs(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(value, x)
    assert torch.autograd.gradcheck(value, x, check_forward_ad=True)


def test_derivatives_of_transforms_have_the_same_mask_and_use_one_evaluation_of_random_numbers() -> None:
    cell, x = Dropout(3), inputs(2, 3)
    value = _seeded(cell)
    torch.manual_seed(5)
    mine, expected = held(cell, torch.get_rng_state()), after_one(cell, torch.zeros_like(x), x)
    jacobian = torch.autograd.functional.jacobian(lambda x: unrolled(mine, x), x)
    for found, truth in (
        (lambda: torch.func.grad(lambda x: value(x).sum())(x), jacobian.sum((0, 1))),
        (lambda: torch.func.jvp(value, (x,), (torch.ones_like(x),))[1], jacobian.sum((2, 3))),
        (lambda: torch.func.jacfwd(value, randomness="same")(x), jacobian),
    ):
        torch.testing.assert_close(found(), truth, rtol=0, atol=1e-9)
        assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_masks_as_it_is_told(randomness: str) -> None:
    value, x = _seeded(Dropout(3)), inputs(1, 2, 3).expand(3, 2, 3)
    lanes = torch.func.vmap(value, randomness=randomness)
    found = lanes(x)
    assert all(torch.allclose(one, found[0], atol=1e-3) == (randomness == "same") for one in found[1:])
    assert torch.autograd.gradcheck(lanes, x.clone().requires_grad_())


def test_two_solves_draw_different_masks() -> None:
    layer, x = ti.nn.FixedPoint(Dropout()), inputs()
    one, other = layer(x), layer(x)
    assert not torch.allclose(one, other, atol=1e-3)
    torch.manual_seed(3)
    one = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), one)


def test_a_layer_with_dropout_is_random_in_training_and_not_in_evaluation() -> None:
    layer, x = ti.nn.FixedPoint(Dropout()).eval(), inputs()
    state = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(layer(x), unrolled(layer.cell, x), rtol=0, atol=1e-8)
    layer.train()
    assert not torch.allclose(layer(x), layer(x), atol=1e-3)


@pytest.mark.parametrize("samplewise", [None, True])
def test_samples_that_are_done_do_not_leave_a_batch_with_a_mask(samplewise: bool | None) -> None:
    shapes: set[torch.Size] = set()

    class Watched(Dropout):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            shapes.add(z.shape)
            return super().forward(z, x)

    cell = Watched()
    if samplewise is not None:
        cell.samplewise = samplewise  # pyright: ignore[reportArgumentType]
    x = torch.cat((torch.full((15, 6), 30.0, dtype=DOUBLE), inputs(1, 6)))  # all but one are done after a step
    before = torch.get_rng_state()
    value = ti.fixed_point(cell, torch.zeros_like(x), x, solver=ti.Picard(rtol=1e-12), batch_dims=1).value
    assert shapes == {x.shape}
    torch.testing.assert_close(value, unrolled(held(cell, before), x), rtol=0, atol=1e-10)
    shapes.clear()
    cell.eval()
    ti.fixed_point(cell, torch.zeros_like(x), x, solver=ti.Picard(rtol=1e-12), batch_dims=1)
    assert len(shapes) > 1  # it could be split


@pytest.mark.parametrize("solver", [ti.Picard(rtol=TIGHT), ti.Newton(rtol=TIGHT, warmup=4)], ids=repr)
def test_a_closed_form_that_knows_nothing_of_a_mask_is_not_used(solver: Any) -> None:
    class Noisy(ti.nn.TanhEquilibrium(1).cell.__class__):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return super().forward(functional.dropout(z, 0.3), x)

        def linearize(self, z: Tensor, value: Tensor, x: Tensor) -> Any:
            return super().linearize(z, value, x)

        def repeat(self, z: Tensor, times: int, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().repeat(z, times, x)

    cell, x = Noisy(4, dtype=DOUBLE), inputs(5, 4).requires_grad_()
    nn.init.orthogonal_(cell.linear.weight, gain=0.6)
    before = torch.get_rng_state()
    value = ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=EXACT, batch_dims=1).value
    truth = unrolled(held(cell, before), x)
    torch.testing.assert_close(value, truth, rtol=0, atol=1e-9)
    (found,) = torch.autograd.grad(value.sum(), x)
    (expected,) = torch.autograd.grad(truth.sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_failed_samples_are_kept_out_of_the_gradients_with_the_same_mask() -> None:
    cell, x = Dropout(), inputs(4, 6)
    x[2, 1] = torch.nan
    x.requires_grad_()
    before, expected = torch.get_rng_state(), after_one(cell, torch.zeros_like(x), x)
    value = ti.fixed_point(
        cell, torch.zeros_like(x), x, solver=ti.Picard(rtol=TIGHT), adjoint=EXACT, batch_dims=1, on_failure="ignore"
    ).value
    found = torch.autograd.grad(value[[0, 1, 3]].sum(), [x, cell.linear.weight])
    assert torch.equal(torch.get_rng_state(), expected)
    clean = x.detach().nan_to_num(nan=0.0).requires_grad_()  # masks do not depend on values
    truth = torch.autograd.grad(unrolled(held(cell, before), clean)[[0, 1, 3]].sum(), [clean, cell.linear.weight])
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_an_evaluation_that_raises_leaves_the_random_numbers_as_they_were() -> None:
    calls = []

    def fn(z: Tensor) -> Tensor:
        calls.append(1)
        noise = torch.rand(3, dtype=DOUBLE)
        if len(calls) == 4:
            raise OverflowError
        return 0.5 * z + noise

    expected = after_one(lambda z: torch.rand(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE))
    with pytest.raises(OverflowError):
        ti.fixed_point(fn, torch.zeros(3, dtype=DOUBLE), solver=ti.Picard())
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_random_layer_within_a_random_cell_is_solved() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ti.nn.FixedPoint(Dropout(), solver=ti.Newton(rtol=TIGHT))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * functional.dropout(self.inner(z), 0.2) + x

    cell, x = Outer(), inputs()
    before, expected = torch.get_rng_state(), after_one(cell, torch.zeros_like(x), x)
    value = ti.fixed_point(cell, torch.zeros_like(x), x, solver=ti.Picard(rtol=TIGHT), batch_dims=1).value
    assert torch.equal(torch.get_rng_state(), expected)
    torch.testing.assert_close(value, unrolled(held(cell, before), x, 40), rtol=0, atol=1e-9)


def test_the_devices_generator_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, device = torch.Generator().manual_seed(4), torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda d: generator.get_state() if d == device else None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, d: generator.set_state(s) if d == device else None)

    def fn() -> float:
        return float(torch.rand((), generator=generator))

    purity = Purity(device, fn, ())
    first = purity.run(fn)
    state = generator.get_state()
    assert not purity.known
    assert [purity.run(fn) for _ in range(3)] == [first] * 3
    assert torch.equal(generator.get_state(), state)


@pytest.mark.gpu
def test_dropout_on_a_device_is_solved_with_the_mask_of_its_first_evaluation() -> None:
    cell, x = Dropout().cuda(), inputs().cuda().requires_grad_()
    before = torch.cuda.get_rng_state()
    with torch.no_grad():
        cell(torch.zeros_like(x), x)
    expected = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(before)
    value = ti.fixed_point(cell, torch.zeros_like(x), x, batch_dims=1).value
    value.sum().backward()
    assert torch.equal(torch.cuda.get_rng_state(), expected)
    torch.cuda.set_rng_state(before)
    torch.testing.assert_close(cell(value, x), value, rtol=0, atol=1e-9)


# --- Buffers


def _as_module(cell: nn.Module) -> Any:
    return cell


def _as_method(cell: nn.Module) -> Any:
    return cell.forward


def _as_closure(cell: nn.Module) -> Any:
    return lambda z, x: cell(z, x)


def _as_nested_closure(cell: nn.Module) -> Any:
    step = _as_closure(cell)
    return lambda z, x: step(z, x)


def _as_default(cell: nn.Module) -> Any:
    return lambda z, x, cell=cell: cell(z, x)


def _as_keyword_default(cell: nn.Module) -> Any:
    def fn(z: Tensor, x: Tensor, *, cell: nn.Module = cell) -> Tensor:
        return cell(z, x)

    return fn


def _as_partial(cell: nn.Module) -> Any:
    return partial(lambda cell, z, x: cell(z, x), cell)


def _as_script(cell: nn.Module) -> Any:
    return torch.jit.script(cell)


def _as_list(cell: nn.Module) -> Any:
    cells = [cell]
    return lambda z, x: cells[0](z, x)


def _as_dict(cell: nn.Module) -> Any:
    cells = {"one": cell}
    return lambda z, x: cells["one"](z, x)


def _as_part(cell: nn.Module) -> Any:
    return nn.ModuleDict({"cell": cell})["cell"]


def _as_object(cell: nn.Module) -> Any:
    class Object:
        def __init__(self) -> None:
            self.cell = cell

        def __call__(self, z: Tensor, x: Tensor) -> Tensor:
            return self.cell(z, x)

    return Object()


def _as_global(cell: nn.Module) -> Any:
    global _CELL
    _CELL = cell
    return lambda z, x: _CELL(z, x)


_CELL: Any = None
FORMS = [v for k, v in list(globals().items()) if k.startswith("_as_")]


@EVERY_SOLVER
@pytest.mark.parametrize("grad", [True, False])
def test_batch_norm_changes_once_to_what_one_evaluation_at_the_solution_makes(solver: Any, grad: bool) -> None:
    cell, x = Normed(), inputs(8, 3)
    twin = copy.deepcopy(cell)
    with torch.set_grad_enabled(grad):
        solution = ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver)
    assert solution.converged
    if grad:
        solution.value.sum().backward()
    with torch.no_grad():
        twin(solution.value, x)
    assert cell.norm.num_batches_tracked == twin.norm.num_batches_tracked == 1
    torch.testing.assert_close(cell.norm.running_mean, twin.norm.running_mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(cell.norm.running_var, twin.norm.running_var, rtol=0, atol=1e-14)
    assert cell.norm.running_mean.abs().max() > 1e-3
    assert not cell.norm.running_mean.requires_grad


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_buffers_are_found_wherever_fn_keeps_its_module(form: Callable[[nn.Module], Any]) -> None:
    cell, x = Normed(), inputs(8, 3)
    for times in (1, 2):
        ti.fixed_point(form(cell), torch.zeros_like(x), x)
        assert cell.norm.num_batches_tracked == times


def test_buffers_are_found_in_a_module_among_the_args() -> None:
    cell, x = Normed(), inputs(8, 3)
    ti.fixed_point(lambda z, x, given: given["cell"](z, x), torch.zeros_like(x), x, {"cell": cell})
    assert cell.norm.num_batches_tracked == 1


@pytest.mark.parametrize("call", ["minimize", "least_squares"])
def test_buffers_of_objectives_and_residuals_change_once(call: str) -> None:
    cell, x = Normed(), inputs(8, 3)

    def residuals(z: Tensor) -> Tensor:
        return z - cell(z, x)

    fn: Any = residuals if call == "least_squares" else lambda z: residuals(z).square().sum()
    assert getattr(ti, call)(fn, torch.zeros_like(x)).converged
    assert cell.norm.num_batches_tracked == 1


def test_gradients_through_batch_norm_are_those_of_the_unrolled_iteration() -> None:
    cell, x = Normed(), inputs(8, 3).requires_grad_()
    wanted = [x, cell.norm.weight, cell.norm.bias]
    solver = ti.Newton(rtol=TIGHT)
    one = ti.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=EXACT).value
    two = ti.fixed_point(cell, torch.zeros_like(x), 2 * x, solver=solver, adjoint=EXACT).value
    found = torch.autograd.grad((one + two).pow(2).sum(), wanted)  # both graphs alive at once
    truth = unrolled(cell, x) + unrolled(cell, 2 * x)
    for mine, other in zip(found, torch.autograd.grad(truth.pow(2).sum(), wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-8)


def test_a_graph_that_batch_norm_was_recorded_in_before_is_not_spoilt() -> None:
    cell, x = Normed(), inputs(8, 3).requires_grad_()
    direct = cell(x, x)
    ti.fixed_point(cell, torch.zeros_like(x), x.detach())
    direct.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_second_derivatives_of_cells_that_change_buffers() -> None:
    options: Any = {"solver": ti.Newton(rtol=TIGHT), "adjoint": EXACT}
    cell = Normed()
    assert torch.autograd.gradgradcheck(
        lambda x: ti.fixed_point(cell, torch.zeros_like(x), x, **options).value, inputs(4, 3).requires_grad_()
    )

    def value(x: Tensor) -> Tensor:
        cell = Counting("in place")
        return ti.fixed_point(lambda z, x: 0.02 * x * cell(z, x) ** 2, torch.zeros_like(x), x, **options).value

    assert torch.autograd.gradgradcheck(value, inputs(2, 3).requires_grad_())


@EVERY_SOLVER
@pytest.mark.parametrize("how", ["in place", "by assignment", "from nothing"])
def test_a_buffer_that_the_value_depends_on_is_the_same_at_each_evaluation(how: str, solver: Any) -> None:
    cell, x = Counting(how), inputs(2, 3).requires_grad_()
    before = cell.count
    layer = ti.nn.FixedPoint(cell, solver=solver)
    for count in (1.0, 2.0):
        solution = layer.solve(x)
        assert solution.converged.all()
        assert cell.count == count
        assert (cell.count is before) == (how == "in place")
        torch.testing.assert_close(solution.value, 2 * (x + count), rtol=0, atol=1e-8)
    (found,) = torch.autograd.grad(solution.value.sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, 2.0))
    assert cell.count == 2


def test_a_buffer_in_two_places_stays_one() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Counting("in place"), Counting("in place")
            self.other.count = self.one.count

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * self.one(z, x) + 0.5 * self.other(z, x)

    cell, x = Pair(), inputs(2, 3)
    value = ti.fixed_point(cell, torch.zeros_like(x), x).value
    torch.testing.assert_close(value, 2 * (x + 1.5), rtol=0, atol=1e-8)
    assert cell.one.count is cell.other.count
    assert cell.one.count == 2


def test_buffers_are_kept_together_with_random_numbers() -> None:
    class Both(Normed):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return functional.dropout(super().forward(z, x), 0.3, self.training)

    cell, x = Both(), inputs(8, 3)
    before, expected = torch.get_rng_state(), after_one(copy.deepcopy(cell), torch.zeros_like(x), x)
    value = ti.fixed_point(cell, torch.zeros_like(x), x).value
    assert cell.norm.num_batches_tracked == 1
    assert torch.equal(torch.get_rng_state(), expected)
    torch.testing.assert_close(held(cell, before)(value, x), value, rtol=0, atol=1e-8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("solver", [None, ti.Newton()], ids=["default", "newton"])
@pytest.mark.parametrize("call", ["fixed_point", "minimize"])
def test_buffers_change_once_without_gradients(mode: Any, solver: Any, call: str) -> None:
    cell, x = Normed(), inputs(8, 3)
    fn: Any = cell if call == "fixed_point" else lambda z, x: (z - cell(z, x)).square().sum()
    with mode():
        assert getattr(ti, call)(fn, x, x, solver=solver).converged
    assert cell.norm.num_batches_tracked == 1
    assert cell.norm.running_mean is not None and not cell.norm.running_mean.is_inference()


def test_evaluation_mode_leaves_buffers_and_uses_them() -> None:
    layer, x = ti.nn.FixedPoint(Normed()), inputs(8, 3)
    layer.solve(x)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    value = layer(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    torch.testing.assert_close(value, unrolled(layer.cell, x), rtol=0, atol=1e-8)


def test_functional_call_changes_the_buffers_it_was_given() -> None:
    layer, x = ti.nn.FixedPoint(Normed(), batch_dims=0), inputs(8, 3).requires_grad_()
    given = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    value = functional_call(layer, given, (x,))
    value.sum().backward()
    assert given["cell.norm.num_batches_tracked"] == 1
    assert layer.cell.norm.num_batches_tracked == 0
    assert layer.cell.norm.running_mean.abs().max() == 0


def test_spectral_norm_in_training_takes_one_power_iteration() -> None:
    cell, x = Dropout(p=0.0), inputs()
    cell.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, dtype=DOUBLE), n_power_iterations=1)
    twin = copy.deepcopy(cell)
    solution = ti.fixed_point(cell, torch.zeros_like(x), x, batch_dims=1, solver=ti.Picard(rtol=1e-12))
    assert solution.converged.all()
    with torch.no_grad():
        torch.testing.assert_close(twin(solution.value, x), solution.value, rtol=0, atol=1e-10)
    for name, buffer in cell.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=0, atol=1e-15)


def test_samples_that_are_done_do_not_leave_a_batch_with_changing_buffers() -> None:
    cell = Counting("in place")
    shapes: set[torch.Size] = set()
    cell.register_forward_pre_hook(lambda module, args: shapes.add(args[0].shape))  # pyright: ignore
    x = torch.cat((torch.full((15, 6), 0.0, dtype=DOUBLE), inputs(1, 6)))
    z0 = torch.full_like(x, 2.0)  # the solution of all but the last
    ti.fixed_point(cell, z0, x, solver=ti.Picard(rtol=1e-12), batch_dims=1)
    assert shapes == {x.shape}


def test_a_sparse_a_lazy_and_a_meta_buffer_are_in_nobodys_way() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adjacency: Tensor
            self.register_buffer("adjacency", (0.3 * torch.eye(3, dtype=DOUBLE)).to_sparse())
            self.register_buffer("shape", torch.empty(3, device="meta"))
            self.norm = nn.LazyBatchNorm1d(dtype=DOUBLE)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.adjacency, z) + 0.1 * self.norm(z) + x

    cell, x = Odd(), inputs(3, 3)
    assert ti.fixed_point(cell, torch.zeros_like(x), x).converged
    assert cell.norm.num_batches_tracked == 1


# --- What it costs


@pytest.mark.parametrize("solver", [ti.Picard(), ti.Newton(), None], ids=["picard", "newton", "default"])
def test_a_cell_without_randomness_pays_two_looks_at_the_generator(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, writes = [], []
    look, write = torch.get_rng_state, torch.set_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (looks.append(1), look())[1])
    monkeypatch.setattr(torch, "set_rng_state", lambda state: (writes.append(1), write(state))[1])
    layer, x = ti.nn.FixedPoint(Dropout().eval(), solver=solver), inputs().requires_grad_()
    layer(x).sum().backward()
    assert (len(looks), len(writes)) == (2, 0)
    calls = []
    layer.cell.register_forward_hook(lambda *args: calls.append(1))
    layer.train()(x)
    assert len(looks) > len(calls)  # what was asserted above is that they were not needed
    assert len(writes) >= 2 * (len(calls) - 1)


def test_buffers_that_stay_as_they_are_cost_no_evaluation() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.cos(0.5 * z * self.mask + x)

    cell, x = Masked(), inputs(4, 3)
    evaluations = [ti.fixed_point(cell.train(mode), torch.zeros_like(x), x).evaluations for mode in (True, False)]
    assert evaluations[0] == evaluations[1]
