"""The aids of training on layers: fixed depth, tolerance schedule, memory by sample, random starts."""

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti

N = 6


class Cell(nn.Module):
    def __init__(self, scale: float = 0.8) -> None:
        super().__init__()
        self.linear = nn.Linear(N, N, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(scale * torch.linalg.qr(self.linear.weight).Q)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def _x(batch: int = 4) -> Tensor:
    return 0.3 * torch.randn(batch, N, dtype=torch.float64)


# --- fixed depth ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ti.nn.FixedPoint, ti.nn.Root])
def test_fixed_depth_is_the_loop_written_by_hand(kind: Any) -> None:
    cell, x = Cell(), _x().requires_grad_()
    fn = cell if kind is ti.nn.FixedPoint else lambda z, x: z - cell(z, x)
    layer = kind(fn, depth=3)
    z = torch.zeros_like(x)
    for _ in range(3):
        z = cell(z, x)
    weights = torch.randn_like(z)
    leaves = [x, *cell.parameters()]
    expected = torch.autograd.grad((weights * z).sum(), leaves)
    solution = layer.solve(x)
    torch.testing.assert_close(solution.value, z, rtol=1e-14, atol=1e-14)
    for a, b in zip(torch.autograd.grad((weights * solution.value).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert solution.steps.tolist() == [3] * 4
    assert 4 <= solution.evaluations <= 7  # some to look at the residual
    residual = (cell(z, x) - z).square().mean(dim=1).sqrt()
    torch.testing.assert_close(solution.residual, residual.detach())
    assert solution.residual.min() > 1e-3
    assert not solution.converged.any()


def test_fixed_depth_says_converged_where_the_steps_suffice() -> None:
    layer, x = ti.nn.FixedPoint(Cell(0.5), solver=ti.Newton(rtol=1e-6), depth=60), _x()
    x[0] = torch.nan
    layer.on_failure = "ignore"
    solution = layer.solve(x)
    assert solution.converged.tolist() == [False, True, True, True]
    layer.depth = 5
    assert layer.solve(x).status.tolist() == [int(ti.Status.NONFINITE)] + [int(ti.Status.MAX_STEPS)] * 3


def test_switch_changes_from_a_network_to_its_equilibrium_and_back() -> None:
    layer, x = ti.nn.FixedPoint(Cell()), _x()
    equilibrium = layer(x)
    layer.depth = 2
    assert "depth=2" in repr(layer)
    shallow = layer(x)
    assert (shallow - equilibrium).abs().max() > 1e-2
    layer.depth = None
    assert torch.equal(layer(x), equilibrium)
    with torch.no_grad():
        layer.depth = 2
        torch.testing.assert_close(layer(x), shallow.detach())


def test_pre_training_and_equilibrium_train_the_same_weights() -> None:
    """One run through the switch: the loss falls in both phases, and what was learnt carries over."""
    torch.manual_seed(0)
    layer = ti.nn.TanhEquilibrium(N, dtype=torch.float64, depth=3)
    x, target = _x(20), 0.3 * torch.randn(20, N, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for step in range(40):
        layer.depth = 3 if step < 20 else None
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[19] < 0.9 * losses[0]
    assert losses[20] < losses[0] and losses[39] < losses[20]


def test_fixed_depth_keeps_failed_samples_out_of_the_gradients() -> None:
    cell = Cell()
    gradients = []
    for bad in (False, True):
        torch.manual_seed(3)
        layer, x = ti.nn.FixedPoint(cell, depth=3, on_failure="ignore"), _x()
        if bad:
            x = torch.cat([x, torch.full((1, N), torch.nan, dtype=torch.float64)])
        value = layer(x)
        assert value.isfinite().all()
        gradients.append(torch.autograd.grad(value[:4].sum(), list(cell.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    layer.on_failure = "raise"
    with pytest.raises(ti.ConvergenceError, match="1 of 1 samples did not converge: 1 NONFINITE"):
        layer(x)


def test_fixed_depth_is_quiet_about_samples_that_have_not_arrived() -> None:
    layer = ti.nn.FixedPoint(Cell(), depth=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(_x()).sum().backward()


def test_dropout_in_fixed_depth_draws_one_mask_and_batch_norm_counts_once() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(N, dtype=torch.float64)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * z + nn.functional.dropout(torch.ones_like(x), 0.5) + 0 * self.norm(x)

    cell = Noisy()
    z = ti.nn.FixedPoint(cell, depth=2)(_x(50))
    # With masks m, 0 or 2, of their own the two steps would give m₁/2 + m₂, and so 1 and 2 among the values.
    assert sorted({round(v, 6) for v in z.flatten().tolist()}) == [0.0, 3.0]
    assert cell.norm.num_batches_tracked is not None and cell.norm.num_batches_tracked.item() == 1


def test_init_of_a_fixed_depth_gets_a_zero_gradient() -> None:
    layer = ti.nn.FixedPoint(Cell(), init=nn.Linear(N, N, dtype=torch.float64), depth=2)
    layer(_x()).sum().backward()
    assert layer.init.weight.grad is not None and not layer.init.weight.grad.any()
    assert layer.cell.linear.weight.grad is not None and layer.cell.linear.weight.grad.any()


def test_depth_does_not_spoil_a_memory() -> None:
    layer, x = ti.nn.FixedPoint(Cell(), init=ti.nn.Previous()), _x()
    layer.solve(x)
    layer.depth = 2
    z = layer(x)
    torch.testing.assert_close(z, layer.cell(layer.cell(torch.zeros_like(x), x), x))
    layer.depth = None
    assert layer.solve(x).evaluations <= 2


def test_compiled_layer_takes_the_steps() -> None:
    layer, x = ti.nn.FixedPoint(Cell(), depth=2), _x()
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("depth", [0, -1, 2.0, True])
def test_depth_must_be_a_count(depth: Any) -> None:
    with pytest.raises(ValueError, match=f"depth={depth!r}"):
        ti.nn.TanhEquilibrium(3, depth=depth)
    layer = ti.nn.TanhEquilibrium(3)
    with pytest.raises(ValueError, match=f"depth={depth!r}"):
        layer.depth = depth


def test_depth_refuses_what_it_cannot_do() -> None:
    layer = ti.nn.FixedPoint(Cell(), depth=2)
    with pytest.raises(ValueError, match="trace=True"):
        layer.solve(_x(), trace=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: layer(x).sum())(_x())


# --- where a solve begins -------------------------------------------------------------------------------------------


def test_start_of_a_call_goes_before_init_and_memory() -> None:
    memory = ti.nn.Previous()
    layer, x = ti.nn.FixedPoint(Cell(), init=memory), _x()
    z = layer(x)
    kept = memory._value
    assert layer.solve(x, start=z.detach()).steps.tolist() == [0] * 4
    assert layer.solve(x, start=torch.zeros_like(x)).steps.min() > 2
    assert memory._value is kept


# --- the memory by sample -------------------------------------------------------------------------------------------


def test_each_sample_begins_at_its_own_last_solution_in_any_order() -> None:
    memory = ti.nn.BySample(30)
    layer = ti.nn.FixedPoint(Cell(), init=memory, solver=ti.Picard())
    data = _x(30)
    order = torch.randperm(30)
    for keys in order.split(10):
        with memory.of(keys):
            layer(data[keys])
    cold = layer.solve(data[:10])
    for keys in torch.randperm(30).split(10):
        with memory.of(keys):
            warm = layer.solve(data[keys])
        assert warm.evaluations == 1
        assert warm.steps.tolist() == [0] * 10
        torch.testing.assert_close(warm.value, layer(data[keys]), rtol=0, atol=1e-9)
    assert cold.evaluations > 20


def test_samples_not_seen_yet_and_failed_ones_begin_at_the_layers_own_start() -> None:
    memory = ti.nn.BySample(8)
    layer = ti.nn.FixedPoint(Cell(), init=memory, solver=ti.Picard(), on_failure="ignore")
    data = _x(8)
    broken = data.clone()
    broken[1] = torch.nan
    with memory.of(torch.tensor([0, 1, 2])):
        layer(broken[:3])
    with memory.of(torch.tensor([2, 5, 1, 0])):
        found = layer.solve(data[[2, 5, 1, 0]])
    assert (found.steps == 0).tolist() == [True, False, False, True]
    assert found.converged.all()
    layer.max_steps = 2
    with memory.of(torch.tensor([6, 0])):
        layer(data[[6, 0]])
        start, _ = memory.begin(torch.full((2, N), 7.0, dtype=torch.float64), None)
    assert start[0].tolist() == [7.0] * N  # it had run out of steps
    assert (start[1] - found.value[3]).abs().max() < 1e-9


def test_calls_outside_the_block_neither_use_nor_change_it() -> None:
    memory = ti.nn.BySample(4)
    layer, data = ti.nn.FixedPoint(Cell(), init=memory, solver=ti.Picard()), _x()
    with memory.of(torch.arange(4)):
        layer(data)
    before = memory._store
    assert layer.solve(data).evaluations > 20
    layer(_x(7))
    assert memory._store is before
    memory.clear()
    with memory.of(torch.arange(4)):
        assert layer.solve(data).evaluations > 20


def test_memory_by_sample_changes_no_gradient() -> None:
    memory = ti.nn.BySample(4)
    exact: dict[str, Any] = {"solver": ti.Newton(rtol=1e-13), "adjoint": ti.Implicit(rtol=1e-13)}
    cell, x = Cell(), _x()
    warm, cold = ti.nn.FixedPoint(cell, init=memory, **exact), ti.nn.FixedPoint(cell, **exact)
    with memory.of(torch.arange(4)):
        warm(x * 1.1)
        a = torch.autograd.grad(warm(x).square().sum(), list(cell.parameters()))
    b = torch.autograd.grad(cold(x).square().sum(), list(cell.parameters()))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_structured_states_of_another_shape_or_dtype_begin_anew() -> None:
    memory = ti.nn.BySample(3)
    layer = ti.nn.FixedPoint(lambda z, x: {"a": 0.5 * z["a"] + x}, init=memory, solver=ti.Picard())
    with pytest.raises(TypeError), memory.of(torch.arange(3)):
        layer(torch.ones(3, 2))  # the start is a tensor, the cell's value is not
    tensors = ti.nn.FixedPoint(lambda z, x: 0.5 * z + x, init=memory, solver=ti.Picard())
    with memory.of(torch.arange(3)):
        tensors(torch.ones(3, 2))
        assert tensors.solve(torch.ones(3, 2)).evaluations == 1
        assert tensors.solve(torch.ones(3, 4)).evaluations > 10
        assert tensors.solve(torch.ones(3, 4).double()).evaluations > 10


def test_memory_by_sample_is_copied_and_pickled_and_no_part_of_the_state() -> None:
    memory = ti.nn.BySample(4)
    layer, x = ti.nn.TanhEquilibrium(N, init=memory, dtype=torch.float64), _x()
    with memory.of(torch.arange(4)):
        layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with twin.init.of(torch.arange(4)):
            assert twin.solve(x).evaluations == 1
    assert list(layer.state_dict()) == ["cell.linear.weight"]
    assert repr(memory) == "BySample(4)"


def test_what_is_remembered_in_inference_mode_serves_training() -> None:
    memory = ti.nn.BySample(4)
    layer, x = ti.nn.TanhEquilibrium(N, init=memory, dtype=torch.float64), _x()
    with memory.of(torch.arange(4)):
        with torch.inference_mode():
            layer(x)
        solution = layer.solve(x)
    solution.value.sum().backward()
    assert solution.evaluations == 1
    assert layer.linear.weight.grad is not None and layer.linear.weight.grad.any()


@pytest.mark.parametrize(
    "keys, error, message",
    [
        (torch.tensor([0, 4]), ValueError, "from 0 to 4, but there are 4 samples"),
        (torch.tensor([-1, 2]), ValueError, "from -1 to 2"),
        (torch.zeros(2), TypeError, "is torch.float32"),
        (torch.ones(2, dtype=torch.bool), TypeError, "is torch.bool"),
        ([0, 1], TypeError, "is list"),
        (torch.zeros(1, 2, dtype=torch.long), ValueError, "(1, 2)"),
    ],
)
def test_keys_are_validated(keys: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught, ti.nn.BySample(4).of(keys):
        pass
    assert message in str(caught.value)


def test_keys_must_be_as_many_as_samples() -> None:
    memory = ti.nn.BySample(4)
    layer = ti.nn.TanhEquilibrium(3, init=memory)
    with memory.of(torch.arange(3)), pytest.raises(ValueError, match="3 keys for a state"):
        layer(torch.ones(4, 3))


@pytest.mark.parametrize("samples", [0, 1.5, True])
def test_number_of_samples_must_be_a_count(samples: Any) -> None:
    with pytest.raises(ValueError, match="samples"):
        ti.nn.BySample(samples)


# --- the tolerance schedule -----------------------------------------------------------------------------------------


def test_schedule_loosens_every_layer_and_gives_back_the_solver_it_came_with() -> None:
    own = ti.Picard(rtol=1e-7)
    model = nn.Sequential(ti.nn.FixedPoint(Cell(), solver=own), ti.nn.FixedPoint(Cell()))
    x = _x()
    schedule = ti.nn.ToleranceSchedule(model, start=1e-1, end=1e-5, steps=4)
    counts, tolerances = [], []
    for _ in range(5):
        tolerances.append(schedule.rtol)
        with ti.monitor(model) as log:
            model(x)
        counts.append([s.evaluations for s in log.solutions])
        for layer, s in zip(model, log.solutions, strict=True):
            limit = (schedule.rtol or 1e-7) * (s.value.square().mean(dim=1).sqrt() + 1e-6)
            assert layer is not model[0] or bool((s.residual <= 1.01 * limit).all())
        schedule.step()
    assert [t and round(t, 9) for t in tolerances] == [1e-1, 1e-2, 1e-3, 1e-4, None]
    for earlier, later in itertools.pairwise(counts):
        assert earlier[0] < later[0]
    assert model[0].solver is own
    assert model[1].solver is None


def test_schedule_never_tightens_a_layer_and_keeps_its_other_options() -> None:
    layer = ti.nn.TanhEquilibrium(3, solver=ti.Anderson(rtol=1e-2, atol=1e-3, history=7))
    schedule = ti.nn.ToleranceSchedule(layer, start=1e-1, end=1e-6, steps=2)
    assert layer.solver == ti.Anderson(rtol=1e-1, atol=1e-3, history=7)
    schedule.step()
    assert layer.solver == ti.Anderson(rtol=1e-2, atol=1e-3, history=7)


def test_final_is_the_layers_own_tolerance_for_a_while() -> None:
    layer = ti.nn.TanhEquilibrium(3, solver=ti.Picard(rtol=1e-6))
    schedule = ti.nn.ToleranceSchedule(layer, steps=10)
    with schedule.final():
        assert layer.solver == ti.Picard(rtol=1e-6)
    assert layer.solver == ti.Picard(rtol=1e-2)


def test_schedule_goes_on_where_another_was() -> None:
    layers = [ti.nn.TanhEquilibrium(3) for _ in range(2)]
    one, other = (ti.nn.ToleranceSchedule(layer, steps=10) for layer in layers)
    for _ in range(3):
        one.step()
    other.load_state_dict(one.state_dict())
    assert other.rtol == one.rtol and one.rtol == pytest.approx(1e-2 * 1e-3**0.3)
    assert layers[0].solver == layers[1].solver == ti.Auto(rtol=one.rtol)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 0.0, "steps": 1}, "start=0.0"),
        ({"start": 1e-3, "end": 1e-2, "steps": 1}, "looser than start"),
        ({"end": 1.0, "steps": 1}, "end=1.0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
    ],
)
def test_options_of_the_schedule_are_validated(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ti.nn.ToleranceSchedule(ti.nn.TanhEquilibrium(3), **options)


def test_schedule_of_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no implicit layer"):
        ti.nn.ToleranceSchedule(nn.Linear(2, 2), steps=1)


# --- random starts --------------------------------------------------------------------------------------------------


def test_random_starts_are_drawn_in_training_only_and_as_asked_for() -> None:
    init = ti.nn.RandomStart(std=2.0, plain=0.25)
    layer = ti.nn.TanhEquilibrium(50, init=init)
    x = torch.zeros(4000, 50)
    start = init(x)
    plain = (start == 0).all(dim=1)
    assert abs(plain.float().mean().item() - 0.25) < 0.03
    noise = start[~plain]
    assert abs(noise.std().item() - 2.0) < 0.02 and abs(noise.mean().item()) < 0.02
    assert not torch.equal(init(x), start)
    layer.eval()
    assert not init(x).any()
    layer.train()
    assert init(x).any()
    assert list(layer.state_dict()) == ["cell.linear.weight"]


def test_random_start_of_a_contraction_changes_neither_solution_nor_gradient() -> None:
    exact: dict[str, Any] = {"solver": ti.Newton(rtol=1e-13), "adjoint": ti.Implicit(rtol=1e-13)}
    cell, x = Cell(), _x()
    results = []
    for init in (None, ti.nn.RandomStart(plain=0.0)):
        solution = ti.nn.FixedPoint(cell, init=init, **exact).solve(x)
        assert solution.converged.all()
        results.append([solution.value, *torch.autograd.grad(solution.value.square().sum(), list(cell.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_random_start_around_another_of_any_structure() -> None:
    init = ti.nn.RandomStart(std=1.0, plain=0.0, start=lambda x: {"a": x + 10, "b": torch.zeros(2, 3, 4)}, batch_dims=2)
    start = init(torch.zeros(2, 3))
    assert start["a"].shape == (2, 3) and (start["a"] - 10).abs().max() < 6
    assert start["b"].std() > 0.5
    half = ti.nn.RandomStart(plain=0.5, batch_dims=2)(torch.zeros(40, 50, 3))
    still = (half == 0).all(dim=2)
    assert 0.4 < still.float().mean() < 0.6
    assert 0 < still.float().mean(dim=1).min() < still.float().mean(dim=1).max() < 1  # a coin for each of 40 × 50


@pytest.mark.parametrize(
    "options, error",
    [
        ({"std": -1.0}, ValueError),
        ({"plain": 1.5}, ValueError),
        ({"plain": True}, ValueError),
        ({"batch_dims": -1}, ValueError),
        ({"start": 3}, TypeError),
    ],
)
def test_options_of_random_starts_are_validated(options: dict[str, Any], error: type[Exception]) -> None:
    (name,) = options
    with pytest.raises(error, match=name):
        ti.nn.RandomStart(**options)


def test_random_start_without_a_tensor_to_be_like_is_an_error() -> None:
    with pytest.raises(TypeError, match="give start="):
        ti.nn.RandomStart()({"x": torch.ones(2)})
