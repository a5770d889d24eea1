"""torch.compile: an inference solve is a part of the graph, any other a break; values and gradients are eager's."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.recipe import make_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::torchimplicit.ConvergenceWarning",
    "ignore::DeprecationWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",  # Dynamo looks at it
    "ignore:Dynamo does not know how to trace:UserWarning",
)

TRACED = [
    ti.Picard(),
    ti.Picard(damping=0.7, check_every=3),
    ti.Picard(damping_patience=5),
    ti.Picard(check_every=12, extrapolate_every=12),
    ti.Picard(extrapolate_every=4, check_every=3, rtol=1e-6, atol=1e-8, norm="max"),
    ti.Anderson(),
    ti.Anderson(history=2, mixing=0.8, check_every=2, rtol=0.0, atol=1e-9, norm="two"),
    ti.Newton(),
    ti.Newton(max_backtracks=0),
]
SOLVERS = [
    ti.Auto(),
    ti.Picard(),
    ti.Anderson(),
    ti.Broyden(),
    ti.Newton(),
    ti.NewtonKrylov(),
    ti.Chord(),
    ti.Dogleg(),
    ti.LevenbergMarquardt(),
]
ADJOINTS = [
    ti.Implicit(),
    ti.NeumannSeries(5),
    ti.JacobianFree(),
    ti.PhantomGradient(3, 0.8),
    ti.Shine(5),
    ti.Unroll(steps=3),
]


class Cell(nn.Module):
    """`tanh(A z + x)`, a contraction."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, dtype=torch.float64)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.8 * self.linear(z) + x)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_graph(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, **{"backend": "eager", "dynamic": True, **options})


def assert_same(found: ti.Solution, wanted: ti.Solution, rtol: float = 1e-9) -> None:
    assert found.status.tolist() == wanted.status.tolist()
    assert found.steps.tolist() == wanted.steps.tolist()
    assert found.converged.tolist() == wanted.converged.tolist()
    torch.testing.assert_close(found.value, wanted.value, rtol=rtol, atol=1e-13)
    torch.testing.assert_close(found.residual, wanted.residual, rtol=1e-3, atol=1e-14)


# fn(z) = a z + b tanh z + c, one row of coefficients per sample: contractions, fast and slow; one that only a search or
# a restart solves; a start that is the solution; steps that run out, that diverge, that go nowhere; NaN; overflow.
CASES = torch.tensor(
    [
        [0.5, 0.0, 1.0],
        [-0.9, 0.1, 1.0],
        [0.5, 0.2, 0.0],
        [0.9999, 0.0, 1e-3],
        [-3.0, 2.0, 1.0],
        [3.0, 0.0, 1.0],
        [1.0, 0.0, 1.0],
        [torch.nan, 0.0, 1.0],
        [1e200, 1e300, 1e200],
        [0.0, -2.5, 0.3],
    ],
    dtype=torch.float64,
)


def polynomial(z: Tensor, c: Tensor) -> Tensor:
    return c[:, :1] * z + c[:, 1:2] * torch.tanh(z) + c[:, 2:]


@pytest.mark.parametrize("solver", TRACED, ids=str)
def test_a_fixed_point_in_a_graph_ends_as_in_eager_mode(solver: Any) -> None:
    def solve(c: Tensor) -> ti.Solution:
        start = c.new_zeros(len(c), 2)
        return ti.fixed_point(polynomial, start, c, solver=solver, batch_dims=1, max_steps=200, on_failure="ignore")

    compiled = one_graph(solve)
    with torch.no_grad():
        found, wanted = compiled(CASES), solve(CASES)
        assert len(set(wanted.status.tolist())) > 2
        assert_same(found, wanted)
        assert_same(compiled(CASES[:4]), solve(CASES[:4]))


