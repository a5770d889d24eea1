"""Layers with certificates: what they claim holds, for random parameters and after rough training."""

import io
from typing import Any

import pytest
import torch

import torchimplicit as ti
from benchmarks.certificates import CASES, holds, instances, trained
from torchimplicit.nn._parametrizations import (
    InfinityBall,
    MonotoneMatrix,
    NonEuclidean,
    NonNegative,
    SpectralBall,
    conv_norm_bound,
)

INSTANCES = 8
SLOW = {"MonotoneTiers", "MonotoneLinear-tanh", "ContractiveConv2d-inf"}


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_inequalities_hold_for_random_parameters(name: str) -> None:
    found = instances(CASES[name], 3 if name in SLOW else INSTANCES)
    assert holds(found), found


@pytest.mark.parametrize("name", CASES)
def test_the_inequalities_hold_after_optimiser_steps_with_a_large_rate(name: str) -> None:
    found = trained(CASES[name], 10)
    assert holds(found), found


def test_a_claim_that_is_exceeded_is_seen() -> None:
    good = {"condition": 1.0, "lipschitz": 0.5, "starts": 1e-9, "failures": 0.0}
    assert holds(good)
    for bad in ({"condition": 1.0001}, {"lipschitz": 1.0001}, {"starts": 1e-5}, {"failures": 1.0}):
        assert not holds(good | bad)


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    torch.manual_seed(2)
    layer, (x, *graph) = CASES[name].make(), CASES[name].inputs(2)
    x.requires_grad_()
    if isinstance(getattr(layer, "solver", None), ti.PeacemanRachford):
        layer.solver = ti.PeacemanRachford(rtol=1e-13)
    weights = [torch.randn_like(z) for z in _tensors(layer(x, *graph))]

    def loss() -> torch.Tensor:
        return sum((w * z).sum() for w, z in zip(weights, _tensors(layer(x, *graph)), strict=True))

    loss().backward()
    step = 1e-4
    for parameter in (x, *layer.parameters()):
        direction = torch.randn_like(parameter)
        expected = float((parameter.grad * direction).sum())
        values = []
        with torch.no_grad():
            for shift in (step, -2.0 * step):
                parameter.add_(direction, alpha=shift)
                values.append(float(loss()))
            parameter.add_(direction, alpha=step)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_parameters_survive_a_checkpoint(name: str) -> None:
    layer, other, inputs = CASES[name].make(), CASES[name].make(), CASES[name].inputs(2)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for one, two in zip(_tensors(layer(*inputs)), _tensors(other(*inputs)), strict=True):
        assert torch.equal(one, two)


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_a_certificate_says_what_it_says() -> None:
    layer = ti.nn.ContractiveLinear(2, 2, contraction=0.5)
    with torch.no_grad():
        layer.cell.parametrizations.weight.original.copy_(torch.tensor([[0.0, 0.4], [0.1, 0.0]]))
        layer.injection.weight.copy_(torch.eye(2) * 3.0)
    found = layer.certificate()
    assert found.well_posed and found.norm == "2"
    assert (found.factor, found.margin, found.lipschitz) == pytest.approx((0.4, 0.6, 5.0))
    assert str(found).startswith("unique equilibrium: margin 0.6, factor 0.4, Lipschitz 5")
    with pytest.raises(ValueError, match="not finite"):
        ti.nn.Certificate(True, float("nan"), None, None, "2", "nobody")


