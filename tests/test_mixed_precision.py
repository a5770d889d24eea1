"""Autocast, reduced-precision parameters and scaled losses: solves end where the dtype allows, gradients follow."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit._precision import Watch, unit_size

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
SOLVERS = [ti.Picard(), ti.Anderson(), ti.Broyden(), ti.Newton(), ti.NewtonKrylov(), ti.Auto()]


class Cell(nn.Module):
    """`tanh(norm(W z + b + x))` with `‖W‖ = factor`; the norm, where there is one, is taken in the dtype of x."""

    def __init__(self, features: int, factor: float = 0.9, norm: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)
        with torch.no_grad():
            self.linear.weight.mul_(factor / torch.linalg.matrix_norm(self.linear.weight, 2))
        self.norm = nn.LayerNorm(features) if norm else nn.Identity()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm((self.linear(z) + x).to(x.dtype)))


def _error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().float(), reference.detach()
    return float((value - reference).norm() / reference.norm())


def _gradients(layer: nn.Module, x: Tensor, dtype: torch.dtype | None) -> tuple[ti.Solution, list[Tensor]]:
    """The solution and the gradients of a loss with respect to x and the parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        solution = layer.solve(x)
    solution.value.float().square().sum().backward()
    return solution, [x.grad, *(p.grad.clone() for p in layer.parameters())]


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "float32 norm inside"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@DTYPES
def test_solve_and_gradient_under_autocast(dtype: torch.dtype, solver: ti.solvers.Method, norm: bool) -> None:
    epsilon, x = torch.finfo(dtype).eps, torch.randn(32, 48)
    cell = Cell(48, norm=norm)
    exact, expected = _gradients(ti.nn.FixedPoint(cell), x, None)
    solution, found = _gradients(ti.nn.FixedPoint(cell, solver=solver), x, dtype)
    assert solution.converged.all()
    assert solution.steps.max() <= 12  # nobody waits for digits that the dtype does not have
    assert solution.adjoint.status.eq(ti.Status.CONVERGED).all()
    assert 0 < _error(solution.value, exact.value) <= 3 * epsilon
    for mine, theirs in zip(found, expected, strict=True):
        assert 0 < _error(mine, theirs) <= 8 * epsilon


def test_a_function_that_autocast_does_not_touch_keeps_its_precision() -> None:
    a = torch.linspace(1, 20, 50)
    with torch.autocast("cpu", BF16):
        solution = ti.root(lambda z: z**3 + z - a, torch.ones(50), batch_dims=1)
        contraction = ti.fixed_point(lambda z: 0.5 * torch.cos(z) + a, torch.ones(50), batch_dims=1)
    z = solution.value.double()
    assert solution.converged.all()
    assert ((z**3 + z) / a - 1).abs().max() < 1e-5
    assert contraction.converged.all()
    assert contraction.residual.max() < 1e-3


def test_the_precision_is_looked_for_inside_the_function() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    with torch.autocast("cpu", FP16), Watch() as seen:
        out = nn.functional.layer_norm((x @ weight).float(), (8,))
    assert out.dtype == torch.float32
    assert seen.epsilon == torch.finfo(FP16).eps
    assert seen.narrow
    with torch.autocast("cpu", FP16), Watch() as seen:
        torch.split(x.cos(), 2)
    assert (seen.epsilon, seen.narrow) == (0.0, False)