@pytest.mark.parametrize("solver", [ti.Anderson(), ti.Picard(extrapolate_every=4)], ids=lambda s: type(s).__name__)
def test_a_bad_accelerated_step_is_taken_back_in_a_graph(solver: Any) -> None:
    x = 2 * torch.randn(8, 4, dtype=torch.float64)
    weight = torch.randn(4, 4, dtype=torch.float64)

    def cell(z: Tensor, gain: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return torch.sin(gain * (z @ weight.t()) + x)

    def solve(gain: Tensor, x: Tensor) -> ti.Solution:
        options: Any = {"solver": solver, "batch_dims": 1, "max_steps": 60, "on_failure": "ignore"}
        return ti.fixed_point(cell, torch.zeros_like(x), gain, weight, x, **options)

    compiled = one_graph(solve)
    with torch.no_grad():
        for gain in (0.5, 0.8, 1.0, 1.3, 2.0):
            g = torch.tensor(gain, dtype=torch.float64)
            found, wanted = compiled(g, x), solve(g, x)
            done = wanted.converged & (wanted.steps < 40)  # later on, rounding decides
            assert gain > 0.5 or done.sum() >= 4
            torch.testing.assert_close(found.steps[done], wanted.steps[done], rtol=0, atol=0)
            torch.testing.assert_close(found.value[done], wanted.value[done], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", [ti.Picard(damping=0.3), ti.Anderson(mixing=0.3), ti.Newton()], ids=str)
def test_a_root_in_a_graph_ends_as_in_eager_mode(solver: Any) -> None:
    def residual(z: Tensor, c: Tensor) -> Tensor:
        return c[:, 2:] * z**3 + (1 - c[:, 2:]) * z**2 + c[:, :1] * z - c[:, 1:2]

    def solve(c: Tensor) -> ti.Solution:
        # From afar the residual is soon small beside where it began.
        start = torch.where(c[:, :1] == 7.0, 1e5, torch.ones_like(c[:, :1]))
        return ti.root(residual, start, c, solver=solver, batch_dims=1, max_steps=60, on_failure="ignore")

    # Cubics, of which the fourth one's derivative vanishes on the way, and the last ones are not finite; quadratics
    # without a root.
    cubics = [
        [1.0, 2.0],
        [7.0, 20.0],
        [-2.0, -2.0],
        [-3.0, 5.0],
        [0.5, 0.1],
        [1.0, 1.0],
        [-3.0, 0.0],
        [torch.nan, 1.0],
        [1e300, 1e300],
    ]
    quadratics = [[1.0, -1.0], [0.3, -2.0], [-1.5, -1.0]]
    rows = [[*row, 1.0] for row in cubics] + [[*row, 0.0] for row in quadratics]
    c = torch.tensor(rows, dtype=torch.float64)
    with torch.no_grad():
        wanted = solve(c)
        assert wanted.converged.any() and not wanted.converged.all()
        assert_same(one_graph(solve)(c), wanted, rtol=1e-6)  # those that failed were on no path to anywhere


def test_success_in_a_graph_needs_the_evidence_of_eager_mode() -> None:
    zero, far = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), 2.0**53 - 2, dtype=torch.float64)
    c = torch.tensor([[-0.9, 1.234], [-0.99, 0.777]], dtype=torch.float64)

    def onward(z: Tensor, c: Tensor) -> Tensor:
        return z + 1  # passes any relative test, far enough out, where it rounds to z

    def swinging(z: Tensor, c: Tensor) -> Tensor:
        return c[:, :1] * torch.sin(z) + c[:, 1:] * torch.cos(0.3 * z)

    cases: list[tuple[Any, Tensor, Any, list[ti.Status]]] = [
        (onward, zero, ti.Picard(rtol=0.1), [ti.Status.STALLED] * 2),
        (onward, far, ti.Picard(rtol=0.0, atol=1e-9), [ti.Status.DIVERGED] * 2),
        # The first one's residual is rounding's, which is all that can be had.
        (swinging, zero, ti.Picard(rtol=0.0, atol=1e-300), [ti.Status.CONVERGED, ti.Status.MAX_STEPS]),
    ]
    for fn, start, solver, statuses in cases:
        torch._dynamo.reset()
        options: dict[str, Any] = {"solver": solver, "batch_dims": 1, "max_steps": 150, "on_failure": "ignore"}
        solve = lambda z, c, fn=fn, options=options: ti.fixed_point(fn, z, c, **options)  # noqa: E731
        with torch.no_grad():
            found, wanted = one_graph(solve)(start, c), solve(start, c)
        assert wanted.status.tolist() == statuses
        assert_same(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("max_steps", [0, 1, 5, 13, 24])
def test_fixed_steps_in_a_graph_are_those_of_eager_mode(max_steps: int) -> None:
    solver = ti.Picard(check_every=4, extrapolate_every=6)
    layer = ti.nn.FixedPoint(Cell(), solver=solver, max_steps=max_steps, on_failure="ignore").eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = one_graph(layer.solve)(x), layer.solve(x)
        assert int(wanted.steps.max()) == min(max_steps, 20)
        assert_same(found, wanted)


def test_a_state_of_several_tensors_and_coarse_precision_in_a_graph() -> None:
    def fn(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        a, b = torch.cos(0.5 * z["b"].sum(-1) + x), 0.3 * torch.tanh(z["b"]) + z["a"][..., None]
        return {"a": a, "b": b.half()}

    def solve(x: Tensor) -> ti.Solution:
        start = {"a": torch.zeros_like(x), "b": x.new_zeros(*x.shape, 3).half()}
        return ti.fixed_point(fn, start, x, solver=ti.Anderson(), batch_dims=2, on_failure="ignore")

    x = torch.randn(2, 3)
    with torch.no_grad():
        found, wanted = one_graph(solve)(x), solve(x)
    assert found.status.shape == (2, 3) and found.status.tolist() == wanted.status.tolist()
    for name in ("a", "b"):
        assert found.value[name].dtype == wanted.value[name].dtype
        torch.testing.assert_close(found.value[name], wanted.value[name], rtol=2e-3, atol=2e-3)


def test_the_mnist_model_is_one_graph_in_inference() -> None:
    model = make_model("picard").eval()
    images = torch.rand(6, 28, 28)
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(images)
        assert (explained.graph_break_count, explained.graph_count) == (0, 1)
        compiled = one_graph(model)
        for batch in (images, torch.rand(9, 28, 28)):
            torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-5)


@pytest.mark.compiler
def test_inductor_runs_the_loop() -> None:
    layer = ti.nn.FixedPoint(Cell(), solver=ti.Picard(), on_failure="ignore").eval()
    compiled = one_graph(layer.solve, backend="inductor")
    with torch.no_grad():
        for batch in (3, 7):
            x = torch.randn(batch, 4, dtype=torch.float64)
            wanted = layer.solve(x)
            assert wanted.converged.all()
            assert_same(compiled(x), wanted)


def test_what_cannot_be_traced_is_a_break_and_keeps_its_meaning() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    layer = ti.nn.FixedPoint(Cell(), solver=ti.Picard(), max_steps=2, on_failure="raise").eval()
    with torch.no_grad():
        with pytest.raises(ti.ConvergenceError, match="3 of 3"):
            torch.compile(layer, backend="eager")(x)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            one_graph(layer)(x)
        for other in (ti.nn.FixedPoint(Cell()).eval(), ti.nn.FixedPoint(Cell(), solver=ti.Broyden()).eval()):
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(other, backend="eager")(x), other(x), rtol=0, atol=0)


