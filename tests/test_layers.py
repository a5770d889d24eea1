"""`FixedPoint`, `Root`, `TanhEquilibrium`: modules like any other, and nothing on them but their parameters."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import torchimplicit as ti

SOLVERS = {"picard": ti.Picard(), "anderson": ti.Anderson(), "newton": ti.Newton()}
EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


class Cell(nn.Module):
    """`tanh(W z / 2 + b + x)` in float64, a contraction."""

    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, dtype=torch.float64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


class RootCell(Cell):
    """The same as an equation `z − tanh(W z / 2 + b + x) = 0`."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z - super().forward(z, x)


class PairCell(nn.Module):
    """Two coupled states as a dict."""

    def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"a": 0.5 * z["b"][..., None] + x, "b": 0.1 * z["a"].sum(-1)}


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 3)), dtype=torch.float64)


def unrolled(cell: Any, z: Tensor, x: Tensor, steps: int = 300) -> Tensor:
    for _ in range(steps):
        z = cell(z, x)
    return z


def layers() -> dict[str, nn.Module]:
    return {
        "FixedPoint": ti.nn.FixedPoint(Cell()),
        "FixedPoint with init": ti.nn.FixedPoint(Cell(), init=nn.Linear(3, 3, dtype=torch.float64)),
        "Root": ti.nn.Root(RootCell()),
        "TanhEquilibrium": ti.nn.TanhEquilibrium(3, dtype=torch.float64),
    }


EVERY_LAYER = pytest.mark.parametrize("name", list(layers()))


# --- Values and gradients


@EVERY_LAYER
def test_forward_is_the_value_of_solve(name: str) -> None:
    layer, x = layers()[name], inputs()
    solution = layer.solve(x)
    assert solution.converged.tolist() == [True] * 4
    assert torch.equal(layer(x), solution.value)
    assert solution.trace is None
    trace = layer.solve(x, trace=True).trace
    assert trace.shape == (int(solution.steps.max()), 4)