def test_the_infinity_ball_is_the_nearest_point() -> None:
    ball = InfinityBall(0.9)
    matrix = torch.randn(40, 7) * torch.rand(40, 1) * 2
    matrix[0] = 0.0
    matrix[1] = 1.0  # ties
    near = ball(matrix)
    assert float(near.abs().sum(1).max()) <= 0.9
    inside = matrix.abs().sum(1) <= 0.9
    assert bool(inside.any()) and torch.equal(near[inside], matrix[inside])
    assert torch.allclose(ball(near), near, atol=1e-15)
    feasible = torch.randn(200, 40, 7)
    feasible = 0.9 * feasible / feasible.abs().sum(2, keepdim=True)
    products = ((matrix - near) * (feasible - near)).sum(2)
    assert float(products.max()) < 1e-12
    far = matrix[~inside][:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(ball, (far,))


def test_the_spectral_ball_is_never_left() -> None:
    ball = SpectralBall(0.7)
    for size in (1e-3, 1.0, 1e3):
        V = size * torch.randn(9, 5, dtype=torch.float32)
        W = ball(V)
        assert float(torch.linalg.matrix_norm(W.double(), 2)) <= 0.7
        if size < 1:
            assert torch.equal(W, V)
    assert torch.autograd.gradcheck(ball, (torch.randn(4, 3, requires_grad=True),))


def test_the_norm_bound_of_a_convolution_is_one() -> None:
    for size in (1, 3, 5):
        kernel = torch.randn(3, 2, size, size)
        units = torch.eye(2 * 81).reshape(-1, 2, 9, 9)
        pad = size // 2
        zero = torch.nn.functional.conv2d(units, kernel, padding=pad).flatten(1)
        wrapped = torch.nn.functional.pad(units, (pad,) * 4, mode="circular")
        circular = torch.nn.functional.conv2d(wrapped, kernel).flatten(1)
        bound = float(conv_norm_bound(kernel))
        for matrix in (zero, circular):
            norm = float(torch.linalg.matrix_norm(matrix, 2))
            assert norm <= bound * (1 + 1e-12)
            assert bound <= 3.0 * norm


@pytest.mark.parametrize(
    "parametrization, weight",
    [
        (MonotoneMatrix(0.5), torch.tensor([[0.2, 3.0], [-3.0, -4.0]])),
        (NonEuclidean(0.3), torch.tensor([[-2.0, 1.0], [0.5, -1.0]])),
        (NonNegative(), torch.tensor([[0.2, 3.0], [1e-5, 40.0]])),
    ],
    ids=lambda p: type(p).__name__,
)
def test_a_weight_that_satisfies_the_condition_can_be_assigned(parametrization: Any, weight: torch.Tensor) -> None:
    weight = weight.double()
    free = parametrization.right_inverse(weight)
    again = parametrization(*free) if isinstance(free, tuple) else parametrization(free)
    assert torch.allclose(again, weight, atol=1e-12)


@pytest.mark.parametrize(
    "parametrization, weight",
    [
        (MonotoneMatrix(0.5), torch.eye(2)),
        (NonEuclidean(0.3), torch.eye(2)),
        (NonNegative(), -torch.eye(2)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_a_weight_that_does_not_is_refused(parametrization: Any, weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="weight"):
        parametrization.right_inverse(weight)


def test_a_circular_operator_is_torch_s_convolution() -> None:
    for size in (8, 18):  # by a matrix, and by FFT
        layer = ti.nn.MonotoneConv2d(1, 3, padding=1)
        z = torch.randn(2, 3, size, size)
        operator = layer.cell.operator(z)
        expected = torch.nn.functional.conv2d(torch.nn.functional.pad(z, (2,) * 4, mode="circular"), layer.weight)
        assert torch.allclose(operator.mv(z), expected, atol=1e-12)
        alpha = 0.7
        v = operator.resolvent(alpha).mv(z)
        assert torch.allclose(v + alpha * (v - operator.mv(v)), z, atol=1e-12)
        u = torch.randn_like(z)
        assert float(((u * operator.mv(z)).sum() - (operator.rmv(u) * z).sum()).detach().abs()) < 1e-10


def test_the_tiers_are_monotone_and_their_resolvent_is_exact() -> None:
    layer = ti.nn.MonotoneTiers(1, (2, 3, 2), 1, margin=0.3)
    with torch.no_grad():
        operator = layer.cell.operator((8, 8))
        W = operator.dense()
        identity = torch.eye(len(W))
        assert float(torch.linalg.eigvalsh(identity - 0.5 * (W + W.mT))[0]) >= 0.3 - 1e-12
        assert float(torch.linalg.matrix_norm(identity - W, 2)) <= operator.norm_bound()
        p = torch.randn(2, len(W))
        V = operator.resolvent(0.6)
        assert torch.allclose(V.mv(p) @ (identity + 0.6 * (identity - W)).mT, p, atol=1e-12)
        assert torch.allclose(V.rmv(p) @ (identity + 0.6 * (identity - W)), p, atol=1e-12)
        assert torch.allclose(operator.rmv(p), p @ W, atol=1e-12)


def test_the_prescribed_lipschitz_constant_is_nearly_attained() -> None:
    worst = max(instances(CASES["LipschitzBounded"], 1, seed)["lipschitz"] for seed in range(20))
    assert 0.7 < worst <= 1 + 1e-9


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ti.nn.MonotoneLinear(0, 2), "in_features=0"),
        (lambda: ti.nn.MonotoneLinear(2, 2, margin=0.0), "margin=0.0"),
        (lambda: ti.nn.MonotoneConv2d(1, 2, 4), "kernel_size=4 is not valid; give an odd"),
        (lambda: ti.nn.MonotoneTiers(1, ()), "channels"),
        (lambda: ti.nn.ContractiveLinear(2, 2, contraction=1.0), "contraction=1.0"),
        (lambda: ti.nn.ContractiveLinear(2, 2, norm="1"), "norm='1' is not known"),
        (lambda: ti.nn.NonEuclideanMonotone(2, 2, measure=1.5), "measure=1.5"),
        (lambda: ti.nn.PositiveConcave(2, 2, activation="relu"), "not concave and bounded"),
        (lambda: ti.nn.LipschitzBounded(2, 2, 1, lipschitz=-1.0), "lipschitz=-1.0"),
        (lambda: ti.nn.MonotoneLinear(3, 2)(torch.zeros(2, 4)), r"must be \(\.\.\., 3\)"),
        (lambda: ti.nn.MonotoneConv2d(1, 2)(torch.zeros(2, 4, 8, 8)), r"must be \(B, 1, H, W\)"),
        (lambda: ti.nn.MonotoneTiers(1, (2, 2))(torch.zeros(1, 1, 7, 8)), "multiples of 2"),
        (lambda: ti.nn.MonotoneConv2d(1, 2)(torch.zeros(1, 1, 5, 5)), "at least"),
    ],
)
def test_what_is_out_of_range_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(TypeError, match="did you mean 'margin'"):
        ti.nn.MonotoneLinear(2, 2, margn=0.5)  # pyright: ignore[reportCallIssue]
