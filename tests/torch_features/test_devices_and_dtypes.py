"""Default devices and dtypes, the meta device, subclasses of tensors: what is the user's choice stays it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from tests.torch_features.cells import EVERY_LAYER, EXACT, TIGHT, Cell, close, gradients, inputs, loss, unrolled

SOLVERS = {
    "auto": ti.Auto(),
    "picard": ti.Picard(damping=0.9, check_every=4, extrapolate_every=8),
    "anderson": ti.Anderson(),
    "broyden": ti.Broyden(),
    "newton": ti.Newton(),
    "krylov": ti.NewtonKrylov(),
    "chord": ti.Chord(),
    "dogleg": ti.Dogleg(),
    "levenberg": ti.LevenbergMarquardt(),
}
LINEAR = {"cascade": None, "lu": ti.LU(), "gmres": ti.GMRES(), "bicgstab": ti.BiCGStab(), "neumann": ti.Neumann()}


@pytest.fixture
def _restored() -> Iterator[None]:
    """The defaults as they were."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def everything(layer: Any, x: Tensor) -> list[Tensor]:
    """Value, first and second derivatives."""
    wanted = [x, *layer.parameters()]
    z = layer(x)
    first = torch.autograd.grad(loss(z), wanted, retain_graph=True)
    (g,) = torch.autograd.grad(loss(z), x, create_graph=True)
    return [z.detach(), *first, *torch.autograd.grad(g.square().sum(), wanted)]


@EVERY_LAYER
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
@pytest.mark.usefixtures("_restored")
def test_no_tensor_of_a_solve_is_made_on_the_default_device_or_in_the_default_dtype(make: Any, solver: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    layer.solver = solver
    expected = everything(layer, x)
    wanted = [x, *layer.parameters()]
    close(expected[1 : 1 + len(wanted)], gradients(unrolled(layer, x, 80), wanted), 1e-5)
    z = torch.empty_like(x)
    scale = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype)  # `loss` would be on the default device

    def again() -> list[Tensor]:
        z = layer(x)
        by_value = 2 * scale.reshape(z.shape) * z.detach()
        return [z.detach(), *torch.autograd.grad(z, wanted, by_value)]

    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    for found, truth in zip(again(), expected, strict=False):
        assert found.device.type == "cpu"
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, truth, atol=1e-7, rtol=0)


@pytest.mark.parametrize("linear_solver", LINEAR.values(), ids=LINEAR.keys())
@pytest.mark.usefixtures("_restored")
def test_no_tensor_of_an_adjoint_solve_is_either(linear_solver: Any) -> None:
    layer, x = ti.nn.FixedPoint(Cell(), solver=TIGHT, adjoint=ti.Implicit(linear_solver, rtol=1e-11)), inputs()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(layer, x).square().sum(), x)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@pytest.mark.usefixtures("_restored")
def test_the_default_dtype_is_that_of_a_new_layer() -> None:
    torch.set_default_dtype(torch.float64)
    layer = ti.nn.TanhEquilibrium(3, solver=TIGHT, adjoint=EXACT)
    assert layer.linear.weight.dtype == torch.float64
    x = 0.1 * torch.randn(4, 3, requires_grad=True)
    close(gradients(layer(x), [x]), gradients(unrolled(layer, x), [x]), 1e-8)


@EVERY_LAYER
def test_a_layer_moved_to_another_dtype_is_that_layer(make: Any) -> None:
    layer, x = make(), inputs()
    layer.solver, layer.adjoint = None, None
    single = copy.deepcopy(layer).to(torch.float32)
    leaf, small = x.clone().requires_grad_(), x.float().requires_grad_()
    z = single(small)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.double(), unrolled(layer, x), atol=2e-5, rtol=0)
    found = [g.double() for g in gradients(z, [small, *single.parameters()])]
    close(found, gradients(unrolled(layer, leaf), [leaf, *layer.parameters()]), 2e-3)


# --- The meta device


@EVERY_LAYER
def test_a_layer_made_without_memory_is_filled_later(make: Any) -> None:
    source, x = make(), inputs()
    with torch.device("meta"):
        layer = make()
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
    with torch.device("meta"):
        other = make()
    other.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(other(x), source(x))


@EVERY_LAYER
@pytest.mark.parametrize("adjoint", [ti.Implicit(), ti.Unroll(steps=2)], ids=["implicit", "unroll"])
def test_a_call_on_the_meta_device_has_shapes_and_no_values(make: Any, adjoint: Any) -> None:
    layer = make().to("meta")
    layer.adjoint = adjoint
    x = torch.empty(4, 3, dtype=torch.float64, device="meta", requires_grad=True)
    solution = layer.solve(x)
    assert solution.value.shape == (4, 3)
    assert solution.value.dtype == torch.float64
    assert solution.evaluations == 1
    for field in (solution.status, solution.converged, solution.residual, solution.steps):
        assert field.shape == (4,)
        assert field.is_meta  # no `True` in it
    with pytest.raises(RuntimeError, match="meta"):
        bool(solution.converged.all())
    solution.value.sum().backward()
    assert [t.grad.shape for t in (x, *layer.parameters())] == [t.shape for t in (x, *layer.parameters())]


def test_the_other_calls_on_the_meta_device() -> None:
    z0 = torch.empty(5, 2, device="meta")
    for solution in (
        ti.minimize(lambda z: z.square().sum(1), z0, batch_dims=1),
        ti.least_squares(lambda z: z @ z.T, z0),
    ):
        assert solution.value.shape == (5, 2)
        assert solution.value.is_meta
    with pytest.raises(ValueError, match="shape of z0"):
        ti.root(lambda z: z.sum(1), z0)
    remembering = ti.nn.FixedPoint(lambda z, x: 0.5 * z + x, init=ti.nn.Previous())
    assert remembering(z0).shape == remembering(z0).shape == (5, 2)


# --- Subclasses of tensors


class Marked(torch.Tensor):
    """A tensor with a name for its class."""


@EVERY_LAYER
def test_an_input_of_a_subclass_has_the_same_value_and_derivatives(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    marked = x.detach().as_subclass(Marked).requires_grad_()
    assert type(layer(marked)) is Marked
    found = everything(layer, marked)
    assert [type(t) for t in (found[0], found[1])] == [Marked, Marked]
    close((t.as_subclass(Tensor) for t in found), everything(layer, x), 1e-10)
    wanted = [x, *layer.parameters()]
    close(found[1 : 1 + len(wanted)], gradients(unrolled(layer, x), wanted))


@EVERY_LAYER
def test_inputs_and_starts_may_be_parameters(make: Any) -> None:
    layer, x = make(), nn.Parameter(inputs())
    start = nn.Parameter(0.1 * torch.randn_like(x))
    layer.init = lambda x: start
    z = layer(x)
    assert type(z) is Tensor
    (found, at_start) = torch.autograd.grad(loss(z), [x, start])
    close([found], gradients(unrolled(layer, x), [x]))
    assert at_start.count_nonzero() == 0
