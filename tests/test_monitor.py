"""`monitor`: which calls it records, under which name, in which order, and what it keeps alive."""

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.diagnostics import _monitor


@pytest.fixture(autouse=True)
def _no_monitor_left() -> Iterator[None]:
    """No monitor outlives its block (checked, and put right for the other tests)."""
    yield
    left = len(_monitor._active)
    _monitor._active.clear()
    assert left == 0


class Two(nn.Module):
    """Two implicit layers, called in the order opposite to their definition, the first of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.late = ti.nn.TanhEquilibrium(3)
        self.body = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(3, 3), ti.nn.TanhEquilibrium(3))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.body["inner"](x)
        return self.late(self.late(x))


def test_records_are_in_the_order_of_the_calls_under_the_names_of_the_modules() -> None:
    model = Two()
    with ti.monitor(model) as log:
        model(torch.randn(2, 3))
        assert [r.name for r in log.records] == ["body.inner.1", "late", "late"]
        model.late(torch.randn(5, 3))
    assert [r.name for r in log.records] == ["body.inner.1", "late", "late", "late"]
    assert [tuple(r.solution.status.shape) for r in log.records] == [(2,), (2,), (2,), (5,)]


def test_layer_that_is_the_model_has_the_empty_name() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    with ti.monitor(layer) as log:
        layer(torch.ones(1, 3))
    assert [r.name for r in log.records] == [""]


def test_record_holds_what_solve_returned() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    with ti.monitor(layer) as log:
        solution = layer.solve(torch.randn(4, 3), trace=True)
    (seen,) = log.solutions
    assert torch.equal(seen.value, solution.value)
    assert seen.steps.tolist() == solution.steps.tolist() and min(seen.steps.tolist()) > 0
    assert seen.residual.tolist() == solution.residual.tolist()
    assert seen.evaluations == solution.evaluations
    assert seen.trace is not None and solution.trace is not None and torch.equal(seen.trace, solution.trace)
    assert seen.adjoint is solution.adjoint


def test_solves_of_fixed_point_and_root_layers_are_recorded_and_those_of_plain_calls_are_not() -> None:
    model = nn.Sequential(ti.nn.FixedPoint(lambda z, x: 0.5 * z + x), ti.nn.Root(lambda z, x: 2 * z - x))
    with ti.monitor(model) as log:
        model(torch.ones(2, 3))
        ti.fixed_point(lambda z: 0.5 * z, torch.ones(2))
    assert [r.name for r in log.records] == ["0", "1"]


def test_layers_of_other_models_are_not_recorded() -> None:
    model, other = Two(), Two()
    with ti.monitor(model) as log:
        other(torch.randn(2, 3))
    assert log.records == []


def test_nothing_is_recorded_before_or_after_the_block() -> None:
    model = Two()
    model(torch.randn(2, 3))
    with ti.monitor(model) as log:
        pass
    model(torch.randn(2, 3))
    assert log.records == []


def test_clear_forgets_the_records_so_far() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    with ti.monitor(layer) as log:
        layer(torch.ones(2, 3))
        log.clear()
        layer(torch.ones(4, 3))
    assert [tuple(s.status.shape) for s in log.solutions] == [(4,)]


def test_exception_inside_the_block_is_passed_on_and_ends_the_monitoring() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    log = ti.Monitor()

    def run() -> None:
        nonlocal log
        with ti.monitor(layer) as log:
            layer(torch.ones(2, 3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    layer(torch.ones(2, 3))
    assert len(log.records) == 1


def test_failing_layer_is_not_recorded_but_the_ones_before_it_are() -> None:
    failing = ti.nn.FixedPoint(lambda z, x: 3 * z + x + 1, solver=ti.Picard(), on_failure="raise")
    model = nn.Sequential(ti.nn.TanhEquilibrium(3), failing)
    with pytest.raises(ti.ConvergenceError), ti.monitor(model) as log:
        model(torch.ones(2, 3))
    assert [r.name for r in log.records] == ["0"]


@pytest.mark.parametrize("before", [1, 0])
def test_nested_blocks_over_one_model_each_see_their_own_calls(before: int) -> None:
    layer = ti.nn.TanhEquilibrium(3)
    with ti.monitor(layer) as outer:
        for _ in range(before):
            layer(torch.ones(1, 3))
        with ti.monitor(layer) as inner:
            layer(torch.ones(2, 3))
        layer(torch.ones(3, 3))
    layer(torch.ones(4, 3))
    assert [len(s.status) for s in outer.solutions] == [1] * before + [2, 3]
    assert [len(s.status) for s in inner.solutions] == [2]


def test_nested_blocks_that_saw_nothing_end_in_the_right_order() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    with ti.monitor(layer) as outer:
        with ti.monitor(layer) as inner:
            pass
        layer(torch.ones(3, 3))
    assert (len(outer.records), len(inner.records)) == (1, 0)


def test_nested_blocks_over_parts_of_a_model_see_their_parts() -> None:
    model = Two()
    with ti.monitor(model) as whole, ti.monitor(model.late) as part:
        model(torch.randn(2, 3))
    assert [r.name for r in whole.records] == ["body.inner.1", "late", "late"]
    assert [r.name for r in part.records] == ["", ""]


def test_adjoint_report_is_filled_by_the_backward_pass_even_after_the_block() -> None:
    model = Two()
    with ti.monitor(model) as log:
        out = model(torch.randn(2, 3))
    assert all(s.adjoint.status is None and s.adjoint.evaluations is None for s in log.solutions)
    out.sum().backward()
    for s in log.solutions:
        assert s.adjoint.status is not None and s.adjoint.status.tolist() == [0, 0]
        assert s.adjoint.residual is not None and s.adjoint.residual.max() <= 1e-5
        assert s.adjoint.steps is not None and tuple(s.adjoint.steps.shape) == (2,)
        assert s.adjoint.evaluations is not None and s.adjoint.evaluations >= 1


def test_adjoint_report_of_a_call_without_gradients_stays_empty() -> None:
    layer = ti.nn.TanhEquilibrium(3)
    with ti.monitor(layer) as log, torch.no_grad():
        layer(torch.ones(2, 3))
    assert log.solutions[0].adjoint == ti.AdjointReport()


class _Token:
    """Something that a weak reference can watch."""


class _Watched(torch.autograd.Function):
    """The identity, whose graph node holds a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: _Token) -> Tensor:
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def test_records_are_detached_and_keep_no_graph_alive() -> None:
    layer = ti.nn.FixedPoint(lambda z, x: {"a": 0.5 * z["a"] + x}, init=lambda x: {"a": torch.zeros_like(x)})
    x = torch.ones(2, 3, requires_grad=True)
    token = _Token()
    node = weakref.ref(token)
    with ti.monitor(layer) as log:
        out = layer(_Watched.apply(x, token))["a"]
    del token
    gc.collect()
    assert node() is not None  # the output holds its graph
    assert out.requires_grad
    assert not log.solutions[0].value["a"].requires_grad
    del out
    gc.collect()
    assert node() is None
    torch.testing.assert_close(log.solutions[0].value["a"], torch.full((2, 3), 2.0))