def gated(z: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    return 0.8 * torch.sigmoid(gate) * torch.tanh(z) + x


def test_functions_that_may_share_memory_are_compiled_all_the_same() -> None:
    weight, shift = 0.2 * torch.randn(4, 4), torch.randn(4)

    def views(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + 0.1 * z @ weight + x)

    def parts(z: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.sigmoid(gate) * (z @ weight.t()) + x)

    def nested(z: Tensor, x: Tensor) -> Tensor:
        return views(z, x + shift)

    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(z @ self.weight.T + 0.1 * z @ self.weight + x)

    def closure(x: Tensor, solver: Any) -> Tensor:
        a, b = x.chunk(2)
        return ti.fixed_point(lambda z: torch.tanh(z @ weight.t() + a - b), torch.zeros_like(a), solver=solver).value

    def given(fn: Any, count: int) -> Any:
        def solve(x: Tensor, solver: Any) -> Tensor:
            parts = x.chunk(2)
            return ti.fixed_point(fn, torch.zeros_like(parts[0]), *parts[:count], solver=solver, batch_dims=1).value

        return solve

    x = torch.randn(6, 4)
    for solve in (given(views, 1), given(parts, 2), given(nested, 1), given(Attribute().eval(), 1), closure):
        for solver in (ti.Picard(check_every=3), ti.Anderson(), ti.Newton()):
            torch._dynamo.reset()
            with torch.no_grad():
                found = torch.compile(solve, backend="eager")(x, solver)
                torch.testing.assert_close(found, solve(x, solver), rtol=1e-5, atol=1e-6)
    # Parts of one tensor are no obstacle where they are arguments.
    with torch.no_grad():
        torch._dynamo.reset()
        found = one_graph(given(gated, 2))(x, ti.Anderson())
        torch.testing.assert_close(found, given(gated, 2)(x, ti.Anderson()), rtol=1e-5, atol=1e-6)


def test_a_cell_that_draws_masks_is_not_traced() -> None:
    class Noisy(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(z, x), 0.5, self.training)

    layer = ti.nn.FixedPoint(Noisy(), solver=ti.Picard()).train()
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = layer.solve(x)
        torch.manual_seed(1)
        found = torch.compile(layer.solve, backend="eager")(x)
    assert wanted.converged.all() and found.converged.all()
    torch.testing.assert_close(found.value, wanted.value, rtol=0, atol=0)


def test_a_monitor_sees_what_runs_compiled() -> None:
    model = nn.Sequential(ti.nn.FixedPoint(Cell(), solver=ti.Picard()))
    compiled = torch.compile(model.eval(), backend="eager")
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad(), ti.monitor(model) as log:
        compiled(x), compiled(x), model(x)
    assert [record.name for record in log.records] == ["0"] * 3
    assert [record.solution.steps.tolist() for record in log.records[:2]] == [log.solutions[2].steps.tolist()] * 2


# --- training ---------------------------------------------------------------------------------------------------


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).sin().sum(), [x, *model.parameters()]))


