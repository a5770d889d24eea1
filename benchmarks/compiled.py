"""The MNIST model under `torch.compile`: a training step and an inference beside the eager ones, on one thread.

A training step is the forward pass, the loss, the backward pass and the optimiser's step. Both sides take each step
from the same weights (those of the eager side, copied outside the clock), on the same batch, in turns that alternate.
The explicit twin of the model, which has no equation to solve, shows what `torch.compile` itself costs at this size.

Compiled end to end, a step is one graph: loss, gradient and update in one function, with
`torch._dynamo.config.trace_autograd_ops`, and the solve as an operator in it. This is compared with the eager step,
whose update is the work of torch's optimiser, and with the same function uncompiled. "Lean" is without the compiler's
checks of sizes and of the attributes of modules. The bar: the median of the lean steps' ratios to eager is at most 1.

The model is an `nn.Sequential`. Where a break falls into one, torch compiles nothing of it (its containers are on a
list of what is skipped), and what is measured is the cost of trying. "picard in a module" is the same network as a
module of its own, where what lies before and after the layer is compiled.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.record import RESULTS, circumstances, data_used, write
from torchimplicit.experiments.data import Split, load_digits
from torchimplicit.experiments.recipe import make_model

BOUND = 1.0
BATCH = 100
LEAN: Any = {"size_asserts": False, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
RATE = 0.1
END_TO_END = "picard, one graph, lean"
LAYERS = ("picard", "anderson", "newton", "explicit")
MODULE = "picard in a module"
TRACED = ("picard", "anderson", "explicit")
"""Layers whose inference is one graph; the recipe's Newton solves its linear systems by GMRES, which is not traced."""


class Module(nn.Module):
    """The layers of a sequence, called one by one from a `forward` that torch compiles."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.flatten, self.first, self.layer, self.last = layers

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 28, 28)` to logits."""
        return self.last(self.layer(self.first(self.flatten(images))))


def make(layer: str) -> nn.Module:
    """The MNIST model with this layer, or the one in a module."""
    return Module(make_model("picard")) if layer == MODULE else make_model(layer)


def train_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One step of plain gradient descent by torch's own optimiser, made anew: it holds no state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer.zero_grad(set_to_none=True)
    cross_entropy(model(images), labels).backward()
    optimizer.step()


def pairs(first: Callable[[], Any], second: Callable[[], Any], prepare: Callable[[], Any], count: int) -> list[Any]:
    """Seconds of both, `count` times, each pair in the other order than the one before."""
    found = []
    for i in range(count):
        prepare()
        seconds = [0.0, 0.0]
        for which in ((0, 1), (1, 0))[i % 2]:
            began = time.perf_counter()
            (first, second)[which]()
            seconds[which] = time.perf_counter() - began
        found.append(seconds)
    return found


def summary(seconds: list[Any]) -> dict[str, float]:
    """Medians of both sides, and of the ratios with their quartiles."""
    ratios = [compiled / eager for eager, compiled in seconds]
    low, _, high = quantiles(ratios, n=4)
    return {
        "eager_ms": 1e3 * median(eager for eager, _ in seconds),
        "compiled_ms": 1e3 * median(compiled for _, compiled in seconds),
        "ratio": median(ratios),
        "low": low,
        "high": high,
    }


def measure_training(layer: str, data: Split, before: int, count: int) -> dict[str, float]:
    """Training steps `before` to `before + count` of one layer, on both sides."""
    torch.manual_seed(0)
    eager, other = make(layer), make(layer)
    torch._dynamo.reset()
    other.compile()  # in place: a call costs less than that of what torch.compile(other) returns
    epochs = 1 + (before + count) * BATCH // len(data)
    batch = iter([part for _ in range(epochs) for part in torch.randperm(len(data)).split(BATCH)])
    current: list[Tensor] = []

    def prepare() -> None:
        current[:] = data.batch(next(batch))
        other.load_state_dict(eager.state_dict())

    sides = (lambda: train_step(eager, *current)), (lambda: train_step(other, *current))
    pairs(*sides, prepare, before)
    return summary(pairs(*sides, prepare, count))


