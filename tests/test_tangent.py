"""The derivative of a taped evaluation: as exact as automatic differentiation, whatever the operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti
from torchimplicit import _tangent
from torchimplicit._layout import Layout
from torchimplicit._problem import Problem
from torchimplicit.linear import AutogradJacobian
from torchimplicit.solvers import NewtonKrylov

torch.manual_seed(0)
_WEIGHT = torch.randn(6, 6, dtype=torch.float64)
_BIAS = torch.randn(6, dtype=torch.float64)
_NORM = nn.LayerNorm(6, dtype=torch.float64)
_CONV = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
_GROUPS = nn.GroupNorm(3, 3, dtype=torch.float64)


class _Square(torch.autograd.Function):
    """Without a derivative in forward mode."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 2 * z * grads[0]


def _attention(z: Tensor, x: Tensor) -> Tensor:
    return torch.softmax(z @ z.mT / 3, dim=-1) @ z + x


def _several(z: Tensor, x: Tensor) -> Tensor:
    first, second = z.chunk(2, dim=-1)
    return torch.cat((torch.sin(second) * first, first - second), dim=-1) + x


def _constant_inside(z: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = z.abs().amax(dim=-1, keepdim=True)
    return torch.tanh(z / scale) + z.detach() * x


FLAT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product, from the right": lambda z, x: torch.tanh(z @ _WEIGHT.T + x),
    "product, from the left": lambda z, x: torch.sigmoid((_WEIGHT @ z.T).T + x),
    "linear with bias": lambda z, x: functional.silu(functional.linear(z, _WEIGHT, _BIAS)) + x,
    "bias by name": lambda z, x: functional.linear(z, weight=_WEIGHT, bias=_BIAS),
    "bias that varies": lambda z, x: functional.linear(x, _WEIGHT, z[0]),
    "multiples": lambda z, x: 0.5 * z * 3.0 + z * x,
    "multiplied by itself": lambda z, x: z * z + torch.mul(z, other=x),
    "sums": lambda z, x: torch.add(x, z, alpha=0.3) + torch.add(z, x, alpha=0.2) + (1.0 + z) + z.add(z),
    "sum that broadcasts": lambda z, x: (z[:, :1] + x).sum(dim=1, keepdim=True) * x,
    "mean over the batch": lambda z, x: z.mean(dim=0) + x,
    "differences": lambda z, x: x - z + (1 - z) - 2.0,
    "quotient": lambda z, x: x / (2 + z * z),
    "activations": lambda z, x: functional.gelu(z, approximate="tanh") + functional.leaky_relu(z, 0.2) + z.relu(),
    "clamped": lambda z, x: torch.clamp(z, -0.5, 0.5) + functional.softplus(z, beta=2.0) + functional.elu(x, 0.7),
    "normalised": lambda z, x: _NORM(z) + x,
    "attention": _attention,
    "several outputs": _several,
    "maximum": lambda z, x: z.max(dim=-1, keepdim=True).values + x,
    "chosen": lambda z, x: torch.where(z > 0, z.exp(), x),
    "indexed": lambda z, x: z[:, [3, 1, 2, 0, 5, 4]] + x,
    "einsum": lambda z, x: torch.einsum("bi,ij,bj->bi", z, _WEIGHT, z) + x,
    "constant": lambda z, x: x * 2.0,
    "detached": _constant_inside,
}
IMAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "convolution": lambda z, x: torch.tanh(functional.conv2d(z, _CONV.weight, padding=1) + x),
    "convolution with bias": lambda z, x: torch.tanh(_CONV(z)) + x,
    "bias by name": lambda z, x: functional.conv2d(z, _CONV.weight, bias=_CONV.bias, padding="same") + x,
    "residual block": lambda z, x: _GROUPS(functional.relu(z + _CONV(functional.relu(_CONV(z) + x)))),
    "transposed": lambda z, x: functional.conv_transpose2d(z, _CONV.weight, _CONV.bias, 1, 1) + x,
    "pooled": lambda z, x: functional.interpolate(functional.avg_pool2d(z, 2), scale_factor=2) + x,
    "flattened": lambda z, x: z.flatten(1).sin().unflatten(1, z.shape[1:]) + x,
}