@EVERY_SOLVER
@pytest.mark.parametrize(
    "cls, cell", [(ti.nn.FixedPoint, Cell()), (ti.nn.Root, RootCell())], ids=["FixedPoint", "Root"]
)
def test_layer_gives_the_solution_and_gradients_of_the_unrolled_iteration(
    cls: Any, cell: Cell, solver: ti.solvers.Solver
) -> None:
    x = inputs().requires_grad_()
    layer = cls(cell, solver=solver)
    z = layer(x)
    found = torch.autograd.grad(z.pow(2).sum(), [x, *layer.parameters()])
    truth = unrolled(lambda z, x: Cell.forward(cell, z, x), torch.zeros_like(x), x)
    torch.testing.assert_close(z, truth, atol=1e-9, rtol=0)
    expected = torch.autograd.grad(truth.pow(2).sum(), [x, *layer.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


@EVERY_SOLVER
def test_tanh_layer_is_the_fixed_point_by_hand(solver: ti.solvers.Solver) -> None:
    layer, x = ti.nn.TanhEquilibrium(5, solver=solver, dtype=torch.float64), inputs(7, 5).requires_grad_()
    w = layer.linear.weight
    z = layer(x)
    assert z.shape == (7, 5)
    torch.testing.assert_close(z, torch.tanh(z @ w.T + x), atol=1e-9, rtol=0)
    found = torch.autograd.grad(z.sin().sum(), [x, w])
    by_hand = torch.zeros(7, 5, dtype=torch.float64)
    for _ in range(300):
        by_hand = torch.tanh(by_hand @ w.T + x)
    torch.testing.assert_close(z, by_hand, atol=1e-9, rtol=0)
    for one, other in zip(found, torch.autograd.grad(by_hand.sin().sum(), [x, w]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


@pytest.mark.parametrize("features", [1, 8, 100])
def test_tanh_layer_is_initialised_as_a_linear_layer(features: int) -> None:
    torch.manual_seed(7)
    layer = ti.nn.TanhEquilibrium(features)
    torch.manual_seed(7)
    linear = nn.Linear(features, features, bias=False)
    assert torch.equal(layer.linear.weight, linear.weight)
    assert layer.linear.bias is None
    assert [p.shape for p in layer.parameters()] == [(features, features)]


def test_cell_of_the_tanh_layer_is_what_it_says() -> None:
    layer, z, x = ti.nn.TanhEquilibrium(3, dtype=torch.float64), inputs(), inputs()
    torch.testing.assert_close(layer.cell(z, x), torch.tanh(z @ layer.linear.weight.T + x), atol=1e-15, rtol=0)
    torch.testing.assert_close(layer.cell(z[0], x[0]), layer.cell(z, x)[0], atol=1e-15, rtol=0)
    torch.testing.assert_close(layer.cell(z, x[0]), torch.tanh(z @ layer.linear.weight.T + x[0]), atol=1e-15, rtol=0)


@EVERY_SOLVER
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 1, 3, 4)])
def test_every_row_of_the_tanh_layer_is_a_problem_of_its_own(shape: tuple[int, ...], solver: ti.solvers.Solver) -> None:
    layer, x = ti.nn.TanhEquilibrium(4, solver=solver, dtype=torch.float64), inputs(*shape)
    x.requires_grad_()
    solution = layer.solve(x)
    truth = unrolled(layer.cell, torch.zeros_like(x), x)
    torch.testing.assert_close(solution.value, truth, atol=1e-9, rtol=0)
    (found,) = torch.autograd.grad(solution.value.sum(), x)
    (expected,) = torch.autograd.grad(truth.sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)
    assert solution.status.shape == shape[:-1]


@EVERY_SOLVER
@pytest.mark.parametrize("shape", [(0, 4), (1, 4)])
def test_batches_of_none_and_one_are_solved(shape: tuple[int, int], solver: ti.solvers.Solver) -> None:
    layer, x = ti.nn.TanhEquilibrium(4, solver=solver, dtype=torch.float64), inputs(*shape)
    solution = layer.solve(x)
    assert solution.value.shape == shape
    solution.value.sum().backward()
    assert layer.linear.weight.grad is not None
    assert (layer.linear.weight.grad != 0).any().item() == (shape[0] > 0)


@pytest.mark.parametrize("view", ["transposed", "expanded", "strided"])
@EVERY_SOLVER
def test_views_as_inputs_give_the_values_and_gradients_of_copies(view: str, solver: ti.solvers.Solver) -> None:
    layer = ti.nn.TanhEquilibrium(3, solver=solver, dtype=torch.float64)
    base = {"transposed": inputs(3, 4), "expanded": inputs(1, 3), "strided": inputs(8, 3)}[view].requires_grad_()
    x = {"transposed": lambda b: b.T, "expanded": lambda b: b.expand(4, 3), "strided": lambda b: b[::2]}[view](base)
    assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))
    (found,) = torch.autograd.grad(layer(x).sum(), base)
    (expected,) = torch.autograd.grad(layer(x.clone(memory_format=torch.contiguous_format)).sum(), base)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# --- Starts


