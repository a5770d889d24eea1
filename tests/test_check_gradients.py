"""`check_gradients`: right layers pass, wrong ones are flagged, and what cannot be told is said to be so."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from tests.test_gradient_error import Affine, OneStep, Unable, assert_no_trace, matrix
from torchimplicit.diagnostics._ridders import derivative

F64 = torch.float64


class Wrong(torch.autograd.Function):
    """tanh, with a derivative that is too large by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return ctx.factor * (1 - y * y) * grads[0], None


class Conv(nn.Module):
    """`tanh(conv(z) + x)`, with a factor on the derivative of tanh."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.conv.weight.data.mul_(0.7)
        self.factor = factor

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return Wrong.apply(self.conv(z) + x, self.factor)


def rooted(z: Tensor, x: Tensor) -> Tensor:
    return z**3 + z - x


def image(dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(2, 2, 4, 4, dtype=dtype)


RIGHT: dict[str, Callable[[], tuple[Any, Tensor]]] = {
    "TanhEquilibrium": lambda: (ti.nn.TanhEquilibrium(6), torch.randn(4, 6)),
    "convolution": lambda: (ti.nn.FixedPoint(Conv()), image()),
    "Newton": lambda: (ti.nn.FixedPoint(Affine(matrix()), solver=ti.Newton()), torch.randn(4, 4)),
    "Root": lambda: (ti.nn.Root(rooted), torch.randn(5, 3)),
    "model": lambda: (nn.Sequential(nn.Linear(3, 6), ti.nn.TanhEquilibrium(6), nn.Linear(6, 2)), torch.randn(4, 3)),
    "no implicit layer": lambda: (nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2)), torch.randn(4, 3)),
    "dropout": lambda: (nn.Sequential(nn.Linear(3, 20), nn.Dropout()), torch.randn(4, 3)),
    "batch norm": lambda: (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh()), torch.randn(4, 3)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_layers_agree_to_1e_7(name: str) -> None:
    layer, x = RIGHT[name]()
    check = ti.check_gradients(layer.double(), x.double())
    assert check.ok and check and check.verdict == "agree"
    assert check.worst <= 1e-7 and check.uncertainty <= 1e-6
    assert len(check.directions) == 8 and check.inconclusive == 0 and check.repeatability == 0.0
    assert str(check).startswith("gradients agree with finite differences: worst relative error ")
    assert "\n" not in str(check)
    assert len(check.table().splitlines()) == 9


@pytest.mark.parametrize("factor", [1.01, 0.99, 1.0001])
@pytest.mark.parametrize("implicit", [False, True])
def test_wrong_backward_is_flagged(implicit: bool, factor: float) -> None:
    cell = Conv(factor)
    layer = (ti.nn.FixedPoint(cell) if implicit else nn.Sequential(nn.Conv2d(2, 2, 1), _Of(factor))).double()
    check = ti.check_gradients(layer, image())
    assert not check.ok and not check and check.verdict == "differ"
    assert abs(factor - 1) / 10 < check.worst < 10 * abs(factor - 1)
    assert max(d.uncertainty for d in check.directions) < 1e-6
    assert str(check).startswith("GRADIENTS DIFFER from finite differences: relative error ")


class _Of(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return Wrong.apply(x, self.factor)


def test_the_figures_are_those_of_a_known_error() -> None:
    # One leaf, y = x: ⟨∇, d⟩ is 1.01 ⟨v, d⟩, and the error relative to the larger of it and its root mean square.
    x = torch.full((4,), 3.0, dtype=F64)
    check = ti.check_gradients(lambda x: _Scaled.apply(x), x, directions=3)
    assert len(check.directions) == 3
    for d in check.directions:
        assert d.backward / d.finite_difference == pytest.approx(1.01, rel=1e-9)
        assert 0.0 < d.error <= 0.01 / 1.01 + 1e-9
        assert d.verdict == "differ" and d.tightened is None
    assert "a solver inside, if there is one, must have a tight rtol" in str(check)
    assert "in 3 of 3 directions" in str(check)


class _Scaled(torch.autograd.Function):
    """The identity; its derivative is 1.01."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 1.01 * grads[0]