def _check(fn: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    z, x, p = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    layout = Layout.of(z, 1)
    problem = Problem("fixed_point", fn, (x,), layout)
    rows = layout.pack([z])
    problem.output(rows)
    jacobian = problem.taped_jacobian(rows)
    assert jacobian is not None
    by_reverse_mode = AutogradJacobian.at(problem.output, rows, problem.count).mv(layout.pack([p]))
    before = problem.evaluations
    found = jacobian.mv(layout.pack([p]))
    assert problem.evaluations == before + 1
    # It is the tape's: an error in it would be hidden by the reverse of reverse mode.
    assert jacobian.tangents is not None
    tangent = jacobian.tangents()
    assert not jacobian.output.requires_grad or (tangent is not None and tangent(layout.pack([p])) is not None)
    torch.testing.assert_close(found, by_reverse_mode, rtol=1e-12, atol=1e-12)
    if fn is not _constant_inside:  # through which forward mode looks
        by_forward_mode = torch.func.jvp(lambda z: fn(z, x), (z,), (p,))[1]
        torch.testing.assert_close(layout.unpack(found), by_forward_mode, rtol=1e-12, atol=1e-12)
    # Linear, and the transpose of what reverse mode gives.
    u = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(jacobian.mv(-3 * rows), -3 * jacobian.mv(rows), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((jacobian.rmv(u) * layout.pack([p])).sum(), (u * found).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FLAT)
def test_products_of_functions_of_rows(name: str) -> None:
    _check(FLAT[name], (4, 6))


@pytest.mark.parametrize("name", IMAGES)
def test_products_of_functions_of_images(name: str) -> None:
    _check(IMAGES[name], (2, 3, 4, 4))


def test_a_complex_state() -> None:
    """Real-linear where fn is not holomorphic; no real number may be taken for a constant."""
    generator = torch.Generator().manual_seed(1)
    z, x, p = (torch.randn(4, 6, generator=generator, dtype=torch.complex128) for _ in range(3))
    weight = torch.randn(6, 6, generator=generator, dtype=torch.complex128)

    def fn(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * (z @ weight) + x) + 0.1 * z.conj() * z.abs() + 0.2 * torch.sigmoid(z.real)

    layout = Layout.of(z, 1)
    problem = Problem("fixed_point", fn, (x,), layout)
    rows = layout.pack([z])
    problem.output(rows)
    jacobian = problem.taped_jacobian(rows)
    assert jacobian is not None
    expected = torch.func.jvp(lambda z: fn(z, x), (z,), (p,))[1]
    torch.testing.assert_close(layout.unpack(jacobian.mv(layout.pack([p]))), expected, rtol=1e-12, atol=1e-12)


def test_a_state_of_several_tensors() -> None:
    def fn(z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = z
        return torch.tanh(second @ _WEIGHT + x), first * second.sum(dim=-1, keepdim=True)

    generator = torch.Generator().manual_seed(1)
    a, b, x, p, q = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(5))
    layout = Layout.of((a, b), 1)
    problem = Problem("fixed_point", fn, (x,), layout)
    rows = layout.pack([a, b])
    problem.output(rows)
    jacobian = problem.taped_jacobian(rows)
    assert jacobian is not None
    expected = torch.func.jvp(lambda z: fn(z, x), ((a, b),), ((p, q),))[1]
    torch.testing.assert_close(jacobian.mv(layout.pack([p, q])), layout.pack(list(expected)), rtol=1e-12, atol=1e-12)


def test_a_convolution_costs_one_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    z, x = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    weight = torch.randn(3, 3, 3, 3, requires_grad=True)
    layout = Layout.of(z, 1)
    problem = Problem("fixed_point", lambda z, x: torch.tanh(functional.conv2d(z, weight, padding=1) + x), (x,), layout)
    rows = layout.pack([z])
    problem.output(rows)
    jacobian = problem.taped_jacobian(rows)
    assert jacobian is not None
    monkeypatch.setattr(_tangent, "_forward_mode", None)  # is not called
    with torch.profiler.profile() as profile:
        jacobian.mv(rows)
    names = [e.name for e in profile.events()]
    assert names.count("aten::conv2d") == 1
    assert names.count("aten::tanh") == 0


@pytest.mark.parametrize(
    "fn",
    [
        lambda z, x: (z * 2).relu_() + x,
        lambda z, x: functional.relu(z + x, inplace=True),
        lambda z, x: _Square.apply(z) + x,
        lambda z, x: functional.dropout(z, 0.5) + x,
    ],
    ids=["method in place", "function in place", "custom Function", "random"],
)
def test_what_a_tape_cannot_tell_is_refused(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    z, x = torch.randn(4, 6), torch.randn(4, 6)
    problem = Problem("fixed_point", fn, (x,), Layout.of(z, 1))
    problem.output(z)
    assert problem.taped_jacobian(z) is None


def test_writing_into_a_tensor_is_refused() -> None:
    def fn(z: Tensor, x: Tensor) -> Tensor:
        out = torch.zeros_like(z)
        out[:, :3] = z[:, 3:]
        return out + x

    z, x = torch.randn(4, 6), torch.randn(4, 6)
    problem = Problem("fixed_point", fn, (x,), Layout.of(z, 1))
    problem.output(z)
    assert problem.taped_jacobian(z) is None


def test_the_tape_is_of_the_state_alone() -> None:
    """Parameters get no gradient by it, and an inference tensor is no obstacle."""
    weight = torch.randn(6, 6, requires_grad=True)
    x = torch.randn(4, 6)
    with torch.inference_mode():
        z = torch.randn(4, 6)
        problem = Problem("fixed_point", lambda z, x: torch.tanh(z @ weight + x), (x,), Layout.of(z, 1))
        problem.output(z)
        jacobian = problem.taped_jacobian(z)
        assert jacobian is not None
        product = jacobian.mv(z)
    assert not product.requires_grad
    assert weight.grad is None


def test_an_operation_without_forward_mode_leaves_it_to_reverse_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def without(*_: Any) -> Any:
        calls.append(1)
        raise NotImplementedError("Trying to use forward AD with an operation that does not support it")

    z, x, p = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    problem = Problem("fixed_point", _attention, (x,), Layout.of(z, 1))
    problem.output(z)
    operator = problem.linearize(z, problem.output(z))
    monkeypatch.setattr(_tangent, "_forward_mode", without)
    expected = torch.func.jvp(lambda z: _attention(z, x), (z,), (p,))[1]
    for _ in range(3):
        torch.testing.assert_close(operator.mv(p), p - expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1  # and is not asked again


def test_newton_krylov_takes_its_products_from_the_tape() -> None:
    """No convolution for the gradient of the weights, as reverse mode over reverse mode has one for each product."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(3, 3, 3, 3, generator=generator) / 5).requires_grad_()
    x = torch.randn(2, 3, 5, 5, generator=generator)
    solver = NewtonKrylov(rtol=1e-5)
    with torch.no_grad(), torch.profiler.profile() as profile:
        solution = ti.fixed_point(
            lambda z, x: torch.tanh(functional.conv2d(z, weight, padding=1) + x),
            torch.zeros_like(x),
            x,
            batch_dims=1,
            solver=solver,
        )
    assert solution.converged.all()
    names = [e.name for e in profile.events()]
    assert names.count("aten::_convolution_double_backward") == 0
    # One may be a look at whether the function is compiled.
    assert names.count("aten::convolution") <= solution.evaluations + 1


@pytest.mark.parametrize("solver", [NewtonKrylov(), ti.Auto()], ids=lambda s: type(s).__name__)
def test_roots_of_functions_of_several_kinds(solver: ti.solvers.Method) -> None:
    """Found with products from a tape, and as good as any."""
    generator = torch.Generator().manual_seed(2)
    b = torch.randn(3, 300, generator=generator, dtype=torch.float64)
    shift = torch.randn(300, generator=generator, dtype=torch.float64)

    def fn(z: Tensor, b: Tensor) -> Tensor:
        first, second = z.split(150, dim=-1)
        mixed = torch.cat((first + 0.1 * second.roll(1, -1), second - 0.1 * first * first), dim=-1)
        return functional.layer_norm(mixed, (300,)) * 0.1 + z + 0.2 * torch.tanh(z + shift) - b

    solution = ti.root(fn, torch.zeros_like(b), b, batch_dims=1, solver=solver)
    assert solution.converged.all()
    assert fn(solution.value, b).abs().max() < 1e-9
