"""A monotone operator equilibrium network on MNIST: `z = relu(W z + U x + b)` with a unique z whatever is learnt.

    python -m examples.mondeq fc           # fully connected, 84K parameters
    python -m examples.mondeq conv         # convolutional, less

Winston & Kolter (NeurIPS 2020) report 98.1 ± 0.1 % and 99.1 ± 0.1 % for 84K parameters each. The explicit network of
the same size is trained by `--twin`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti
from examples._digits import batches, shift, sizes
from examples._meter import Meter, parameters, peak_memory_mb
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record
from torchimplicit.experiments.data import Digits, Split, load_digits


def loose(rtol: float) -> dict[str, Any]:
    """The solvers of training, forward and backward: this tolerance is enough for a useful gradient."""
    return {"solver": ti.PeacemanRachford(rtol=rtol), "adjoint": ti.Implicit(linear_solver=ti.Splitting(), rtol=rtol)}


class FullyConnected(nn.Module):
    """784 → 86 → 10."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.layer = Explicit(784, 86) if twin else ti.nn.MonotoneLinear(784, 86, margin=1.0, **loose(1e-2))
        self.head = nn.Linear(86, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 1, 28, 28)` to logits `(B, 10)`."""
        return self.head(self.layer(x.flatten(1)))


class Convolutional(nn.Module):
    """Patches of 7 x 7, every 4 pixels, to an equilibrium of 44 channels on 7 x 7."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        shape: dict[str, Any] = {"injection_size": 7, "stride": 4, "padding": 2}
        self.layer = ExplicitConv(1, 44) if twin else ti.nn.MonotoneConv2d(1, 44, margin=0.5, **shape, **loose(2e-2))
        self.norm = nn.BatchNorm2d(44)
        self.head = nn.Linear(44 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 1, 28, 28)` to logits `(B, 10)`."""
        return self.head(self.norm(self.layer(x)).flatten(1))


class Explicit(nn.Sequential):
    """The twin with as many parameters: two more layers of 86 in the place of A and B."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__(
            nn.Linear(inputs, n), nn.ReLU(), nn.Linear(n, n, False), nn.ReLU(), nn.Linear(n, n, False), nn.ReLU()
        )


class ExplicitConv(nn.Sequential):
    """The twin with as many parameters: two more convolutions in the place of A and B."""

    def __init__(self, inputs: int, n: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, n, 7, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(n, n, 3, padding=1, padding_mode="circular", bias=False),
            nn.ReLU(),
            nn.Conv2d(n, n, 3, padding=1, padding_mode="circular", bias=False),
            nn.ReLU(),
        )


MODELS = {"fc": FullyConnected, "conv": Convolutional}
SETTINGS = {
    "fc": {"epochs": 20, "rate": 3e-3, "batch": 128, "shift": 1, "decay": 0.0},
    "conv": {"epochs": 8, "rate": 4e-3, "batch": 128, "shift": 1, "decay": 0.0},
}
EXPERIMENTS = {
    model: Experiment(
        name=f"mondeq_{model}",
        title=f"monDEQ on MNIST, {what}",
        metric="accuracy",
        unit="fraction",
        ours="monDEQ",
        twin="explicit twin",
        models={"monDEQ": f"{figure} ± 0.1 % with 84K parameters", "explicit twin": ""},
        bar=figure / 100,
        literature=f"{figure} ± 0.1 % with 84K parameters{which}",
        source="Winston & Kolter, NeurIPS 2020, table 1",
        notes=("race: evaluations on 500 test digits at equal residual, for each splitting; null: not converged",),
    )
    for model, what, figure, which in (
        ("fc", "fully connected", 98.1, ""),
        ("conv", "convolutional", 99.1, ", single convolution"),
    )
}


