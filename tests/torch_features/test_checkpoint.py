"""Activation checkpoints, saved-tensor hooks, graphs kept or used twice, anomaly detection."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import torchimplicit as ti
from tests.torch_features.cells import (
    EVERY_LAYER,
    EXACT,
    TIGHT,
    Cell,
    agrees_with_unrolled,
    close,
    gradients,
    inputs,
    loss,
    unrolled,
)


@EVERY_LAYER
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_has_the_gradients_of_the_unrolled_iteration(make: Any, reentrant: bool) -> None:
    layer, x = make(), inputs().requires_grad_()
    wanted = [x, *layer.parameters()]
    loss(checkpoint(layer, x, use_reentrant=reentrant)).backward()
    close([t.grad for t in wanted], gradients(unrolled(layer, x), wanted))


def test_a_checkpointed_layer_is_the_same_at_its_first_use_and_later() -> None:
    """Once torch.compile is there, a function is looked at more closely at its first use: no checkpoint must see it."""
    import torch._dynamo

    for _ in range(2):
        layer, x = ti.nn.FixedPoint(Cell(), solver=TIGHT, adjoint=EXACT), inputs().requires_grad_()
        wanted = [x, *layer.parameters()]
        found = torch.autograd.grad(loss(checkpoint(layer, x, use_reentrant=False)), wanted)
        close(found, gradients(unrolled(layer, x), wanted))


@EVERY_LAYER
def test_a_checkpoint_keeps_the_input_alone(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        z = checkpoint(layer, x, use_reentrant=False)
    assert sum(kept) <= x.numel()
    assert z.requires_grad


def test_checkpointed_stages_with_layers_in_them() -> None:
    one, other = (ti.nn.FixedPoint(Cell(), solver=TIGHT, adjoint=EXACT) for _ in range(2))
    model, x = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), one, nn.Tanh(), other), inputs().requires_grad_()
    wanted = [x, *model.parameters()]
    expected = gradients(unrolled(other, torch.tanh(unrolled(one, model[0](x)))), wanted)
    close(gradients(checkpoint_sequential(model, 2, x, use_reentrant=False), wanted), expected)


class Checkpointed(Cell):
    """A cell that keeps its input alone."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return checkpoint(super().forward, z, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


def test_a_cell_with_a_checkpoint_in_it_has_the_gradients_of_the_unrolled_iteration() -> None:
    agrees_with_unrolled(ti.nn.FixedPoint(Checkpointed(), solver=TIGHT, adjoint=EXACT), inputs())


def test_a_cell_with_a_checkpoint_in_it_has_second_derivatives() -> None:
    cell = Checkpointed()
    layer, x = ti.nn.FixedPoint(cell, solver=TIGHT, adjoint=EXACT), inputs().requires_grad_()

    def second(z: Tensor) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(loss(z), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [x, *cell.parameters()])

    plain = Cell()
    plain.load_state_dict(cell.state_dict())
    (g,) = torch.autograd.grad(loss(unrolled(ti.nn.FixedPoint(plain), x, 80)), x, create_graph=True)
    expected = torch.autograd.grad(g.square().sum(), [x, *plain.parameters()])
    close(second(layer(x)), expected)


# --- Saved tensors


@EVERY_LAYER
@pytest.mark.parametrize("hooks", ["save_on_cpu", "numpy"])
def test_saved_tensors_may_be_kept_elsewhere(make: Any, hooks: str) -> None:
    layer, x = make(), inputs().requires_grad_()
    wanted = [x, *layer.parameters()]
    packed: list[int] = []

    def pack(t: Tensor) -> Any:
        packed.append(t.numel())
        return t.detach().numpy().copy()

    context = save_on_cpu() if hooks == "save_on_cpu" else saved_tensors_hooks(pack, torch.from_numpy)
    with context:
        z = layer(x)
    close(gradients(z, wanted), gradients(unrolled(layer, x), wanted))
    assert hooks == "save_on_cpu" or sum(packed) > 0


@EVERY_LAYER
def test_saved_tensors_may_be_kept_elsewhere_for_second_derivatives(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    wanted = [x, *layer.parameters()]

    def second(z: Tensor) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(loss(z), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), wanted)

    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        z = layer(x)
    close(second(z), second(unrolled(layer, x)))


# --- Graphs


@EVERY_LAYER
def test_a_graph_that_is_retained_gives_the_same_again_and_one_that_is_gone_is_an_error(make: Any) -> None:
    layer, x = make(), inputs().requires_grad_()
    wanted = [x, *layer.parameters()]
    z = layer(x)
    first = torch.autograd.grad(loss(z), wanted, retain_graph=True)
    close(torch.autograd.grad(loss(z), wanted), first, 0.0)
    close(first, gradients(unrolled(layer, x), wanted))
    if isinstance(layer, ti.nn.TanhEquilibrium):  # has no graph that could have been freed
        close(torch.autograd.grad(loss(z), wanted), first, 0.0)
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss(z), wanted)


@EVERY_LAYER
def test_gradients_of_two_halves_of_a_batch_add_up(make: Any) -> None:
    layer, x = make(), inputs(8)
    for half in x.chunk(2):
        layer(half).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    close(found, torch.autograd.grad(unrolled(layer, x).square().sum(), list(layer.parameters())))


# --- Anomaly detection


@EVERY_LAYER
@pytest.mark.parametrize("solver", [ti.Picard(rtol=1e-12), ti.Newton(rtol=1e-12)], ids=["picard", "newton"])
def test_anomaly_detection_finds_nothing_in_a_layer_that_is_well(make: Any, solver: Any) -> None:
    layer = make()
    layer.solver = solver if not isinstance(layer, ti.nn.Root) else ti.Newton(rtol=1e-12)
    x = inputs().requires_grad_()
    wanted = [x, *layer.parameters()]
    expected = gradients(unrolled(layer, x), wanted)
    with torch.autograd.set_detect_anomaly(True):
        close(gradients(layer(x), wanted), expected)
        assert torch.is_anomaly_enabled()


@EVERY_LAYER
def test_anomaly_detection_finds_nothing_where_a_failed_sample_has_no_gradient(make: Any) -> None:
    layer, x = make(), inputs()
    layer.on_failure = "ignore"
    x[1, 0] = torch.nan
    x.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        found = torch.autograd.grad(layer(x)[[0, 2, 3]].square().sum(), [x, *layer.parameters()])
    others = x.detach()[[0, 2, 3]].requires_grad_()
    expected = torch.autograd.grad(unrolled(layer, others).square().sum(), [others, *layer.parameters()])
    close([found[0][[0, 2, 3]], *found[1:]], expected)
    assert found[0][1].count_nonzero() == 0


def test_anomaly_detection_finds_a_nan_in_the_loss() -> None:
    layer, x = ti.nn.FixedPoint(Cell()), inputs().requires_grad_()
    with torch.autograd.set_detect_anomaly(True), pytest.raises(RuntimeError, match="returned nan values"):
        (layer(x) * 0).sqrt().sum().backward()