def test_the_backward_pass_runs_under_the_autocast_of_the_forward() -> None:
    dtypes = set()

    class Watched(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            product = self.linear(z)
            if product.requires_grad:
                product.register_hook(lambda g: dtypes.add(g.dtype))
            return torch.tanh(product + x)

    layer, x = ti.nn.FixedPoint(Watched(24)), torch.randn(8, 24)
    found = []
    for around_backward in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = layer(x).square().sum()
        with torch.autocast("cpu", BF16, enabled=around_backward):
            loss.backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    assert dtypes == {BF16}
    for outside, inside in zip(*found, strict=True):
        assert torch.equal(outside, inside)


def test_gradients_through_two_layers_in_one_autocast_block_reach_every_parameter() -> None:
    # Autocast caches casts of parameters: one made under no_grad, by the solver, must not serve the recorded call.
    model = nn.Sequential(nn.Linear(6, 24), ti.nn.FixedPoint(Cell(24)), ti.nn.FixedPoint(Cell(24)), nn.Linear(24, 3))
    x = torch.randn(16, 6)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", BF16):
        model[1](model[0](x).detach())
        loss = model(x).float().square().sum()
    loss.backward()
    for p, reference in zip(model.parameters(), expected, strict=True):
        assert _error(p.grad, reference) < 0.06


def test_the_state_is_single_precision_where_the_input_is_not() -> None:
    layer, x = ti.nn.FixedPoint(Cell(24)), torch.randn(8, 24)
    with torch.autocast("cpu", BF16):
        solution = layer.solve(x.bfloat16())
    assert solution.value.dtype == solution.residual.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer.to(BF16)(x.bfloat16()).dtype == BF16


def test_tanh_equilibrium_keeps_its_closed_form_under_autocast() -> None:
    head, layer, x = nn.Linear(6, 24), ti.nn.TanhEquilibrium(24), torch.randn(8, 6)
    layer(head(x)).square().sum().backward()
    expected = [layer.linear.weight.grad.clone(), head.weight.grad.clone()]
    layer.zero_grad(), head.zero_grad()
    with torch.autocast("cpu", BF16):
        value = layer(head(x))
    assert isinstance(value.grad_fn, torch.autograd.function.BackwardCFunction)
    assert value.grad_fn.of.record is None  # no graph of the cell
    value.square().sum().backward()
    assert _error(layer.linear.weight.grad, expected[0]) < 0.04
    assert _error(head.weight.grad, expected[1]) < 0.04


@pytest.mark.parametrize("solver", [ti.GMRES(), ti.BiCGStab(), ti.Neumann()], ids=lambda s: type(s).__name__)
def test_the_adjoint_is_solved_as_far_as_its_products_allow(solver: ti.GMRES) -> None:
    epsilon = torch.finfo(BF16).eps
    layer = ti.nn.FixedPoint(Cell(64, 0.7), adjoint=ti.Implicit(linear_solver=solver, rtol=1e-5))
    solution, _ = _gradients(layer, torch.randn(32, 64), BF16)
    assert solution.adjoint.status.eq(ti.Status.CONVERGED).all()
    assert 1e-5 < solution.adjoint.residual.max() <= 2 * epsilon
    assert solution.adjoint.steps.max() <= 12


def test_slow_modes_do_not_cost_samples_their_gradient() -> None:
    # ‖u‖ is 8 times ‖v‖: what rounding leaves of the adjoint residual is far above 2ε ‖v‖.
    cell = Cell(512)
    with torch.no_grad():
        cell.linear.weight.fill_(0.88 / 512)  # its mode is the mean of z
        cell.linear.bias.zero_()
    layer = ti.nn.FixedPoint(cell, adjoint=ti.Implicit(linear_solver=ti.GMRES()))
    x = 1e-3 * torch.rand(8, 512)
    _, expected = _gradients(layer, x, None)
    solution, found = _gradients(layer, x, BF16)
    assert solution.adjoint.status.eq(ti.Status.CONVERGED).all()
    assert (found[0].norm(dim=1) > 0).all()
    assert _error(found[1], expected[1]) < 0.3


def test_a_tolerance_below_what_the_dtype_can_reach_is_not_waited_for() -> None:
    layer = ti.nn.FixedPoint(Cell(48), solver=ti.Picard(rtol=1e-6, atol=0.0))
    with torch.autocast("cpu", BF16):
        solution = layer.solve(torch.randn(32, 48))
    assert solution.converged.all()
    assert solution.steps.max() <= 12


def test_derivatives_of_the_gradient_under_autocast() -> None:
    cell, x = Cell(20), torch.randn(4, 20, requires_grad=True)

    def second(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            value = ti.nn.FixedPoint(cell)(x)
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert 0 < _error(second(BF16), second(None)) < 0.06


# --- parameters in bfloat16 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_parameters_in_bfloat16(solver: ti.solvers.Method) -> None:
    cell, x = Cell(48).to(BF16), torch.randn(32, 48).to(BF16)
    layer = ti.nn.FixedPoint(cell, solver=solver)
    solution, found = _gradients(layer, x, None)
    exact, expected = _gradients(ti.nn.FixedPoint(cell.float()), x.float(), None)
    assert solution.value.dtype == BF16
    assert solution.residual.dtype == torch.float32  # the solver's own algebra
    assert solution.converged.all()
    assert solution.steps.max() <= 12
    assert solution.adjoint.status.eq(ti.Status.CONVERGED).all()
    assert _error(solution.value, exact.value) < 0.03
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == BF16
        assert _error(mine, theirs) < 0.07


# --- float16 and scaled losses ----------------------------------------------------------------------------------------


def test_rows_are_brought_to_unit_size_without_rounding() -> None:
    v = torch.tensor([[3.0, -5e4], [1e-30, 0.0], [0.0, 0.0], [torch.inf, 1.0]])
    unit = unit_size(v)
    assert torch.equal(unit, torch.tensor([[2.0**16], [2.0**-99], [1.0], [1.0]]))
    assert torch.equal(v[:2] / unit[:2] * unit[:2], v[:2])


def test_the_gradient_does_not_depend_on_the_scale_of_the_loss_in_float16() -> None:
    layer, x = ti.nn.FixedPoint(Cell(24)), torch.randn(16, 24)

    def gradient(scale: float) -> Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", FP16):
            value = layer(x)
        (scale * value.square().mean()).backward()
        return layer.cell.linear.weight.grad / scale

    # As v it would leave the range of float16 on either side.
    assert _error(gradient(2.0**20), gradient(1.0)) < 2e-3
    assert gradient(2.0**20).isfinite().all()


def test_a_small_gradient_is_not_lost_in_the_products_in_float16() -> None:
    layer, x = ti.nn.FixedPoint(Cell(24)), torch.randn(16, 24)

    def gradient(scale: float) -> Tensor:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", FP16):
            value = layer(leaf)
        (scale * value.square().mean()).backward()
        return leaf.grad / scale

    assert _error(gradient(2.0**-16), gradient(1.0)) < 2e-3  # there are 10 steps of float16 left below 1e-6


def _scaled_step(model: nn.Module, x: Tensor, scale: float) -> tuple[torch.amp.GradScaler, list[Tensor], list[Tensor]]:
    """One step under a GradScaler: the scaler, the parameters before and after."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", FP16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler, before, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("bad", [False, True], ids=["all good", "one NaN input"])
@pytest.mark.parametrize("layer", [lambda: ti.nn.FixedPoint(Cell(24)), lambda: ti.nn.TanhEquilibrium(24)])
def test_a_grad_scaler_sees_an_overflow_and_takes_no_step(layer: Callable[[], nn.Module], bad: bool) -> None:
    model, x = layer(), torch.randn(16, 24)
    model.on_failure = "ignore"
    if bad:
        x[3] = torch.nan
    scaler, before, after = _scaled_step(model, x, 2.0**10)
    assert scaler.get_scale() == 2.0**10
    assert not all(map(torch.equal, before, after))
    assert all(p.isfinite().all() for p in after)
    # The gradients of samples pass 65504, what comes in is finite.
    scaler, before, after = _scaled_step(model, x, 2.0**32)
    assert scaler.get_scale() == 2.0**31
    assert all(map(torch.equal, before, after))


def test_an_overflow_before_the_layer_is_seen_too() -> None:
    model, x = ti.nn.FixedPoint(Cell(24)), torch.randn(16, 24)
    with torch.autocast("cpu", FP16):
        value = model(x)
    value.backward(torch.full_like(value, torch.inf))
    assert not model.cell.linear.weight.grad.isfinite().all()


def test_an_overflow_in_the_sum_over_the_samples_is_seen_beside_a_failed_one() -> None:
    layer, x = ti.nn.FixedPoint(Cell(24), on_failure="ignore"), torch.full((16, 24), 0.5)
    x[3] = torch.nan
    with torch.autocast("cpu", FP16):
        value = layer(x)
    value.backward(torch.full_like(value, 2e4))
    weight = layer.cell.linear.weight.grad
    assert weight.isinf().any()
    assert not weight.isnan().any()


# --- failed samples ---------------------------------------------------------------------------------------------------


@DTYPES
def test_a_nan_sample_adds_exactly_nothing(dtype: torch.dtype) -> None:
    layer, x = ti.nn.FixedPoint(Cell(24), on_failure="ignore"), torch.randn(8, 24)
    spoilt = x.clone()
    spoilt[5, 3] = torch.nan
    solution, found = _gradients(layer, spoilt, dtype)
    _, expected = _gradients(layer, x[[0, 1, 2, 3, 4, 6, 7]], dtype)
    assert solution.status[5] == ti.Status.NONFINITE
    assert solution.converged.sum() == 7
    assert torch.equal(found[0][5], torch.zeros(24))
    found[0] = found[0][[0, 1, 2, 3, 4, 6, 7]]
    for mine, theirs in zip(found, expected, strict=True):
        assert _error(mine, theirs) < torch.finfo(dtype).eps  # seven rows are not multiplied in the order of eight
