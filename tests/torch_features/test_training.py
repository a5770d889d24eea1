"""What a training loop does around a layer: optimisers, clipping, averaging, and data from other processes."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset

import torchimplicit as ti
from tests.torch_features.cells import EVERY_LAYER, FEATURES, close, inputs, loss, unrolled


class Exact(nn.Module):
    """The layer's twin: the same cell, unrolled."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return unrolled(self.layer, x, 80)


def twins(make: Any) -> tuple[Any, Exact]:
    layer = make()
    return layer, Exact(copy.deepcopy(layer))


@EVERY_LAYER
def test_clipped_gradients_are_those_of_the_unrolled_twin(make: Any) -> None:
    layer, twin = twins(make)
    x, norms = inputs(), []
    for model in (layer, twin):
        loss(model(x)).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    torch.testing.assert_close(norms[0], norms[1], atol=1e-9, rtol=0)
    assert norms[0] > 0.2
    close([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()])
    total = torch.stack([p.grad.square().sum() for p in layer.parameters()]).sum().sqrt()
    torch.testing.assert_close(total, torch.tensor(0.1, dtype=torch.float64), atol=1e-6, rtol=0)


@EVERY_LAYER
def test_lbfgs_takes_the_steps_of_the_unrolled_twin(make: Any) -> None:
    layer, twin = twins(make)
    x = inputs(16)
    target = unrolled(make(), x).detach()
    losses = []
    for model in (layer, twin):
        optimiser = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")

        def closure(model: Any = model, optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            error = (model(x) - target).square().mean()
            error.backward()
            return error

        first = closure().item()
        optimiser.step(closure)
        losses.append(closure().item())
        assert losses[-1] < first - 1e-3
    assert abs(losses[0] - losses[1]) < 1e-6
    close(layer.parameters(), twin.parameters(), 1e-5)


@EVERY_LAYER
def test_averaged_models_are_layers_with_the_average_of_the_parameters(make: Any) -> None:
    layer, x = make(), inputs()
    ema = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    start = [p.detach().clone() for p in layer.parameters()]
    ema.update_parameters(layer)  # the first one copies
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    loss(layer(x)).backward()
    optimiser.step()
    ema.update_parameters(layer)
    expected = [0.75 * s + 0.25 * p for s, p in zip(start, layer.parameters(), strict=True)]
    close(ema.module.parameters(), expected, 1e-14)
    torch.testing.assert_close(ema(x), unrolled(ema.module, x), atol=1e-10, rtol=0)
    assert (ema(x) - layer(x)).abs().max() > 1e-4


def test_batch_norm_statistics_of_an_averaged_model_are_renewed() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(FEATURES, dtype=torch.float64)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.2 * z + self.norm(x))

    averaged = AveragedModel(ti.nn.FixedPoint(Normed(), batch_dims=0))
    data = [5 + inputs(8) for _ in range(3)]
    update_bn(data, averaged)
    torch.testing.assert_close(
        averaged.module.cell.norm.running_mean, torch.stack([x.mean(0) for x in data]).mean(0), atol=1e-12, rtol=0
    )
    assert averaged.module.cell.norm.num_batches_tracked == 3


@EVERY_LAYER
def test_gradients_accumulate_into_one_step(make: Any) -> None:
    layer, twin = twins(make)
    x = inputs(8)
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    for part in x.chunk(4):
        (layer(part).square().sum() / 8).backward()
    optimiser.step()
    whole = torch.optim.SGD(twin.parameters(), 0.1)
    (twin(x).square().sum() / 8).backward()
    whole.step()
    close(layer.parameters(), twin.parameters())


class Solved(Dataset[tuple[Tensor, Tensor]]):
    """Inputs, and what a layer makes of them in the process that reads them, gradient included."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.x = inputs(6)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i : i + 1].requires_grad_()
        (g,) = torch.autograd.grad(self.layer(x).square().sum(), x)
        return x.detach()[0], g[0]


def _work_in_forks(make: Any) -> None:
    data = Solved(make())
    data[0]  # the parent has used autograd before it forks
    loader = DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context="fork")
    found = list(loader)
    assert len(found) == 2
    x = data.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(unrolled(data.layer, x).square().sum(), x)
    close([torch.cat([g for _, g in found])], [expected])
    assert torch.equal(torch.cat([x for x, _ in found]), data.x)


@EVERY_LAYER
def test_layers_solve_and_differentiate_in_forked_workers(make: Any) -> None:
    """In a process of its own: autograd cannot fork once a backward pass on another device has begun its threads."""
    process = torch.multiprocessing.get_context("spawn").Process(target=_work_in_forks, args=(make,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


@EVERY_LAYER
def test_a_training_loop_with_loader_clipping_and_averaging_follows_the_unrolled_twin(make: Any) -> None:
    layer, twin = twins(make)
    x = inputs(24)
    data = torch.utils.data.TensorDataset(x, 0.2 * x.flip(1))
    ends = []
    start = [p.detach().clone() for p in layer.parameters()]
    for model in (layer, twin):
        loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
        average = AveragedModel(model)
        optimiser = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5)
        for _ in range(2):
            for inputs_, target in loader:
                optimiser.zero_grad()
                (model(inputs_) - target).square().mean().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimiser.step()
                average.update_parameters(model)
        ends.append([p.detach() for p in average.parameters()])
    close(ends[0], ends[1], 1e-6)
    assert max((e - s).abs().max() for e, s in zip(ends[0], start, strict=True)) > 0.01