def test_monitoring_changes_no_output_and_no_gradient_and_leaves_nothing_on_the_modules() -> None:
    model, x = Two(), torch.randn(2, 3)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with ti.monitor(model):
        model(x).sum().backward()
    seen = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(seen) == 4
    for a, b in zip(plain, seen, strict=True):
        assert torch.equal(a, b)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_layer_registered_under_two_names_has_the_first() -> None:
    shared = ti.nn.TanhEquilibrium(3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with ti.monitor(model) as log:
        model(torch.ones(2, 3))
    assert [r.name for r in log.records] == ["0", "0"]


def test_implicit_layer_inside_the_cell_of_another_is_recorded_at_each_of_its_calls() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ti.nn.TanhEquilibrium(3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * self.inner(z) + x

    outer = ti.nn.FixedPoint(Cell())
    with ti.monitor(outer) as log:
        solution = outer.solve(torch.ones(2, 3))
    names = [r.name for r in log.records]
    assert names[-1] == ""
    # One call of the cell per evaluation, and one more that is recorded for the backward pass; where torch.compile is
    # at hand one to see that the cell is not compiled.
    assert names[:-1] == ["cell.inner"] * (solution.evaluations + 1 + ("torch._dynamo" in sys.modules))


def test_scalars_are_the_worst_residual_the_mean_steps_and_the_sums_over_all_calls_of_a_layer() -> None:
    model = Two()
    model.late.adjoint = ti.Implicit(rtol=1e-4)
    with ti.monitor(model) as log:
        model(torch.randn(2, 3)).sum().backward()
    first, *late = log.solutions
    scalars = log.scalars("x/")
    assert set(scalars) == {
        f"x/{name}/{kind}{quantity}"
        for name in ("body.inner.1", "late")
        for kind in ("", "adjoint_")
        for quantity in ("residual", "steps", "failures", "evaluations")
    }
    assert scalars["x/late/residual"] == max(float(s.residual.max()) for s in late) > 0
    assert scalars["x/late/steps"] == sum(float(s.steps.sum()) for s in late) / 4 > 0
    assert scalars["x/late/evaluations"] == sum(s.evaluations for s in late)
    assert scalars["x/body.inner.1/evaluations"] == first.evaluations
    residuals = [s.adjoint.residual for s in late]
    assert scalars["x/late/adjoint_residual"] == max(float(r.max()) for r in residuals if r is not None) > 0
    assert scalars["x/late/adjoint_evaluations"] == sum(s.adjoint.evaluations or 0 for s in late) > 0
    assert scalars["x/late/failures"] == scalars["x/late/adjoint_failures"] == 0.0


def test_scalars_count_failures_forward_and_backward() -> None:
    layer = ti.nn.FixedPoint(
        lambda z, x: 0.9 * z + x,
        solver=ti.Picard(),
        adjoint=ti.Implicit(linear_solver=ti.Neumann(max_steps=2)),
        max_steps=3,
        on_failure="ignore",
    )
    x = torch.ones(4, 3)
    x[0] = 0.0
    with ti.monitor(layer) as log:
        layer(x.requires_grad_()).sum().backward()
    scalars = log.scalars()
    assert scalars["implicit/failures"] == 3.0
    assert scalars["implicit/adjoint_failures"] == 4.0
    assert scalars["implicit/residual"] == pytest.approx(0.9**3)


def test_scalars_leave_out_what_there_is_not() -> None:
    layer = ti.nn.TanhEquilibrium(3, adjoint=ti.JacobianFree())
    with ti.monitor(layer) as log, torch.no_grad():
        layer(torch.ones(2, 3))
    assert set(log.scalars("")) == {"residual", "steps", "failures", "evaluations"}
    with ti.monitor(layer) as log:
        layer(torch.ones(2, 3)).sum().backward()
    assert set(log.scalars("")) >= {"adjoint_steps", "adjoint_failures"}
    assert "adjoint_residual" not in log.scalars("")
    assert ti.Monitor().scalars() == {}
