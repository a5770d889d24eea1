"""`nn.Previous` saves evaluations where inputs vary slowly, and changes nothing else: not the solution, no gradient."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti

N, BATCH = 20, 10


def _layer(init: ti.nn.Previous | None = None, **options) -> ti.nn.TanhEquilibrium:
    torch.manual_seed(0)
    options = {"solver": ti.Picard()} | options
    layer = ti.nn.TanhEquilibrium(N, init=init, **options)
    with torch.no_grad():
        layer.linear.weight.copy_(0.9 * torch.linalg.qr(layer.linear.weight).Q)
    return layer


def _frames(count: int, noise: float = 0.01) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    base = 0.3 * torch.randn(BATCH, N, generator=generator)
    return [base * (1 + noise * torch.randn(BATCH, N, generator=generator)) for _ in range(count)]


@pytest.mark.parametrize("solver", [ti.Picard(), ti.Anderson(), ti.Newton(), ti.Auto(), None])
def test_corrections_save_nearly_all_evaluations(solver: ti.Picard | None) -> None:
    warm, cold = _layer(ti.nn.Previous(), solver=solver), _layer(solver=solver)
    spent = {"warm": 0, "cold": 0}
    for i, x in enumerate(_frames(6)):
        found, reference = warm.solve(x), cold.solve(x)
        assert bool(found.converged.all())
        torch.testing.assert_close(found.value, reference.value, rtol=0, atol=2e-4)
        assert bool((found.residual <= 2e-5 * found.value.detach().square().mean(dim=1).sqrt() * 1.5).all())
        if i:
            spent["warm"] += found.evaluations
            spent["cold"] += reference.evaluations
    assert spent["warm"] < (0.2 if isinstance(solver, ti.Picard) else 0.6) * spent["cold"]


def test_the_solution_alone_saves_some() -> None:
    layer = _layer(ti.nn.Previous(corrections=0))
    first, second = (layer.solve(x) for x in _frames(2))
    assert 0 < second.evaluations < 0.8 * first.evaluations


def test_the_same_input_takes_one_evaluation() -> None:
    layer, (x,) = _layer(ti.nn.Previous()), _frames(1)
    layer.solve(x)
    layer.solve(x)  # rounding may have left a sample at the edge of the tolerance
    again = layer.solve(x)
    assert again.evaluations == 1
    assert not again.steps.any()


def test_the_gradient_is_that_of_a_cold_solve() -> None:
    frames = [x.double() for x in _frames(2)]
    gradients = []
    for init in (ti.nn.Previous(), None):
        layer = _layer(init).double()
        layer.solve(frames[0])
        x = frames[1].clone().requires_grad_()
        layer(x).square().sum().backward()
        gradients.append((x.grad, layer.linear.weight.grad))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_a_root_is_corrected_too() -> None:
    class Cubic(nn.Module):
        def forward(self, z: Tensor, a: Tensor) -> Tensor:
            return z**3 + z - a

    layer = ti.nn.Root(Cubic(), solver=ti.Newton(), init=ti.nn.Previous())
    a = torch.linspace(1, 10, 5, dtype=torch.float64)[:, None]
    layer.solve(a)
    found = layer.solve(1.01 * a)
    torch.testing.assert_close(found.value**3 + found.value, 1.01 * a, rtol=1e-9, atol=0)


@pytest.mark.parametrize("other", [torch.zeros(BATCH + 1, N), torch.zeros(BATCH, N, dtype=torch.float64)])
def test_another_shape_or_dtype_starts_anew(other: Tensor) -> None:
    memory = ti.nn.Previous()
    layer = _layer(memory)
    layer.solve(_frames(1)[0])
    start, solver = memory.begin(other, None)
    assert start is other
    assert solver is None


def test_clear_forgets() -> None:
    memory = ti.nn.Previous()
    layer, (x,) = _layer(memory), _frames(1)
    first = layer.solve(x)
    memory.clear()
    assert layer.solve(x).evaluations == first.evaluations


def test_a_failed_sample_begins_anew_and_the_others_do_not() -> None:
    memory = ti.nn.Previous()
    layer, (x,) = _layer(memory, max_steps=300, on_failure="ignore"), _frames(1)
    bad = x.clone()
    bad[3] = torch.nan
    found = layer.solve(bad)
    assert found.converged.sum() == BATCH - 1
    start, _ = memory.begin(torch.zeros_like(x), None)
    assert not start[3].any()
    healthy = torch.arange(BATCH) != 3
    assert torch.equal(start[healthy], found.value[healthy])
    assert bool(layer.solve(x).converged.all())


def test_an_inverse_that_no_longer_serves_is_made_anew() -> None:
    memory = ti.nn.Previous(corrections=2)
    layer = _layer(memory)
    near, far = _frames(2), [x + 2.0 for x in _frames(2)]
    for x in near:
        layer.solve(x)
    before = memory._inverse
    layer.solve(far[0])  # the corrections miss
    layer.solve(far[1])
    assert before is not None and memory._inverse is not None
    assert not torch.allclose(before, memory._inverse, atol=0.1)
    x = far[1] + 0.001
    assert int(layer.solve(x).steps.max()) <= 2


def test_a_wide_state_keeps_the_solution_alone() -> None:
    memory = ti.nn.Previous()
    layer = ti.nn.FixedPoint(lambda z, x: 0.5 * torch.tanh(z) + x, solver=ti.Picard(), init=memory)
    x = torch.randn(2, 300)
    first = layer.solve(x)
    second = layer.solve(1.001 * x)
    assert memory._inverse is None
    assert second.evaluations < first.evaluations


def test_a_step_of_training_changes_the_cell_and_the_next_solve_notices() -> None:
    layer, (x,) = _layer(ti.nn.Previous()), _frames(1)
    layer.solve(x)
    with torch.no_grad():
        layer.linear.weight.mul_(0.9)
    found = layer.solve(x)
    residual = torch.tanh(layer.linear(found.value) + x) - found.value
    assert float(residual.detach().abs().max()) < 1e-4
    assert bool((found.steps > 0).all())


def test_transforms_neither_use_nor_change_the_memory() -> None:
    memory = ti.nn.Previous()
    layer, (x,) = _layer(memory), _frames(1)
    layer.solve(x)
    kept = memory._value
    gradient = torch.func.grad(lambda x: layer(x).sum())(2 * x)
    assert memory._value is kept
    other = (2 * x).requires_grad_()
    layer(other).sum().backward()
    torch.testing.assert_close(gradient, other.grad, rtol=1e-3, atol=1e-4)


def test_what_is_learnt_in_inference_mode_serves_training() -> None:
    layer, (x, y) = _layer(ti.nn.Previous()), _frames(2)
    with torch.inference_mode():
        layer(x)
        layer(y)
    layer(y + 0.5).sum().backward()
    assert layer.linear.weight.grad is not None


def test_a_compiled_model_remembers_as_an_eager_one_does() -> None:
    evaluations = []
    for compiled in (False, True):
        layer = _layer(ti.nn.Previous())
        call = torch.compile(layer, backend="eager") if compiled else layer
        with ti.monitor(layer) as log, torch.no_grad():
            for x in _frames(4):
                call(x)
        evaluations.append([record.solution.evaluations for record in log.records])
    assert evaluations[0] == evaluations[1]
    assert evaluations[0][-1] < 0.2 * evaluations[0][0]


def test_a_layer_with_a_memory_is_copied_and_pickled() -> None:
    layer, (x,) = _layer(ti.nn.Previous()), _frames(1)
    layer.solve(x)
    layer.solve(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.solve(x).evaluations == 1


@pytest.mark.parametrize("corrections", [-1, 1.5, True])
def test_corrections_must_be_a_count(corrections: int) -> None:
    with pytest.raises(ValueError, match="corrections"):
        ti.nn.Previous(corrections)