def standardised(images: Iterator[tuple[Tensor, Tensor]], by: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches with mean zero and deviation one, each image moved by at most so many pixels."""
    for x, labels in images:
        yield (shift(x, by) if by else x).sub(0.1307).div(0.3081), labels


def train(
    model: nn.Module, data: Split, what: str, *, epochs: int, rate: float, batch: int, shift: int, decay: float
) -> dict[str, Any]:
    """Adam with one cycle of the learning rate; what a batch cost, on average, and the losses of the epochs."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    steps = epochs * -(-len(data) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.25)
    losses, meter = [], Meter()
    model.train()
    with ti.monitor(model) as log, progress(what, steps) as advance:
        for _ in range(epochs):
            total = 0.0
            for x, labels in standardised(batches(data, batch, torch.default_generator, odd=True), shift):
                loss = nn.functional.cross_entropy(model(x), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                total += loss.item() * len(x)
                meter.take(log)
                advance(f"loss {loss.item():.4f}")
            losses.append(total / len(data))
    figures = meter.figures()
    figures.pop("converged", None)  # the recorded one is that of the test
    return {"losses": losses, **figures}


@torch.no_grad()
def test(model: nn.Module, data: Split) -> dict[str, float]:
    """Accuracy, and the fraction of the samples whose equilibrium was found."""
    model.eval()
    right, meter = 0, Meter()
    with ti.monitor(model) as log:
        for x, labels in standardised(batches(data, 500)):
            right += int((model(x).argmax(1) == labels).sum())
            meter.take(log)
    solves = meter.solves()
    return {"accuracy": right / len(data)} | ({"converged": solves["converged"]} if solves else {})


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options."""
    chosen = options(argv, __doc__ or "", twin=True, digits=True, smoke={"epochs": 1}, which=tuple(MODELS), epochs=0)
    chosen.settings = SETTINGS[chosen.model] | ({"epochs": chosen.epochs} if chosen.epochs else {})
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Train, test, record, plot."""
    chosen = command_line(argv)
    data = load_digits(chosen.data_dir)
    print(data.describe())
    experiment = EXPERIMENTS[chosen.model]
    record = Record.open(experiment, chosen, data=sizes(data))
    name = experiment.twin if chosen.twin else experiment.ours
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        model = MODELS[chosen.model](chosen.twin)
        run = train(model, data.train, f"{name}, seed {seed}", **chosen.settings)
        if not chosen.twin:
            model.layer.solver = ti.PeacemanRachford(rtol=1e-4)
            run |= {"race": race(model, data)}
        run |= test(model, data.test) | {"parameters": parameters(model), "peak_memory_mb": peak_memory_mb()}
        record.add(name, seed, **run)
        sane(chosen, "an accuracy above 80 %", run["accuracy"] > 0.8)
        sane(chosen, "every test sample converged", run.get("converged", 1.0) == 1.0)
        if not chosen.twin:
            record.keep(model, seed)
            with figure(chosen.out, experiment.name) as axes:
                axes.semilogy(range(1, len(run["losses"]) + 1), run["losses"], marker="o")
                axes.set(xlabel="epoch", ylabel="training loss")


@torch.no_grad()
def race(model: Any, data: Digits, rtol: float = 1e-3) -> dict[str, Any]:
    """Evaluations on 500 test digits at equal residual: Peaceman and Rachford's splitting, and forward-backward's."""
    x, _ = next(standardised(batches(data.test, 500)))
    x = x.flatten(1) if isinstance(model, FullyConnected) else x[:100]
    layer: Any = model.layer
    layer.on_failure = "ignore"
    found: dict[str, Any] = {"rtol": rtol}
    for name, solver in (
        ("peaceman_rachford", ti.PeacemanRachford(rtol=rtol)),
        ("forward_backward", ti.ForwardBackward(rtol=rtol)),
        *((f"forward_backward {a}", ti.ForwardBackward(step_size=a, rtol=rtol)) for a in (0.02, 0.05, 0.1, 0.15, 0.2)),
    ):
        layer.solver, layer.max_steps = solver, 1000
        solution = layer.solve(x)
        found[name] = solution.evaluations if bool(solution.converged.all()) else None
    layer.solver, layer.max_steps, layer.on_failure = ti.PeacemanRachford(rtol=1e-4), None, "warn"
    print(found)
    return found


if __name__ == "__main__":
    main()