def test_start_is_zero_like_the_first_input() -> None:
    seen: list[Tensor] = []

    def cell(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        seen.append(z.detach().clone())
        return 0.5 * z + x + y.sum()

    x = torch.full((2, 3), 4.0, dtype=torch.float64)
    ti.nn.FixedPoint(cell)(x, torch.ones(5, dtype=torch.float64))
    assert torch.equal(seen[0], torch.zeros(2, 3, dtype=torch.float64))


def test_init_gives_the_start_from_all_inputs() -> None:
    calls: list[tuple[Any, ...]] = []

    def init(x: Tensor, scale: float) -> Tensor:
        calls.append((x, scale))
        return x / (1 - scale)

    x = inputs()
    solution = ti.nn.FixedPoint(lambda z, x, scale: scale * z + x, init=init).solve(x, 0.25)
    assert calls == [(x, 0.25)]
    assert solution.steps.tolist() == [0] * 4  # it starts at the solution
    torch.testing.assert_close(solution.value, x / 0.75)


def test_parameters_of_an_init_module_are_the_layers_and_get_zero_gradients() -> None:
    layer = ti.nn.FixedPoint(Cell(), init=nn.Linear(3, 3, dtype=torch.float64))
    assert set(dict(layer.named_parameters())) == {"cell.linear.weight", "cell.linear.bias", "init.weight", "init.bias"}
    layer(inputs()).sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert (p.grad.abs().max().item() > 0) == name.startswith("cell"), name


def test_init_may_be_any_state_and_the_layer_then_needs_no_tensor_input() -> None:
    layer = ti.nn.FixedPoint(lambda z, c: 0.5 * z + c, init=lambda c: torch.zeros(2, 3), batch_dims=1)
    torch.testing.assert_close(layer(3.0), torch.full((2, 3), 6.0))


@EVERY_SOLVER
def test_state_may_be_a_pytree(solver: ti.solvers.Solver) -> None:
    x = inputs(4, 3).requires_grad_()
    start = {"a": torch.zeros(4, 3, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}
    layer = ti.nn.FixedPoint(PairCell(), solver=solver, init=lambda x: start)
    solution = layer.solve(x)
    assert solution.status.tolist() == [0] * 4
    b = 0.1 * x.sum(1) / (1 - 0.15)
    torch.testing.assert_close(solution.value["b"], b, atol=1e-9, rtol=0)
    torch.testing.assert_close(solution.value["a"], 0.5 * b[:, None] + x, atol=1e-9, rtol=0)
    (found,) = torch.autograd.grad(solution.value["b"].sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, 0.1 / 0.85), atol=1e-9, rtol=0)


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
def test_batch_dims_give_one_report_per_sample(batch_dims: int) -> None:
    solution = ti.nn.FixedPoint(lambda z, x: torch.cos(0.5 * z + x), batch_dims=batch_dims).solve(inputs(2, 3, 4))
    assert solution.status.shape == solution.residual.shape == (2, 3, 4)[:batch_dims]
    assert solution.converged.all()


# --- A module like any other


@EVERY_LAYER
def test_state_dict_holds_the_parameters_of_the_cell_and_nothing_else(name: str) -> None:
    layer = layers()[name]
    before = set(layer.state_dict())
    assert all(key.startswith(("cell.linear.", "init.")) for key in before)
    layer(inputs()).sum().backward()
    assert set(layer.state_dict()) == before
    assert list(layer.buffers()) == []


def test_state_dict_keys_of_the_tanh_layer_are_stable() -> None:
    assert list(ti.nn.TanhEquilibrium(3).state_dict()) == ["cell.linear.weight"]


@EVERY_LAYER
def test_forward_and_backward_leave_nothing_on_the_module(name: str) -> None:
    layer = layers()[name]

    def attributes() -> dict[str, dict[str, Any]]:
        return {key: dict(vars(module)) for key, module in layer.named_modules()}

    before = attributes()
    with ti.monitor(layer):
        layer.solve(inputs(), trace=True).value.sum().backward()
    after = attributes()
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].keys() == after[key].keys()
        for attribute, value in before[key].items():
            assert after[key][attribute] is value or after[key][attribute] == value, (key, attribute)


@EVERY_LAYER
@pytest.mark.parametrize("used", [False, True])
def test_deepcopy_is_an_equal_layer_of_its_own(name: str, used: bool) -> None:
    layer, x = layers()[name], inputs()
    if used:
        layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        next(twin.cell.parameters()).mul_(0.5)
    assert not torch.equal(twin(x), layer(x))


@EVERY_LAYER
def test_saved_module_is_loaded_whole(name: str) -> None:
    layer, x = layers()[name], inputs()
    layer(x).sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    assert (loaded.solver, loaded.adjoint, loaded.batch_dims) == (layer.solver, layer.adjoint, layer.batch_dims)