def network(**options: Any) -> nn.Module:
    before, after = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)
    return nn.Sequential(before, ti.nn.FixedPoint(Cell(), **options), after)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_training_has_the_values_and_gradients_of_eager_mode(solver: Any) -> None:
    has_inverse = isinstance(solver, ti.Auto | ti.Anderson | ti.Broyden | ti.Newton | ti.Chord)
    for adjoint in ADJOINTS:
        if isinstance(adjoint, ti.Shine) and not has_inverse:
            continue
        torch._dynamo.reset()
        model = network(solver=solver, adjoint=adjoint)
        compiled = torch.compile(model, backend="aot_eager", dynamic=True)
        for batch in (3, 6):
            x = torch.randn(batch, 4, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-14)
            for found, wanted in zip(gradients(compiled, model, x), gradients(model, model, x), strict=True):
                assert wanted.abs().max() > 1e-6
                torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13, msg=f"{adjoint}, batch {batch}")


@pytest.mark.compiler
def test_training_with_inductor() -> None:
    model = network()
    compiled = torch.compile(model)
    for batch in (3, 6, 6):
        x = torch.randn(batch, 4, dtype=torch.float64, requires_grad=True)
        for found, wanted in zip(gradients(compiled, model, x), gradients(model, model, x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_whole_training_step_is_compiled() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = make_model("picard", features=8)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def run(compiled: bool) -> tuple[list[float], list[Tensor]]:
        model, optimizer = make()

        def step(images: Tensor, labels: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        call = torch.compile(step, backend="aot_eager") if compiled else step
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(4):
            images = torch.rand(10, 28, 28, generator=generator)
            losses.append(float(call(images, torch.arange(10))))
        return losses, [p.detach() for p in model.parameters()]

    (losses, found), (reference, wanted) = run(True), run(False)
    assert losses == pytest.approx(reference, rel=1e-5)
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("solver", [ti.Auto(), ti.Picard(), ti.Newton()], ids=lambda solver: type(solver).__name__)
def test_a_compiled_cell_in_an_eager_layer(solver: Any, backend: str) -> None:
    cell = Cell()
    compiled = ti.nn.FixedPoint(torch.compile(cell, backend=backend), solver=solver)
    eager = ti.nn.FixedPoint(cell, solver=solver)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for found, wanted in zip(gradients(compiled, cell, x), gradients(eager, cell, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_matrix_free_newton_of_a_compiled_cell_is_an_error_of_torch() -> None:
    layer = ti.nn.FixedPoint(torch.compile(Cell(), backend="aot_eager"), solver=ti.NewtonKrylov())
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        layer(torch.randn(3, 4, dtype=torch.float64))


def test_a_graph_retained_gives_the_same_gradient_again() -> None:
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss, inputs = compiled(x).sin().sum(), [x, *model.parameters()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for a, b, wanted in zip(first, again, gradients(model, model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, wanted, rtol=1e-12, atol=1e-14)


def second(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(call(x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def test_a_second_derivative_is_right_or_an_error() -> None:
    layer = ti.nn.FixedPoint(Cell())
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    # The layer itself runs as it always does; what is compiled around it has no second derivative in torch.
    torch.testing.assert_close(
        second(torch.compile(layer, backend="aot_eager"), x), second(layer, x), rtol=1e-10, atol=0
    )
    for around in (lambda x: layer(2 * x.exp()), lambda x: layer(x).exp()):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="double backward"):
            second(torch.compile(around, backend="aot_eager"), x)


def test_transforms_of_a_compiled_solve() -> None:
    def solve(a: Tensor) -> Tensor:
        return ti.fixed_point(lambda z: torch.cos(a * z), torch.zeros_like(a), solver=ti.Picard()).value

    a = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    for transform in (torch.func.vmap(solve),):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.compile(transform, backend="eager")(a)
        torch.testing.assert_close(found, transform(a), rtol=1e-9, atol=0)


def test_no_gradient_flows_into_a_graph_of_an_inference() -> None:
    layer = ti.nn.FixedPoint(Cell(), solver=ti.Picard()).eval()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        inferred = compiled(x)
    trained = compiled(x)
    assert not inferred.requires_grad and trained.requires_grad
    torch.testing.assert_close(inferred, trained.detach(), rtol=1e-12, atol=1e-14)
    (found,), (wanted,) = (torch.autograd.grad(call(x).sin().sum(), x) for call in (compiled, layer))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
