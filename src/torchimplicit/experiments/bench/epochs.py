"""The epochs that contenders are timed in: which batches, which learning rate, which weights to start from."""

from collections.abc import Sequence

import torch
from torch import nn

from torchimplicit.experiments.bench.timing import Batch, Trainee, Weights
from torchimplicit.experiments.data import Digits
from torchimplicit.experiments.recipe import make_model

FEATURES = 100
BATCH = 100


def make_batches(digits: Digits, seed: int, *, batches: int | None = None, batch_size: int = BATCH) -> list[Batch]:
    """Cut one shuffled epoch, or its first `batches` batches."""
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))
    return [digits.train.batch(index) for index in order.split(batch_size)[:batches]]


def learning_rate(epoch: int) -> float:
    """Follow the recipe: 0.1, and 0.01 from epoch 5 on (counted from zero)."""
    return 0.1 if epoch < 5 else 0.01


def trained(
    model: nn.Module, epochs: Sequence[Sequence[Batch]], weights: Weights | None = None, *, first: int = 0
) -> Weights:
    """Train `model` by the recipe for the epochs given (perhaps none), and return its weights.

    Args:
        model: the recipe's, or one like it.
        epochs: batches of each.
        weights: to start from; None are the model's own.
        first: number of the first epoch, which decides the learning rate.
    """
    start: Weights = [*model.parameters()] if weights is None else weights
    for epoch, batches in enumerate(epochs, first):
        Trainee(model, start, learning_rate(epoch)).train(batches)
        start = [*model.parameters()]
    return [parameter.detach().clone() for parameter in start]


def initial_model(seed: int, *, tolerance: float = 1e-4, batch_size: int = BATCH) -> nn.Sequential:
    """The recipe's `picard` with the initial weights that belong to `seed`."""
    torch.manual_seed(seed)
    return make_model("picard", tolerance=tolerance, batch_size=batch_size, features=FEATURES)