@EVERY_LAYER
def test_saved_state_dict_is_loaded_with_weights_only(name: str) -> None:
    layer, other, x = layers()[name], layers()[name], inputs()
    assert not torch.equal(layer(x), other(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert str(other.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    assert torch.equal(layer(x), other(x))


def test_repr_tells_the_options_and_the_cell() -> None:
    text = repr(ti.nn.FixedPoint(Cell(), solver=ti.Picard(damping=0.75), batch_dims=2))
    assert "FixedPoint(" in text
    assert "damping=0.75" in text
    assert "batch_dims=2" in text
    assert "(cell): Cell(" in text
    assert "in_features=5" in repr(ti.nn.TanhEquilibrium(5))


@EVERY_LAYER
def test_train_and_eval_make_no_difference(name: str) -> None:
    layer, x = layers()[name], inputs()
    training = layer.train()(x)
    assert torch.equal(training, layer.eval()(x))
    assert not any(module.training for module in layer.modules())


def test_parametrised_weights_are_trained_through() -> None:
    cell = Cell()
    nn.utils.parametrizations.spectral_norm(cell.linear)
    layer, x = ti.nn.FixedPoint(cell).eval(), inputs()
    found = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    truth = unrolled(cell, torch.zeros_like(x), x, 100)
    for one, other in zip(found, torch.autograd.grad(truth.sum(), list(layer.parameters())), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


# --- Grad modes


@EVERY_LAYER
def test_no_grad_gives_the_same_value_without_a_graph(name: str) -> None:
    layer, x = layers()[name], inputs().requires_grad_()
    with torch.no_grad():
        value = layer(x)
    assert not value.requires_grad
    assert layer(x).requires_grad
    assert torch.equal(value, layer(x))


@EVERY_LAYER
@pytest.mark.parametrize("made", ["before", "inside"])
def test_inference_mode_gives_the_same_value(name: str, made: str) -> None:
    layer, x = layers()[name], inputs()
    expected = layer(x).detach()
    with torch.inference_mode():
        value = layer(x if made == "before" else x.clone())
    assert not value.requires_grad
    assert torch.equal(value, expected)


@pytest.mark.parametrize("linear_solver", [None, ti.GMRES()], ids=["LU", "GMRES"])
def test_newton_by_autograd_runs_on_tensors_made_in_inference_mode(linear_solver: Any) -> None:
    solver = ti.Newton(linear_solver=linear_solver)
    with torch.inference_mode():
        x = torch.full((4, 3), 0.5)
        value = ti.nn.FixedPoint(lambda z, x: z * x + x, solver=solver)(x)
        torch.testing.assert_close(value, torch.ones(4, 3))


def test_frozen_layer_passes_gradients_to_its_input_alone() -> None:
    layer, x = ti.nn.TanhEquilibrium(3, dtype=torch.float64).requires_grad_(False), inputs().requires_grad_()
    layer(x).sum().backward()
    assert layer.linear.weight.grad is None
    assert x.grad is not None
    assert x.grad.abs().min() > 0


def test_frozen_layer_on_plain_input_has_no_graph() -> None:
    assert not ti.nn.TanhEquilibrium(3).requires_grad_(False)(torch.ones(2, 3)).requires_grad


# --- In models


class Twice(nn.Module):
    """One layer called twice, and another one between."""

    def __init__(self) -> None:
        super().__init__()
        self.one = ti.nn.TanhEquilibrium(3, dtype=torch.float64)
        self.other = ti.nn.FixedPoint(Cell())

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        def apply(layer: Any, x: Tensor) -> Tensor:
            return unrolled(layer.cell, torch.zeros_like(x), x) if exact else layer(x)

        return apply(self.one, 2 * apply(self.other, apply(self.one, x)))


def test_layers_in_a_row_and_a_layer_used_twice_have_the_gradients_of_the_unrolled_model() -> None:
    model, x = Twice(), inputs().requires_grad_()
    wanted = [x, *model.parameters()]
    assert len(wanted) == 4
    truth = model(x, exact=True)
    torch.testing.assert_close(model(x), truth, atol=1e-9, rtol=0)
    for one, other in zip(
        torch.autograd.grad(model(x).sum(), wanted), torch.autograd.grad(truth.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


@EVERY_SOLVER
def test_layer_inside_the_cell_of_a_layer_has_the_gradients_of_the_unrolled_model(solver: ti.solvers.Solver) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ti.nn.FixedPoint(Cell(), solver=ti.Newton(rtol=1e-13))
            self.exact = False

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            inner = unrolled(self.inner.cell, torch.zeros_like(z), z, 60) if self.exact else self.inner(z)
            return 0.5 * inner + x

    cell, x = Outer(), inputs(2, 3).requires_grad_()
    layer = ti.nn.FixedPoint(cell, solver=solver, adjoint=ti.Implicit(linear_solver=ti.GMRES()))
    if isinstance(solver, ti.Newton):
        layer.solver = ti.Newton(linear_solver=ti.LU())
    wanted = [x, *layer.parameters()]
    z = layer(x)
    found = torch.autograd.grad(z.sum(), wanted)
    cell.exact = True
    truth = unrolled(cell, torch.zeros_like(x), x, 60)
    torch.testing.assert_close(z, truth, atol=1e-9, rtol=0)
    for one, other in zip(found, torch.autograd.grad(truth.sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)


def test_gradients_accumulate_over_calls_and_backward_passes() -> None:
    layer, x = ti.nn.TanhEquilibrium(3, dtype=torch.float64), inputs()
    first, second = layer(x), layer(2 * x)  # both graphs alive at once
    (a,) = torch.autograd.grad(first.sum(), layer.linear.weight, retain_graph=True)
    (b,) = torch.autograd.grad(second.sum(), layer.linear.weight)
    (again,) = torch.autograd.grad(first.sum(), layer.linear.weight)
    assert torch.equal(a, again)
    (layer(x).sum() + layer(2 * x).sum()).backward()
    torch.testing.assert_close(layer.linear.weight.grad, a + b, atol=1e-12, rtol=0)


def test_training_a_model_with_a_layer_fits() -> None:
    layer = ti.nn.TanhEquilibrium(8, solver=ti.Newton())
    model = nn.Sequential(nn.Linear(2, 8), layer, nn.Linear(8, 1))
    x = torch.rand(64, 2) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(150):
        loss = (model(x) - y).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@EVERY_SOLVER
@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "autograd"])
def test_functional_call_gives_the_gradients_of_the_parameters_it_was_given(
    solver: ti.solvers.Solver, closed: bool
) -> None:
    layer = ti.nn.TanhEquilibrium(3, solver=solver, dtype=torch.float64) if closed else ti.nn.FixedPoint(Cell())
    layer.solver = solver
    x = inputs()
    given = {name: (0.5 * p.detach()).requires_grad_() for name, p in layer.named_parameters()}
    value = functional_call(layer, given, (x,))
    # The call is over, the module's own parameters are back in their place.
    own = list(layer.parameters())
    found = torch.autograd.grad(value.sum(), [*given.values(), *own], allow_unused=True)
    assert all(g is None for g in found[len(given) :])

    def cell(z: Tensor, x: Tensor) -> Tensor:
        stripped = {name.removeprefix("cell."): p for name, p in given.items()}
        return functional_call(layer.cell, stripped, (z, x))

    truth = unrolled(cell, torch.zeros_like(x), x)
    torch.testing.assert_close(value, truth, atol=1e-9, rtol=0)
    for one, other in zip(found, torch.autograd.grad(truth.sum(), list(given.values())), strict=False):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=0)


def test_parameter_changed_between_forward_and_backward_is_an_error_and_not_a_wrong_gradient() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    value = layer(torch.ones(2, 3))
    with torch.no_grad():
        layer.linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


# --- Dtypes


@EVERY_SOLVER
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4), (torch.bfloat16, 0.1)], ids=str
)
def test_layer_works_in_its_dtype(dtype: torch.dtype, tolerance: float, solver: ti.solvers.Solver) -> None:
    layer = ti.nn.TanhEquilibrium(4, solver=solver, dtype=torch.float64)
    x = inputs(5, 4)
    truth = unrolled(layer.cell, torch.zeros_like(x), x)
    (expected,) = torch.autograd.grad(truth.sum(), layer.linear.weight)
    layer = layer.to(dtype)
    solution = layer.solve(x.to(dtype))
    assert solution.value.dtype == dtype
    assert solution.converged.all()
    torch.testing.assert_close(solution.value.double(), truth, atol=tolerance, rtol=0)
    solution.value.sum().backward()
    assert layer.linear.weight.grad is not None
    assert layer.linear.weight.grad.dtype == dtype
    error = (layer.linear.weight.grad.double() - expected).norm() / expected.norm()
    assert error <= 2 * tolerance


@pytest.mark.parametrize(
    "solver",
    [ti.Picard(rtol=1e-2), ti.Anderson(rtol=1e-2), ti.Newton(rtol=1e-2)],
    ids=lambda s: type(s).__name__,
)
def test_layer_works_under_autocast(solver: ti.solvers.Solver) -> None:
    layer, x = ti.nn.FixedPoint(Cell().float(), solver=solver), inputs(5, 3).float()
    expected = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = layer.solve(x)
    assert solution.converged.all()
    assert solution.value.dtype == torch.float32
    torch.testing.assert_close(solution.value.detach(), expected, atol=0.05, rtol=0)
    solution.value.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_default_tolerance_under_autocast_is_what_bfloat16_can_reach() -> None:
    weight = 0.4 * torch.linalg.qr(torch.randn(20, 20))[0]
    x = torch.randn(16, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = ti.fixed_point(
            lambda z: torch.tanh(torch.nn.functional.linear(z, weight)).add(x.bfloat16()),
            torch.zeros(16, 20),
            solver=ti.Picard(),
            batch_dims=1,
            on_failure="ignore",
        )
    assert solution.converged.all()


@pytest.mark.parametrize("solver", [ti.Anderson(), ti.Newton()], ids=lambda s: type(s).__name__)
def test_residual_is_that_of_the_returned_value_in_half_precision(solver: ti.solvers.Solver) -> None:
    p = torch.ones(4, dtype=torch.bfloat16)
    solution = ti.fixed_point(lambda z: 0.5 * z.cos() + p, torch.zeros(4, dtype=torch.bfloat16), solver=solver)
    z = solution.value.float()
    actual = ((0.5 * solution.value.cos() + p).float() - z).square().mean().sqrt()
    torch.testing.assert_close(solution.residual, actual, rtol=1e-3, atol=0)


# --- Failures


def test_failure_follows_the_option_of_the_layer() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return z + 1 + 0 * x

    x = torch.ones(2, 3)
    with pytest.warns(ti.ConvergenceWarning, match="fixed_point: 2 of 2 samples did not converge") as seen:
        ti.nn.FixedPoint(cell)(x)
    assert [w.filename for w in seen] == [__file__]  # the user's line, not the library's
    with pytest.raises(ti.ConvergenceError) as caught:
        ti.nn.FixedPoint(cell, on_failure="raise")(x)
    assert caught.value.solution is not None
    assert not caught.value.solution.converged.any()
    value = ti.nn.FixedPoint(cell, on_failure="ignore")(x)
    assert value.isfinite().all()


@EVERY_SOLVER
def test_nan_sample_has_a_finite_value_and_spares_the_others(solver: ti.solvers.Solver) -> None:
    layer, x = ti.nn.TanhEquilibrium(3, solver=solver, on_failure="ignore", dtype=torch.float64), inputs()
    (alone,) = torch.autograd.grad(layer(x[[0, 1, 3]]).sum(), layer.linear.weight)
    x[2, 1] = torch.nan
    x.requires_grad_()
    solution = layer.solve(x)
    assert solution.status.tolist() == [0, 0, ti.Status.NONFINITE, 0]
    assert solution.value.isfinite().all()
    found, to_input = torch.autograd.grad(solution.value.sum(), [layer.linear.weight, x])
    torch.testing.assert_close(found, alone, atol=1e-9, rtol=0)
    assert to_input[2].count_nonzero() == 0
    assert to_input.isfinite().all()


def test_max_steps_of_the_layer_is_kept() -> None:
    layer = ti.nn.TanhEquilibrium(3, solver=ti.Picard(), max_steps=2, on_failure="ignore", dtype=torch.float64)
    solution = layer.solve(inputs())
    assert solution.steps.tolist() == [2] * 4
    assert solution.status.tolist() == [ti.Status.MAX_STEPS] * 4


@pytest.mark.parametrize("rows", [1, 6])
def test_input_that_is_broadcast_to_the_samples_is_not_split_with_them(rows: int) -> None:
    """Six samples from six starts; x is shared by all of them, as (1, 6) or as (6,), which has the batch's length."""
    cell = ti.nn.TanhEquilibrium(6, dtype=torch.float64).cell
    x = torch.randn(6, dtype=torch.float64)
    z0 = 10.0 ** torch.arange(-6, 0, dtype=torch.float64)[:, None] * torch.ones(6, 6, dtype=torch.float64)
    sol = ti.fixed_point(cell, z0, x if rows == 6 else x[None], batch_dims=1, solver=ti.Picard(rtol=1e-12))
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, sol.value[:1].expand(6, 6), rtol=0.0, atol=1e-10)
    torch.testing.assert_close(torch.tanh(cell.linear(sol.value) + x), sol.value, rtol=0.0, atol=1e-10)


def test_hook_that_changes_the_cells_value_changes_the_gradient_with_it() -> None:
    layer = ti.nn.TanhEquilibrium(4, dtype=torch.float64, solver=ti.Newton(rtol=1e-12), adjoint=ti.Implicit(rtol=1e-12))
    handle = layer.cell.register_forward_hook(lambda module, args, value: 0.5 * value)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    value = layer(x)
    truth = torch.zeros_like(x)
    for _ in range(200):
        truth = layer.cell(truth, x)
    handle.remove()
    (ours,) = torch.autograd.grad(value.square().sum(), x)
    (unrolled,) = torch.autograd.grad(truth.square().sum(), x)
    torch.testing.assert_close(ours, unrolled, rtol=1e-9, atol=1e-9)


class _Halved(ti.nn.TanhEquilibrium(1).cell.__class__):
    """A cell whose `forward` was overridden and whose closed forms were not."""

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(z, x)


@pytest.mark.parametrize("solver", [ti.Picard(rtol=1e-12, check_every=4), ti.Newton(rtol=1e-12, warmup=4)], ids=repr)
def test_overridden_forward_is_not_solved_by_the_old_closed_form(solver: ti.Picard | ti.Newton) -> None:
    torch.manual_seed(0)
    cell = _Halved(4, dtype=torch.float64)
    layer = ti.nn.FixedPoint(cell, solver=solver, adjoint=ti.Implicit(rtol=1e-12))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    truth = torch.zeros_like(x)
    for _ in range(200):
        truth = cell(truth, x)
    value = layer(x)
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)
    (ours,) = torch.autograd.grad(value.square().sum(), x)
    (unrolled,) = torch.autograd.grad(truth.square().sum(), x)
    torch.testing.assert_close(ours, unrolled, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (4,)])
def test_repeated_cell_is_the_cell_again_and_again(shape: tuple[int, ...]) -> None:
    cell = ti.nn.TanhEquilibrium(4, dtype=torch.float64).cell
    z, x = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    start = z.clone()
    with torch.no_grad():
        states = [z]
        for _ in range(5):
            states.append(cell(states[-1], x))
        for times in (1, 2, 5):
            before, last = cell.repeat(z, times, x)
            torch.testing.assert_close(before, states[times - 1], rtol=0, atol=1e-15)
            torch.testing.assert_close(last, states[times], rtol=0, atol=1e-15)
    assert torch.equal(z, start)
