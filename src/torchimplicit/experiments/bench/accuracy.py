"""Ten epochs of the recipe with one layer: the test error after each, and the weights that each epoch starts from."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.experiments.bench.epochs import FEATURES, learning_rate, make_batches
from torchimplicit.experiments.bench.timing import Batch, Weights
from torchimplicit.experiments.data import Digits, Split
from torchimplicit.experiments.recipe import make_model

STEPS = 12
"""Of Picard's iteration in the fast layer, looked at once, when they are done."""
TERMS = 5
"""Products in the fast layer's backward pass."""
LOOSE = 1.0
"""The fast layer's tolerance, in the recipe's units (the notebook's is 1e-4): what 12 steps nearly always reach."""


def make_fast_model() -> nn.Sequential:
    """The recipe's network with a layer solved and differentiated only as well as training needs it.

    12 steps of Picard's iteration in the place of some 70, and a Neumann series of 5 products for the gradient in the
    place of some 60. A sample that misses the loose tolerance takes 12 steps more.
    """
    model = make_model("picard", features=FEATURES)
    exact = model[2]
    assert isinstance(exact, ti.nn.TanhEquilibrium)
    exact.solver = ti.Picard(atol=LOOSE / 10, rtol=0.0, norm="two", check_every=STEPS)
    exact.adjoint = ti.NeumannSeries(TERMS)
    return model


def make_exact_model() -> nn.Sequential:
    """The recipe's `picard`: the notebook's tolerance, exact gradients."""
    return make_model("picard", features=FEATURES)


@dataclass(frozen=True)
class Training:
    """What came of one training.

    Attributes:
        errors: test error after each epoch, percent.
        starts: the weights at the start of each epoch.
        seconds: of all epochs' training steps, not paired with anything.
    """

    errors: list[float]
    starts: list[Weights]
    seconds: float


def train(
    builds: Sequence[Callable[[], nn.Sequential]], digits: Digits, seed: int, batches: int | None = None
) -> Training:
    """Train by the recipe, one epoch for each of `builds`: which model does it, with the weights of the one before.

    Args:
        builds: makes the model of each epoch; all have the same parameters.
        digits: trained and tested on.
        seed: of the initial weights and of the order of images.
        batches: of each epoch; None is all.
    """
    torch.manual_seed(seed)
    model = builds[0]()
    errors, starts, seconds = [], [], 0.0
    for epoch, build in enumerate(builds):
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        model = give(build(), weights)
        epoch_batches = make_batches(digits, seed * 1_000_003 + epoch, batches=batches)
        seconds += train_segment(model, epoch_batches, learning_rate(epoch))
        starts.append(weights)
        errors.append(test_error(model, digits.test))
    return Training(errors, starts, seconds)


def train_segment(model: nn.Module, batches: Sequence[Batch], rate: float) -> float:
    """Take one step of gradient descent per batch, with nothing else done; the seconds it took."""
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    began = time.perf_counter()
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return time.perf_counter() - began


@torch.no_grad()
def give(model: nn.Sequential, weights: Weights) -> nn.Sequential:
    """Put weights into a model."""
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.copy_(weight)
    return model


@torch.no_grad()
def test_error(model: nn.Module, split: Split) -> float:
    """In percent."""
    wrong = 0
    for start in range(0, len(split), 1000):
        images, labels = split.batch(slice(start, start + 1000))
        wrong += int((model(images).argmax(dim=1) != labels).sum())
    return 100 * wrong / len(split)
