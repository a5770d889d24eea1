"""`gradient_error`: figures known in closed form, what it is taken over, and that nothing is left changed."""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.linear import LinearSolution, ResidualJacobian

F64 = torch.float64


@dataclass(frozen=True)
class OneStep(ti.Implicit):
    """`u = scale·v` in the place of `Aᵀu = v`: for scale 1 the gradient of one step of the map."""

    scale: float = 1.0

    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: ti.linear.Inverse | None = None) -> LinearSolution:
        return replace(super().solve(operator, v), value=self.scale * v)


@dataclass(frozen=True)
class Unable(ti.Implicit):
    """No sample's adjoint system is solved."""

    def solve(self, operator: ResidualJacobian, v: Tensor, inverse: ti.linear.Inverse | None = None) -> LinearSolution:
        status = torch.full_like(v[:, 0], int(ti.Status.STALLED), dtype=torch.long)
        return replace(super().solve(operator, v), value=torch.zeros_like(v), status=status, solved=False)


class Affine(nn.Module):
    """`A z + x + b`."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())
        self.bias = nn.Parameter(torch.zeros(matrix.shape[0], dtype=matrix.dtype))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.matrix.T + x + self.bias


def matrix(n: int = 4) -> Tensor:
    A = torch.randn(n, n, dtype=F64)
    return 0.6 * A / torch.linalg.matrix_norm(A, 2)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm()))


def weighted(weights: Tensor) -> Any:
    return lambda z: (weights * z).sum()


@pytest.mark.parametrize("a", [0.3, 0.9, -0.5])
def test_one_step_of_a_scalar_map_has_the_relative_error_a(a: float) -> None:
    # z = a z + x: dz/dx = 1/(1 − a), and 1 by one step.
    layer = ti.nn.FixedPoint(lambda z, x: a * z + x)
    error = ti.gradient_error(layer, torch.randn(5, 1, dtype=F64), adjoint=OneStep())
    assert error.cosine == pytest.approx(1.0, abs=1e-12)
    assert error.relative == pytest.approx(abs(a), abs=1e-12)
    assert error.norm_ratio == pytest.approx(1 - a, abs=1e-12)
    assert list(error.parts) == ["inputs[0]"]
    torch.testing.assert_close(error.sample_cosine, torch.ones(5, dtype=F64))


def test_a_gradient_of_the_wrong_sign_and_twice_the_size() -> None:
    layer = ti.nn.FixedPoint(lambda z, x: 0.0 * z + x)
    error = ti.gradient_error(layer, torch.randn(5, 2, dtype=F64), adjoint=OneStep(scale=-2.0))
    assert (error.cosine, error.relative, error.norm_ratio) == pytest.approx((-1.0, 3.0, 2.0), abs=1e-12)


def test_one_step_of_a_linear_map_by_the_inverse_matrix() -> None:
    A, x, c = matrix(), torch.randn(7, 4, dtype=F64), torch.randn(7, 4, dtype=F64)
    layer = ti.nn.FixedPoint(Affine(A), solver=ti.Newton(rtol=1e-14))
    error = ti.gradient_error(layer, x, adjoint=OneStep(), loss=weighted(c))
    z = torch.linalg.solve(torch.eye(4, dtype=F64) - A, x.T).T
    u = torch.linalg.solve((torch.eye(4, dtype=F64) - A).T, c.T).T  # exact; c itself by one step
    parts = {"cell.matrix": (c.T @ z, u.T @ z), "cell.bias": (c.sum(0), u.sum(0)), "inputs[0]": (c, u)}
    assert error.parts.keys() == parts.keys()
    for name, (ours, exact) in parts.items():
        found = error.parts[name]
        assert found.norm == pytest.approx(float(exact.norm()), rel=1e-9)
        assert found.relative == pytest.approx(float((ours - exact).norm() / exact.norm()), rel=1e-9)
        assert found.norm_ratio == pytest.approx(float(ours.norm() / exact.norm()), rel=1e-9)
        assert found.cosine == pytest.approx(cosine(ours, exact), rel=1e-9)
    ours, exact = (torch.cat([pair[i].flatten() for pair in parts.values()]) for i in (0, 1))
    assert error.relative == pytest.approx(float((ours - exact).norm() / exact.norm()), rel=1e-9)
    assert error.cosine == pytest.approx(cosine(ours, exact), rel=1e-9)
    torch.testing.assert_close(error.sample_cosine, torch.cosine_similarity(c, u, dim=1))


def test_the_default_loss_is_drawn_from_the_seed() -> None:
    layer, x = ti.nn.FixedPoint(Affine(matrix())), torch.randn(7, 4, dtype=F64)
    first, again, other = (ti.gradient_error(layer, x, adjoint=OneStep(), seed=seed).cosine for seed in (1, 1, 2))
    assert first == again != other
    c = torch.randn(7, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    assert first == pytest.approx(ti.gradient_error(layer, x, adjoint=OneStep(), loss=weighted(c)).cosine, rel=1e-12)


def test_exact_adjoint_has_no_error_and_a_loose_one_that_of_its_tolerance() -> None:
    layer, x = ti.nn.TanhEquilibrium(30, dtype=F64), torch.randn(6, 30, dtype=F64)
    assert ti.gradient_error(layer, x).relative < 1e-9
    loose = ti.Implicit(linear_solver=ti.GMRES(), rtol=0.1)
    assert 1e-4 < ti.gradient_error(layer, x, adjoint=loose).relative < 0.3


def test_none_measures_the_layers_own_adjoint() -> None:
    layer = ti.nn.FixedPoint(lambda z, x: 0.25 * z + x, adjoint=OneStep())
    error = ti.gradient_error(layer, torch.ones(2, 1, dtype=F64))
    assert error.relative == pytest.approx(0.25, abs=1e-12)
    assert error.adjoint == "OneStep()"


def test_reference_may_be_another_adjoint() -> None:
    layer = ti.nn.FixedPoint(lambda z, x: 0.25 * z + x)
    error = ti.gradient_error(layer, torch.ones(2, 1, dtype=F64), adjoint=ti.Implicit(), reference=OneStep())
    assert error.relative == pytest.approx(1 / 0.75 - 1, abs=1e-12)


def test_every_layer_of_a_model_is_given_the_adjoint() -> None:
    a, b = 0.5, 0.2
    model = nn.Sequential(ti.nn.FixedPoint(lambda z, x: a * z + x), ti.nn.Root(lambda z, x: z - b * z - x))
    error = ti.gradient_error(model, torch.ones(3, 1, dtype=F64), adjoint=OneStep())
    assert error.norm_ratio == pytest.approx((1 - a) * (1 - b), abs=1e-12)
    assert error.outcome.forward == error.outcome.adjoint == {ti.Status.CONVERGED: 6}


def test_parameters_after_the_layer_have_exact_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 4), ti.nn.FixedPoint(Affine(matrix())), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    error = ti.gradient_error(model, torch.randn(5, 3, dtype=F64), adjoint=OneStep())
    assert error.parts["2.weight"].relative == error.parts["2.bias"].relative == 0.0
    assert min(error.parts[name].relative for name in ("0.weight", "1.cell.matrix", "inputs[0]")) > 0.1
    assert "0.bias" not in error.parts


class Inputs(nn.Module):
    """Reads a dict of tensors; has a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.layer = ti.nn.FixedPoint(lambda z, x: 0.5 * z + x)

    def forward(self, given: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
        return {"z": scale * self.layer(given["x"])[given["rows"]]}


def test_inputs_and_outputs_may_be_pytrees() -> None:
    given = {"x": torch.ones(3, 1, dtype=F64), "rows": torch.tensor([0, 2])}
    error = ti.gradient_error(Inputs(), given, 2.0, adjoint=OneStep())
    assert set(error.parts) == {"unused", "inputs[0]['x']"}
    assert error.relative == pytest.approx(0.5, abs=1e-12)
    assert error.parts["unused"].norm == error.parts["unused"].relative == 0.0
    assert math.isnan(error.parts["unused"].cosine)
    assert error.sample_cosine is not None and error.sample_cosine.isnan().tolist() == [False, True, False]
    assert "of each of 3 samples: cosine at least 1.0000, median 1.0000 (1 without a gradient)" in str(error)


@pytest.mark.parametrize("whole", [False, True], ids=["tensor", "Solution"])
def test_function_is_given_the_adjoint_and_its_closure_is_found(whole: bool) -> None:
    A = matrix().requires_grad_()
    constant = (2.0 * A).detach()

    def fn(x: Tensor, adjoint: Any) -> Any:
        fixed = ti.fixed_point(lambda z: z @ A.T + x + constant[0], torch.zeros_like(x), batch_dims=1, adjoint=adjoint)
        return fixed if whole else fixed.value

    x = torch.randn(5, 4, dtype=F64)
    error = ti.gradient_error(fn, x, adjoint=OneStep())
    assert set(error.parts) == {"inputs[0]", "closure[0]"}
    c = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    u = torch.linalg.solve((torch.eye(4, dtype=F64) - A.detach()).T, c.T).T
    assert error.parts["inputs[0]"].relative == pytest.approx(float((u - c).norm() / u.norm()), rel=1e-9)
    assert error.parts["closure[0]"].relative > 0.1
    assert A.grad is None
    assert (error.sample_cosine is None) is not whole
    assert error.outcome.adjoint == ({ti.Status.CONVERGED: 5} if whole else {})


def test_complex_gradients_are_compared_as_real_ones() -> None:
    # By the conjugate transpose: u = v / (1 − ā), and v by one step.
    a = 0.3 + 0.6j
    layer = ti.nn.FixedPoint(lambda z, x: a * z + x, solver=ti.Newton())
    error = ti.gradient_error(layer, torch.randn(4, 1, dtype=torch.complex128), adjoint=OneStep())
    assert error.relative == pytest.approx(abs(a), rel=1e-9)
    assert error.cosine == pytest.approx((1 - a).real / abs(1 - a), rel=1e-9)


def test_failures_are_told_and_neither_warn_nor_raise() -> None:
    layer = ti.nn.FixedPoint(Affine(matrix()), on_failure="raise", solver=ti.Picard(), max_steps=3)
    error = ti.gradient_error(layer, torch.randn(5, 4, dtype=F64), adjoint=Unable())
    assert error.outcome.forward == {ti.Status.MAX_STEPS: 5}
    assert error.outcome.adjoint == {ti.Status.STALLED: 5}
    assert error.reference_outcome.adjoint == {ti.Status.CONVERGED: 5}
    assert error.relative == 1.0 and error.norm_ratio == 0.0 and math.isnan(error.cosine)
    assert "forward: 0 of 5 converged (5 MAX_STEPS); adjoint: 0 of 5 converged (5 STALLED)" in str(error)
    assert (layer.on_failure, layer.max_steps) == ("raise", 3)


def test_reference_that_is_not_solved_is_told() -> None:
    layer = ti.nn.FixedPoint(Affine(matrix()))
    error = ti.gradient_error(layer, torch.randn(5, 4, dtype=F64), adjoint=OneStep(), reference=Unable())
    assert error.relative == math.inf
    assert "the reference is not exact: 0 of 5 converged (5 STALLED)" in str(error)


def test_table_has_the_largest_errors_first_and_not_too_many() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)), ti.nn.FixedPoint(Affine(matrix()))).double()
    lines = str(ti.gradient_error(model, torch.randn(5, 4, dtype=F64), adjoint=OneStep())).splitlines()
    assert lines[0] == "gradient by OneStep(), against Implicit(rtol=9e-14)"
    assert lines[1].split() == ["cosine", "relative", "error", "norm", "ratio", "norm"]
    assert lines[2].startswith("everything ")
    assert lines[19] == "and 5 more, with smaller errors"
    assert "9.cell.matrix" in "\n".join(lines[3:6])
    assert max(map(len, lines)) < 120