def whole_step(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of plain gradient descent as one function, update included: to be compiled, or not."""
    parameters = list(model.parameters())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, gradients, strict=True):
                p.sub_(gradient, alpha=RATE)
        return loss.detach()

    return step


def measure_whole(layer: str, data: Split, before: int, count: int) -> dict[str, dict[str, float]]:
    """Training steps as one graph, and as one graph without checks, beside two eager ones: four in turns."""
    torch.manual_seed(0)
    models = [make(layer) for _ in range(4)]
    optimizer = torch.optim.SGD(models[0].parameters(), lr=RATE)
    torch._dynamo.reset()

    def eager(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(models[0](images), labels).backward()
        optimizer.step()

    steps = [whole_step(model) for model in models]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        sides: list[Callable[[Tensor, Tensor], Any]] = [
            eager,
            steps[1],
            torch.compile(steps[2], fullgraph=True),
            torch.compile(steps[3], fullgraph=True, options=LEAN),
        ]
        order = torch.randperm(len(data)).split(BATCH)
        found = []
        for i in range(before + count):
            batch = data.batch(order[i % len(order)])
            state = models[0].state_dict()
            for model in models[1:]:
                model.load_state_dict(state)
            seconds = [0.0] * 4
            for k in range(4):
                which = (k + i) % 4
                began = time.perf_counter()
                sides[which](*batch)
                seconds[which] = time.perf_counter() - began
            found.append(seconds)
    found = found[before:]
    return {
        "one graph": summary([(s[0], s[2]) for s in found]),
        "one graph, lean": summary([(s[0], s[3]) for s in found]),
        "one graph beside the same function": summary([(s[1], s[2]) for s in found]),
        "one graph, lean, beside the same function": summary([(s[1], s[3]) for s in found]),
    }


def measure_inference(layer: str, data: Split, before: int, count: int) -> dict[str, float]:
    """Inference after `before` training steps, as one graph; with the breaks that torch finds."""
    torch.manual_seed(0)
    model = make_model(layer)
    order = torch.randperm(len(data))
    for i in range(before):
        train_step(model, *data.batch(order[i * BATCH % len(data) :][:BATCH]))
    model.eval()
    images, _ = data.batch(slice(0, BATCH))
    with torch.no_grad():
        torch._dynamo.reset()
        breaks = torch._dynamo.explain(model)(images).graph_break_count
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        difference = float((compiled(images) - model(images)).abs().max())
        found = summary(pairs(lambda: model(images), lambda: compiled(images), lambda: None, count))
    return {**found, "graph_breaks": breaks, "difference": difference}


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; the status is 1 when the bar of a step as one graph is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__, allow_abbrev=False)
    parser.add_argument("--before", type=int, default=100, help="training steps before those that are timed")
    parser.add_argument("--repeats", type=int, default=300, help="pairs timed")
    parser.add_argument("--out", type=Path, default=RESULTS / "compiled.json", help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    digits = load_digits()
    training = {}
    for layer in (*LAYERS, MODULE):
        row = training[layer] = measure_training(layer, digits.train, options.before, options.repeats)
        print(f"training, {layer}: {_line(row)}")
    for layer in ("picard", "explicit"):
        for name, row in measure_whole(layer, digits.train, options.before, options.repeats).items():
            training[f"{layer}, {name}"] = row
            print(f"training, {layer}, {name}: {_line(row)}")
    inference = {}
    for layer in TRACED:
        row = inference[layer] = measure_inference(layer, digits.train, options.before, options.repeats)
        print(f"inference, {layer}: {_line(row)}, {row['graph_breaks']} graph breaks, off by {row['difference']:.1e}")
    result = {"bound": BOUND, "training": training, "inference": inference}
    write(options.out, {**circumstances("benchmarks.compiled", arguments), "data": data_used(digits), **result})
    return int(training[END_TO_END]["ratio"] > BOUND)


def _line(row: dict[str, float]) -> str:
    return (
        f"eager {row['eager_ms']:.2f} ms, compiled {row['compiled_ms']:.2f} ms, "
        f"ratio {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