class _Zero(nn.Module):
    """A tensor that is read, and then left out of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.detach()


def test_a_forgotten_dependence_is_flagged() -> None:
    check = ti.check_gradients(_Zero(), torch.randn(4, 3, dtype=F64))
    assert check.verdict == "differ" and check.worst > 0.05


@pytest.mark.parametrize("solver", [ti.Picard(rtol=0.1), ti.Anderson(rtol=0.1), ti.Picard(atol=0.1, rtol=0.0)])
def test_sloppy_solver_is_inconclusive_and_not_a_wrong_gradient(solver: Any) -> None:
    layer = ti.nn.TanhEquilibrium(6, solver=solver, dtype=F64)
    check = ti.check_gradients(layer, torch.randn(4, 6, dtype=F64), directions=4)
    assert not check.ok and check.verdict == "inconclusive" and check.inconclusive >= 1
    assert check.worst > 1e-4
    told = [d.tightened for d in check.directions if d.tightened is not None]
    assert told and max(d.error for d in told) < 1e-8
    assert str(check).startswith(f"inconclusive in {check.inconclusive} of 4 directions: ")
    assert "tighten the solver's rtol" in str(check)
    assert layer.solver is solver


def test_few_steps_are_inconclusive() -> None:
    layer = ti.nn.TanhEquilibrium(6, solver=ti.Picard(), max_steps=2, dtype=F64)
    check = ti.check_gradients(layer, torch.randn(4, 6, dtype=F64), directions=2)
    assert check.verdict == "inconclusive" and layer.max_steps == 2
    assert [(d.unsolved, d.tightened and d.tightened.verdict) for d in check.directions] == [(4, "agree")] * 2


def test_few_steps_of_a_function_are_inconclusive_where_it_returns_a_solution() -> None:
    def fn(x: Tensor) -> ti.Solution:
        options: Any = {"batch_dims": 1, "solver": ti.Picard(), "max_steps": 2, "on_failure": "ignore"}
        return ti.fixed_point(lambda z: 0.5 * torch.tanh(z) + x, torch.zeros_like(x), **options)

    x = torch.randn(4, 6, dtype=F64)
    assert ti.check_gradients(fn, x, directions=2).verdict == "inconclusive"
    told = ti.check_gradients(lambda x: fn(x).value, x, directions=2)  # nothing is known of the solve
    assert told.verdict == "differ" and "a solver inside" in str(told)


@pytest.mark.parametrize("adjoint", [OneStep(), OneStep(scale=1.001), Unable()])
def test_wrong_adjoint_differs_even_behind_a_sloppy_solver(adjoint: Any) -> None:
    layer = ti.nn.TanhEquilibrium(6, solver=ti.Picard(rtol=1e-2), adjoint=adjoint, dtype=F64, on_failure="raise")
    check = ti.check_gradients(layer, torch.randn(4, 6, dtype=F64), directions=4)
    assert check.verdict == "differ"
    assert "rtol" not in str(check)


def test_unsolved_samples_are_inconclusive() -> None:
    layer = ti.nn.FixedPoint(lambda z, x: 2.0 * torch.cos(3.0 * z) + x, solver=ti.Picard())
    check = ti.check_gradients(layer, torch.randn(4, 1, dtype=F64), directions=1)
    assert check.verdict == "inconclusive"
    assert all(d.unsolved > 0 for d in check.directions)
    assert "4 samples of a solve did not converge" in str(check)


def test_float32_is_held_to_its_own_tolerance() -> None:
    layer = ti.nn.TanhEquilibrium(6)
    check = ti.check_gradients(layer, torch.randn(4, 6))
    assert check.ok and check.tolerance == pytest.approx(4.9e-3, rel=0.01)
    assert check.dtype == torch.float32
    wrong = ti.check_gradients(ti.nn.FixedPoint(Conv(1.1)), image(torch.float32))
    assert wrong.verdict == "differ"


def test_lower_precision_is_no_evidence_and_says_so() -> None:
    check = ti.check_gradients(nn.Linear(4, 4).bfloat16(), torch.randn(3, 4).bfloat16())
    assert check.verdict != "differ"
    assert check.uncertainty > 0.01
    assert "bfloat16 is too coarse for finite differences" in str(check)


def test_complex_tensors() -> None:
    a = nn.Parameter(torch.tensor([0.3 + 0.4j, -0.2j], dtype=torch.complex128))
    x = torch.randn(3, 2, dtype=torch.complex128)
    layer = ti.nn.FixedPoint(lambda z, x: a * z + 0.1 * z.conj() * x.abs() + x)
    assert ti.check_gradients(layer, x).worst < 1e-7
    assert ti.check_gradients(lambda x: torch.fft.fft(x * x.conj() + x), x)
    assert ti.check_gradients(lambda x: _Scaled.apply(x), x).verdict == "differ"


def test_closure_is_perturbed_and_put_back() -> None:
    W = matrix().requires_grad_()
    before = W.detach().clone()

    def fn(x: Tensor) -> ti.Solution:
        return ti.fixed_point(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x), batch_dims=1)

    assert ti.check_gradients(fn, torch.randn(3, 4, dtype=F64)).worst < 1e-7
    assert torch.equal(W.detach(), before) and W.grad is None
    wrong = ti.check_gradients(lambda x: _Scaled.apply(1.0 * W) @ x, torch.ones(4, dtype=F64))
    assert wrong.verdict == "differ"  # by W alone: the derivative by x is right


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch.compile's own
def test_compiled_cell() -> None:
    layer = ti.nn.FixedPoint(torch.compile(Affine(matrix()), backend="eager"))
    torch.manual_seed(1)
    check = ti.check_gradients(layer, torch.randn(3, 4, dtype=F64), directions=2)
    assert check.worst < 1e-7
    assert ti.gradient_error(layer, torch.randn(3, 4, dtype=F64), adjoint=OneStep()).relative > 0.1


class Counter(nn.Module):
    """Returns something else each time."""

    def __init__(self, change: float) -> None:
        super().__init__()
        self.calls, self.change = 0, change

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + self.change * (self.calls % 2))


def test_layer_that_is_not_deterministic_is_told() -> None:
    check = ti.check_gradients(Counter(0.1), torch.ones(3, dtype=F64))
    assert not check.ok and check.verdict == "inconclusive" and check.directions == ()
    assert check.repeatability == pytest.approx(0.1, rel=0.1)
    assert math.isnan(check.worst)
    assert str(check).startswith(
        "inconclusive: layer is not deterministic, two evaluations at the same point differ by"
    )


def test_small_noise_is_in_the_uncertainty() -> None:
    check = ti.check_gradients(Counter(1e-8), torch.ones(3, dtype=F64))
    assert check.verdict != "differ" and check.uncertainty > 1e-8
    assert "two evaluations at the same point differ by 1e-08" in str(check)


def test_output_that_is_not_finite_nearby_is_inconclusive() -> None:
    check = ti.check_gradients(lambda x: torch.sqrt(x - 1.0).sum() + x.sum(), torch.ones(3, dtype=F64))
    assert check.verdict == "inconclusive" and "not finite" in str(check)


def test_steps_that_leave_the_domain_are_made_smaller() -> None:
    assert ti.check_gradients(lambda x: torch.log(x - 0.95), torch.ones(3, dtype=F64)).worst < 1e-6


def test_gradient_that_is_nan_differs() -> None:
    class Nan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2.0 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return math.nan * grads[0]

    check = ti.check_gradients(lambda x: Nan.apply(x), torch.ones(3, dtype=F64))
    assert check.verdict == "differ" and check.worst == math.inf


def test_directions_are_drawn_from_the_seed() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=F64)
    first, again, other = ([d.backward for d in ti.check_gradients(layer, x, seed=s).directions] for s in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == 8


def test_nothing_is_left_changed() -> None:
    assert_no_trace(lambda model, x: ti.check_gradients(model, x, directions=2))


def test_nothing_is_left_changed_by_a_run_that_raises() -> None:
    def call(model: nn.Module, x: Tensor) -> None:
        weight = model.layer.linear.weight.detach().clone()

        def refuse(*_: Any) -> None:
            if not torch.equal(model.layer.linear.weight, weight):
                raise ZeroDivisionError

        handle = model.drop.register_forward_hook(refuse)
        with pytest.raises(ZeroDivisionError):
            ti.check_gradients(model, x)
        handle.remove()

    assert_no_trace(call)


@pytest.mark.parametrize(
    "f, exact",
    [
        (math.exp, 1.0),
        (lambda h: 1 / (1.05 - h), 1.05**-2),
        (lambda h: math.sin(20 * h), 20.0),
        (lambda h: h + 1e3 * h**7, 1.0),
        (lambda h: abs(h - 1e-3), -1.0),
        (lambda h: math.log(h + 0.1) if h > -0.1 else math.nan, 10.0),
    ],
)
def test_extrapolated_differences_and_what_they_are_worth(f: Callable[[float], float], exact: float) -> None:
    found = derivative(f, 0.125, 1e-9, 1e-16)
    assert found.value == pytest.approx(exact, rel=1e-8)
    assert found.error <= 1e-7


def test_a_step_that_rounding_hides_is_no_evidence_of_a_zero_derivative() -> None:
    found = derivative(lambda h: 0.4 * round(h / 0.4), 0.125, 1e-6, 0.2)
    assert (found.value, found.error) == pytest.approx((0.0, 3.2))  # 0.2 by the second step


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
def test_noise_is_not_underestimated_fivefold(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        found = derivative(
            lambda h: math.sin(h) + size * float(torch.randn((), generator=generator)), 0.125, 0.0, 1e-16
        )
        assert abs(found.value - 1.0) <= 5 * found.error


X = torch.ones(2, 1)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ti.check_gradients(3, X), TypeError, ["layer", "int", "nn.Module"]),
        (lambda: ti.check_gradients(nn.Tanh(), X, direction=2), TypeError, ["did you mean 'directions'"]),
        (lambda: ti.check_gradients(nn.Tanh(), X, directions=0), ValueError, ["directions=0", ">= 1"]),
        (lambda: ti.check_gradients(nn.Tanh(), X, tolerance=0.0), ValueError, ["tolerance=0.0", "None"]),
        (lambda: ti.check_gradients(nn.Tanh(), X, seed=1.0), ValueError, ["seed=1.0", "integer"]),
        (lambda: ti.check_gradients(lambda n: torch.ones(n), 3), ValueError, ["nothing to differentiate", "inputs"]),
        (lambda: ti.check_gradients(lambda x: x.detach(), X), ValueError, ["requires no gradient", "inputs.0."]),
        (lambda: ti.check_gradients(lambda x: x.long(), X), TypeError, ["must return", "Tensor"]),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert caught.match(word)
