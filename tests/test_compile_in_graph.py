"""torch.compile with the solve of a training step in the graph, as one operator: `layer.in_graph`."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchimplicit as ti
from tests.test_compile import ADJOINTS, SOLVERS, Cell, gradients, network, second
from torchimplicit.experiments.recipe import make_model
from torchimplicit.nn import _operation

pytestmark = pytest.mark.filterwarnings(
    "ignore::torchimplicit.ConvergenceWarning",
    "ignore::DeprecationWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
    "ignore:Dynamo does not know how to trace:UserWarning",
)


@pytest.fixture(autouse=True)
def _in_graph(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ti.nn.FixedPoint, "in_graph", True)
    monkeypatch.setattr(ti.nn.Root, "in_graph", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, **{"backend": "aot_eager", **options})


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_gradients(compiled: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    for found, wanted in zip(gradients(compiled, model, x), gradients(model, model, x), strict=True):
        assert wanted.abs().max() > 1e-7
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_training_is_one_graph_with_every_solver_and_adjoint(solver: Any) -> None:
    has_inverse = isinstance(solver, ti.Auto | ti.Anderson | ti.Broyden | ti.Newton | ti.Chord)
    for adjoint in ADJOINTS:
        if isinstance(adjoint, ti.Shine) and not has_inverse:
            continue
        torch._dynamo.reset()
        model = network(solver=solver, adjoint=adjoint)
        compiled = whole(model, dynamic=True)
        for batch in (3, 6):
            x = doubles(batch, 4)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-14)
            assert_gradients(compiled, model, x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_backends(backend: str) -> None:
    model = network()
    compiled = whole(model, backend=backend)
    for _ in range(3):
        assert_gradients(compiled, model, doubles(5, 4))
    with torch.no_grad():
        x = doubles(5, 4)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), rtol=1e-12, atol=1e-14)


def test_a_step_with_its_gradient_and_its_update_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ti.nn.FixedPoint, "in_graph", None)

    def run(compiled: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(3)
        model = make_model("picard", features=8)
        parameters = list(model.parameters())

        def step(images: Tensor, labels: Tensor) -> Tensor:
            loss = nn.functional.cross_entropy(model(images), labels)
            grads = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, g in zip(parameters, grads, strict=True):
                    p.sub_(g, alpha=0.1)
            return loss.detach()

        call = whole(step, backend="inductor") if compiled else step
        generator = torch.Generator().manual_seed(0)
        batches = [torch.rand(10, 28, 28, generator=generator) for _ in range(4)]
        return [float(call(images, torch.arange(10))) for images in batches], [p.detach() for p in parameters]

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        (losses, found), (reference, wanted) = run(True), run(False)
    assert losses == pytest.approx(reference, rel=1e-5)
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_without_the_switch_it_is_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ti.nn.FixedPoint, "in_graph", None)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(network())(doubles(3, 4))
    model = network()
    model[1].in_graph = True
    torch._dynamo.reset()
    assert_gradients(whole(model), model, doubles(3, 4))


def test_memory_that_the_compiler_uses_again_is_not_the_solves() -> None:
    class Gated(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.linear(z) * x + 0.1)  # whose derivative by the weight needs x

    layer, weight = ti.nn.FixedPoint(Gated(), solver=ti.Picard()), doubles(4, 4)

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = x.cos()  # dead after the solve, and of the size of what follows
        return (layer(gate) @ weight).cos() @ weight

    compiled, inputs = whole(call, backend="inductor"), [weight, *layer.parameters()]
    for _ in range(3):
        x = torch.randn(64, 4, dtype=torch.float64)
        for found, wanted in zip(
            torch.autograd.grad(compiled(x).sin().sum(), inputs),
            torch.autograd.grad(call(x).sin().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_what_the_operator_gives_shares_no_memory() -> None:
    class Shift(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.0 * z.detach() + x  # dz/dx is the identity: the incoming gradient is the outgoing one

    layer, x = ti.nn.FixedPoint(Shift(), depth=1), doubles(8, 4)
    with torch.no_grad():
        (z,), token = torch.ops.torchimplicit.solve([x], 0, 1, layer._number, [True])
        grad = torch.ones_like(z)
        (found,) = torch.ops.torchimplicit.solve_backward([grad], token, [x])
    torch.testing.assert_close(found, grad, rtol=0, atol=0)
    held = _operation._held[int(token)]
    memory = [t.untyped_storage().data_ptr() for t in (z, grad, found, x, *held.values)]
    assert len(set(memory)) == len(memory)


def test_what_waits_for_a_backward_pass_goes_with_the_result() -> None:
    model = network()
    compiled = whole(model, backend="inductor")
    x = doubles(3, 4)
    compiled(x).sum().backward()
    gc.collect()
    before = len(_operation._held)
    kept = [compiled(x) for _ in range(3)]
    assert len(_operation._held) == before + 3
    kept[0].sum().backward()
    del kept
    gc.collect()
    assert len(_operation._held) == before
    with torch.no_grad():
        compiled(x)
    assert len(_operation._held) == before


def test_a_graph_retained_gives_the_same_gradient_again() -> None:
    model = network()
    x = doubles(3, 4)
    loss, inputs = whole(model)(x).sin().sum(), [x, *model.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_second_derivative_is_an_error(backend: str) -> None:
    x = doubles(3, 4)
    call = whole(ti.nn.FixedPoint(Cell()), backend=backend)
    with pytest.raises(RuntimeError, match=r"has no derivative|double backward"):
        second(call, x)


def test_a_tensor_that_the_operator_is_not_given_is_an_error() -> None:
    hidden = doubles(4)

    class Hidden(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return super().forward(z, x) + 0.1 * hidden.sin()

    layer = ti.nn.FixedPoint(Hidden())
    with pytest.raises(RuntimeError, match=r"FixedPoint: its cell reads a tensor of shape \(4,\).*in_graph = False"):
        whole(layer)(doubles(3, 4))
    layer.in_graph = False
    torch._dynamo.reset()
    (found,) = torch.autograd.grad(torch.compile(layer, backend="aot_eager")(doubles(3, 4)).sum(), hidden)
    assert found.abs().max() > 0


def test_functions_and_nested_inputs_remain_a_break() -> None:
    weight = doubles(4, 4)

    def cell(z: Tensor, x: dict[str, Tensor]) -> Tensor:
        return torch.tanh(0.2 * z @ weight + x["x"])

    class Nested(Cell):
        def forward(self, z: Tensor, x: Any) -> Tensor:
            return super().forward(z, x["x"])

    for some in (cell, Nested()):
        layer = ti.nn.FixedPoint(some, init=lambda x: torch.zeros_like(x["x"]))
        torch._dynamo.reset()
        x = doubles(3, 4)
        compiled = torch.compile(layer, backend="aot_eager")
        (found,) = torch.autograd.grad(compiled({"x": x}).sin().sum(), x)
        (wanted,) = torch.autograd.grad(layer({"x": x}).sin().sum(), x)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_copy_of_a_layer_is_another_layer() -> None:
    model = network()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].cell.linear.weight.mul_(0.3)
    x = doubles(3, 4)
    both = whole(lambda x: model(x) + 2 * other(x))
    torch.testing.assert_close(both(x), model(x) + 2 * other(x), rtol=1e-12, atol=1e-14)
    inputs = [*model.parameters(), *other.parameters()]
    for found, wanted in zip(
        torch.autograd.grad(both(x).sum(), inputs),
        torch.autograd.grad((model(x) + 2 * other(x)).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_other_parameters_in_the_place_of_the_layers() -> None:
    model = network()
    params = {name: 0.5 * p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        scaled = {name: 1.1 * p for name, p in params.items()}
        return torch.func.functional_call(model, scaled, (x,)).sin().sum()

    leaves = {name: p.requires_grad_() for name, p in params.items()}
    x = doubles(3, 4)
    compiled = whole(loss, backend="inductor")
    for found, wanted in zip(
        torch.autograd.grad(compiled(leaves, x), list(leaves.values())),
        torch.autograd.grad(loss(leaves, x), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)
    assert model[1].cell.linear.weight is dict(model.named_parameters())["1.cell.linear.weight"]


def test_parametrized_tied_and_frozen_parameters_and_hooks() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
            self.b.weight = self.a.weight
            self.a.bias.requires_grad_(False)
            nn.utils.parametrizations.spectral_norm(self.b, name="bias", n_power_iterations=1)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.a(z) + 0.2 * self.b(z) + x)

    layer = ti.nn.FixedPoint(Tied()).eval()
    calls = []
    layer.cell.a.weight.register_hook(lambda g: calls.append(1) or 3 * g)
    x = doubles(3, 4)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(inputs) == 3
    found = torch.autograd.grad(whole(layer)(x).sin().sum(), inputs)
    assert len(calls) == 1
    for a, b in zip(found, torch.autograd.grad(layer(x).sin().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_states_starts_depth_and_memory() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = z
            return torch.tanh(0.5 * self.linear(b) + x), 0.3 * a + 0.1 * b

    pair = ti.nn.FixedPoint(Pair(), init=lambda x: (torch.zeros_like(x), torch.ones_like(x)))
    x = doubles(3, 4)

    def both(x: Tensor) -> Tensor:
        a, b = pair(x)
        return a + 2 * b

    inputs = [x, *pair.parameters()]
    for found, wanted in zip(
        torch.autograd.grad(whole(both)(x).sin().sum(), inputs),
        torch.autograd.grad(both(x).sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)

    for options in ({"depth": 3}, {"init": ti.nn.Previous()}, {"init": lambda x: 0.5 * x}):
        torch._dynamo.reset()
        model = network(**options)
        assert_gradients(whole(model), model, x)

    # A start that is part of the gradient, where the steps are differentiated.
    torch._dynamo.reset()
    model = network(adjoint=ti.Unroll(steps=2), solver=ti.Picard(), max_steps=2, init=lambda x: x.sin())
    assert_gradients(whole(model), model, x)


def test_what_is_set_later_holds_for_a_graph_made_before() -> None:
    model = network(depth=2)
    compiled, x = whole(model), doubles(3, 4)
    assert_gradients(compiled, model, x)
    shallow = compiled(x)
    model[1].depth = None
    assert_gradients(compiled, model, x)
    assert not torch.allclose(compiled(x), shallow)
    model[1].solver, model[1].on_failure, model[1].max_steps = ti.Picard(), "raise", 1
    with pytest.raises(ti.ConvergenceError):
        compiled(x)


def test_dropout_draws_one_mask_for_both_passes() -> None:
    class Noisy(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(z, x), 0.5, self.training)

    model = nn.Sequential(ti.nn.FixedPoint(Noisy(), solver=ti.Picard())).train()
    x = doubles(6, 4)
    results = []
    for call in (whole(model), model):
        torch.manual_seed(1)
        z = call(x)
        results.append([z, *torch.autograd.grad(z.sin().sum(), [x, *model.parameters()])])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.linear(z) + x)

    before, layer = nn.Linear(16, 16), ti.nn.FixedPoint(Single(), solver=ti.Picard())

    def call(x: Tensor) -> Tensor:
        if inside:
            with torch.autocast("cpu", torch.bfloat16):
                return layer(before(x))
        return layer(before(x))

    x = torch.randn(5, 16, requires_grad=True)
    results = []
    for some in (whole(call), call):
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            z = some(x)
        assert z.dtype == torch.float32
        results.append([z, *torch.autograd.grad(z.sin().sum(), [x, *layer.parameters()])])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_buffers_change_as_in_eager_mode(autocast: bool) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.2 * self.linear(z) + self.norm(x))

    model = nn.Sequential(ti.nn.FixedPoint(Normalised(), solver=ti.Picard())).train()
    other = copy.deepcopy(model)
    x = torch.randn(16, 8) + 1
    for some, call in ((model, whole(model)), (other, other)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            call(x).sum().backward()
        assert int(some[0].cell.norm.num_batches_tracked) == 1
    torch.testing.assert_close(model[0].cell.norm.running_mean, other[0].cell.norm.running_mean, rtol=1e-3, atol=1e-4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=3e-2, atol=3e-2 if autocast else 1e-4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: ti.nn.TanhEquilibrium(6), (4, 6)),
    "monotone": (lambda: ti.nn.MonotoneLinear(6, 5), (4, 6)),
    "monotone conv": (lambda: ti.nn.MonotoneConv2d(2, 3), (2, 2, 12, 12)),
    "contractive": (lambda: ti.nn.ContractiveLinear(6, 5), (4, 6)),
    "positive concave": (lambda: ti.nn.PositiveConcave(6, 5), (4, 6)),
    "residual": (lambda: ti.nn.ResidualEquilibrium(8), (2, 8, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_library(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make()
    x = torch.rand(shape, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for found, wanted in zip(
        torch.autograd.grad(whole(layer)(x).sin().sum(), inputs, allow_unused=True),
        torch.autograd.grad(layer(x).sin().sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, rtol=1e-4, atol=1e-5)


def test_the_operator_under_a_mode_does_as_outside() -> None:
    class Pass(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    layer = ti.nn.MonotoneConv2d(2, 3)  # solves by Fourier transforms, with conjugates
    x = torch.rand(2, 2, 12, 12, requires_grad=True)
    wanted = layer(x)
    (of_x,) = torch.autograd.grad(wanted.sin().sum(), x)
    tensors = [torch.zeros_like(wanted), x, *_operation._state(layer, set())]
    for mode in (nullcontext(), Pass()):
        with torch.no_grad(), mode:
            needed = [t.requires_grad for t in tensors]
            (z,), token = torch.ops.torchimplicit.solve(tensors, 1, 1, layer._number, needed)
            sources = [t for t, n in zip(tensors, needed, strict=True) if n]
            found = torch.ops.torchimplicit.solve_backward([z.cos()], token, sources)
        torch.testing.assert_close(z, wanted.detach(), rtol=0, atol=0)
        torch.testing.assert_close(found[0], of_x, rtol=1e-5, atol=1e-6)


def test_a_monitor_sees_solve_and_adjoint() -> None:
    model = network(solver=ti.Picard())
    compiled, x = whole(model), doubles(3, 4)
    with ti.monitor(model) as log:
        compiled(x).sum().backward()
        model(x).sum().backward()
    found, wanted = log.solutions
    assert found.steps.tolist() == wanted.steps.tolist()
    assert found.adjoint.steps is not None and wanted.adjoint.steps is not None
    assert found.adjoint.steps.tolist() == wanted.adjoint.steps.tolist()


def test_channels_last_and_strided_inputs() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.conv(z) + x)

    model = nn.Sequential(ti.nn.FixedPoint(Convolution()))
    compiled = whole(model, backend="inductor")
    images = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for x in (images, images.to(memory_format=torch.channels_last), images.transpose(2, 3), images[..., ::2]):
        assert_gradients(compiled, model, x.detach().requires_grad_())