class Stateful(nn.Module):
    """Everything that a run could leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.layer = ti.nn.TanhEquilibrium(4, adjoint=ti.Implicit(rtol=1e-3), solver=ti.Anderson())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1  # another tensor
        self.register_buffer("late", torch.ones(1))
        return self.layer(self.drop(self.norm(x.mul_(1.0))))


def assert_no_trace(call: Any) -> None:
    """Of `call(model, x)`."""
    model, x = Stateful(), torch.randn(6, 4)
    model.drop.eval()
    kept = model.count
    pending = model(x.clone()).square().sum()
    model.count, kept = kept, model.count
    del model.late
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = copy.deepcopy((model.state_dict(), x, [m.training for m in model.modules()], vars(model.layer)))
    state, tensors = torch.get_rng_state(), {id(t) for t in (*model.parameters(), *model.buffers())}
    with torch.no_grad():
        call(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    after = (model.state_dict(), x, [m.training for m in model.modules()], vars(model.layer))
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(t, before[0][name]) for name, t in after[0].items())
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert torch.equal(x, before[1]) and not x.requires_grad and x.grad is None
    assert after[2] == before[2]
    assert all(after[3][name] == before[3][name] for name in ("solver", "adjoint", "max_steps", "on_failure"))
    assert all(p.grad is not None and (p.grad == 3.0).all() and p.requires_grad for p in model.parameters())
    pending.backward()  # a graph of the caller's is still whole


def test_nothing_is_left_changed() -> None:
    assert_no_trace(lambda model, x: ti.gradient_error(model, x, adjoint=OneStep()))


def test_nothing_is_left_changed_by_a_run_that_raises() -> None:
    def call(model: nn.Module, x: Tensor) -> None:
        def loss(z: Tensor) -> Tensor:
            if model.layer.adjoint == OneStep():
                raise ZeroDivisionError
            return z.sum()

        with pytest.raises(ZeroDivisionError):
            ti.gradient_error(model, x, adjoint=OneStep(), loss=loss)

    assert_no_trace(call)


def test_a_graph_outside_is_not_entered() -> None:
    weight = torch.randn(4, 4, dtype=F64, requires_grad=True)
    outer = 0.1 * torch.tanh(weight)
    layer = ti.nn.FixedPoint(lambda z, x: z @ outer + x)
    x = torch.tanh(torch.randn(5, 4, dtype=F64, requires_grad=True))
    error = ti.gradient_error(layer, x, adjoint=OneStep())
    assert list(error.parts) == ["inputs[0]"]
    (outer.sum() + x.sum()).backward()  # its buffers are still there
    assert weight.grad is not None


def test_random_parts_act_alike_in_both_runs() -> None:
    model = nn.Sequential(nn.Dropout(0.5), ti.nn.TanhEquilibrium(4, dtype=F64))
    assert ti.gradient_error(model, torch.randn(6, 4, dtype=F64)).relative < 1e-9


X = torch.ones(2, 1)
LAYER = ti.nn.FixedPoint(lambda z, x: 0.5 * z + x)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ti.gradient_error(3, X), TypeError, ["layer", "int", "nn.Module"]),
        (lambda: ti.gradient_error(LAYER, X, adjoint=ti.Implicit), TypeError, ["adjoint", "instance"]),
        (lambda: ti.gradient_error(LAYER, X, adjoint=ti.Picard()), TypeError, ["adjoint", "Picard"]),
        (lambda: ti.gradient_error(LAYER, X, reference=1.0), TypeError, ["reference=1.0", "instance"]),
        (lambda: ti.gradient_error(LAYER, X, adjiont=None), TypeError, ["adjiont", "did you mean 'adjoint'"]),
        (lambda: ti.gradient_error(LAYER, X, loss=2), TypeError, ["loss", "int"]),
        (lambda: ti.gradient_error(LAYER, X, loss=lambda z: z), ValueError, ["loss", "one real scalar", r"\(2, 1\)"]),
        (lambda: ti.gradient_error(LAYER, X, seed=-1), ValueError, ["seed=-1", ">= 0"]),
        (lambda: ti.gradient_error(nn.Linear(1, 1), X), ValueError, ["layer", "no implicit layer", "solver"]),
        (lambda: ti.gradient_error(lambda x: x, X), TypeError, ["layer", "keyword adjoint", "lambda x, adjoint"]),
        (lambda: ti.gradient_error(LAYER, torch.ones(2, 1).long()), TypeError, ["z0", "int64"]),
        (
            lambda: ti.gradient_error(lambda n, adjoint: torch.ones(n), 3),
            ValueError,
            ["nothing to differentiate", "inputs", "parameter"],
        ),
        (lambda: ti.gradient_error(lambda x, adjoint: x.detach(), X), ValueError, ["requires no gradient", "detached"]),
        (lambda: ti.gradient_error(lambda x, adjoint: None, X), TypeError, ["must return", "NoneType"]),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert caught.match(word)
