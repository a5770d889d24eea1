"""Paired timing: contenders train in short alternating segments, so that a slow moment hits all of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.bench.notebook import NotebookFixedPoint, NotebookNewton, gradients_are_usable

Batch = tuple[Tensor, Tensor]
Layer = ti.nn.TanhEquilibrium | NotebookFixedPoint | NotebookNewton
Weights = list[Tensor]
"""Every parameter of a model in order: the same for all contenders, whose state dicts name them differently."""


@dataclass
class Tally:
    """What one contender did in one epoch: seconds in training steps, and one entry per batch in each list.

    `residuals` are Frobenius norms over the batch of `tanh(W z + x) - z`, recomputed in float64 from the `x` the layer
    was given and the `z` it returned. `forward` and `backward` count evaluations of the cell and vector-Jacobian
    products, where the contender reports them.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    iterations: list[int] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    skipped: int = 0

    def add(self, other: "Tally") -> None:
        """Append another piece of the same epoch."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Trainee:
    """A model that trains for an epoch in segments, and a `Tally` of it."""

    def __init__(self, model: nn.Module, weights: Weights, learning_rate: float) -> None:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        self.model = model
        self.layer = find_layer(model)
        self.optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate)
        self.tally = Tally()
        self._seen: Batch | None = None
        self.layer.register_forward_hook(self._remember)

    def _remember(self, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen = inputs[0].detach(), output.detach()

    def train(self, batches: Sequence[Batch]) -> None:
        """Take one optimiser step per batch. The clock stands still while a batch's residual is recomputed."""
        with ti.monitor(self.model) as log:
            for images, labels in batches:
                self._clock(-1)
                loss = nn.functional.cross_entropy(self.model(images), labels)
                self.optimiser.zero_grad()
                loss.backward()
                self._clock(+1)
                self._record(log)  # the weights are still those that the layer solved with
                self._clock(-1)
                if gradients_are_usable(self.model.parameters()):
                    self.optimiser.step()
                else:
                    self.tally.skipped += 1
                self._clock(+1)

    def _clock(self, sign: int) -> None:
        self.tally.seconds += sign * time.perf_counter()
        self.tally.cpu_seconds += sign * time.process_time()

    def _record(self, log: ti.Monitor) -> None:
        assert self._seen is not None
        x, z = self._seen
        self.tally.residuals.append(batch_residual(self.layer.linear.weight, x, z))
        if not isinstance(self.layer, ti.nn.TanhEquilibrium):
            self.tally.iterations.append(self.layer.iterations)
            return
        solution = log.records[-1].solution
        self.tally.iterations.append(int(solution.steps.max()))
        self.tally.forward.append(solution.evaluations)
        self.tally.backward.append(solution.adjoint.evaluations or 0)


def find_layer(model: nn.Module) -> Layer:
    """Find the one implicit layer of `model`, ours or the notebook's."""
    found = [module for module in model.modules() if isinstance(module, Layer)]
    if len(found) != 1:
        raise ValueError(f"model: it has {len(found)} implicit layers, give a model with exactly one")
    return found[0]


@torch.no_grad()
def batch_residual(weight: Tensor, x: Tensor, z: Tensor) -> float:
    """Compute the Frobenius norm of `tanh(z W^T + x) - z` in float64; `x` and `z` are `(B, n)`."""
    W, x, z = weight.double(), x.double(), z.double()
    return float(torch.linalg.vector_norm(torch.tanh(z @ W.T + x) - z))


def race(
    builders: dict[str, Callable[[], nn.Module]],
    weights: Weights,
    batches: Sequence[Batch],
    *,
    learning_rate: float,
    segment: int,
) -> dict[str, Tally]:
    """Train every contender for one pass over `batches` from `weights`, `segment` batches at a time in turn.

    Each keeps its own weights; the order of turns is reversed after every round.
    """
    trainees = {name: Trainee(build(), weights, learning_rate) for name, build in builders.items()}
    order = list(trainees)
    for start in range(0, len(batches), segment):
        for name in order:
            trainees[name].train(batches[start : start + segment])
        order.reverse()
    return {name: trainee.tally for name, trainee in trainees.items()}


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show `median (low-high)`."""
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compare two contenders run by run: `times[i] / reference[i]` come from the same race."""
    if len(times) != len(reference) or not times:
        raise ValueError(f"times: {len(times)} runs against {len(reference)}, give pairs, at least one")
    ratios = [ours / theirs for ours, theirs in zip(times, reference, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))
