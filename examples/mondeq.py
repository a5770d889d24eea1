"""A monotone operator equilibrium network on MNIST: `z = relu(W z + U x + b)` with a unique z whatever is learnt.

    python -m examples.mondeq fc           # fully connected, 84K parameters
    python -m examples.mondeq conv         # convolutional, less

Winston & Kolter (NeurIPS 2020) report 98.1 ± 0.1 % and 99.1 ± 0.1 % for 84K parameters each.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti
from examples import _mono as common


def loose(rtol: float) -> dict[str, Any]:
    """The solvers of training, forward and backward: this tolerance is enough for a useful gradient."""
    return {"solver": ti.PeacemanRachford(rtol=rtol), "adjoint": ti.Implicit(linear_solver=ti.Splitting(), rtol=rtol)}


class FullyConnected(nn.Module):
    """784 → 87 → 10."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.layer = Explicit(784, 87) if twin else ti.nn.MonotoneLinear(784, 87, margin=1.0, **loose(1e-2))
        self.head = nn.Linear(87, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 1, 28, 28)` to logits `(B, 10)`."""
        return self.head(self.layer(x.flatten(1)))


class Convolutional(nn.Module):
    """Patches of 7 x 7, every 4 pixels, to an equilibrium of 44 channels on 7 x 7."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        shape: dict[str, Any] = {"injection_size": 7, "stride": 4, "padding": 2}
        self.layer = ExplicitConv(1, 44) if twin else ti.nn.MonotoneConv2d(1, 44, margin=1.0, **shape, **loose(2e-2))
        self.norm = nn.BatchNorm2d(44)
        self.head = nn.Linear(44 * 49, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 1, 28, 28)` to logits `(B, 10)`."""
        return self.head(self.norm(self.layer(x)).flatten(1))


class Explicit(nn.Sequential):
    """The twin with as many parameters: two more layers of 87 in the place of A and B."""

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
    "conv": {"epochs": 4, "rate": 4e-3, "batch": 128, "shift": 1, "decay": 0.0},
}
LITERATURE = {
    "fc": "98.1 ± 0.1 % with 84K parameters (Winston & Kolter, NeurIPS 2020, table 1)",
    "conv": "99.1 ± 0.1 % with 84K parameters, single convolution (Winston & Kolter, NeurIPS 2020, table 1)",
}


def main() -> None:
    """Train, test, record, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="other than the recorded ones")
    parser.add_argument("--twin", action="store_true", help="train the explicit network of the same size instead")
    chosen = parser.parse_args()
    settings = SETTINGS[chosen.model] | ({"epochs": chosen.epochs} if chosen.epochs else {})
    torch.set_num_threads(1)
    data = common.digits()
    print(data.describe())
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        model = MODELS[chosen.model](chosen.twin)
        run = common.train(model, data, **settings)
        if not chosen.twin:
            model.layer.solver = ti.PeacemanRachford(rtol=1e-4)
            run |= {"race": race(model, data)}
        run |= common.test(model, data.test) | {"parameters": common.parameters(model), "settings": settings}
        run |= {"peak_memory_bytes": common.peak_memory(), "data": f"{len(data.train)} + {len(data.test)}"}
        print(f"seed {seed}: {run['accuracy']:.2%} on {len(data.test)} digits, converged {run['converged']:.2%}")
        facts = {"title": f"monDEQ on MNIST, {chosen.model}", "literature": LITERATURE[chosen.model]}
        name = f"mondeq_{chosen.model}"
        common.record(name, f"{'twin' if chosen.twin else 'seed'} {seed}", run, facts)
        if not chosen.twin:
            common.keep(model, f"{name}_{seed}")
            common.plot(name, lambda axes, run=run: draw(axes, run["losses"]))


@torch.no_grad()
def race(model: Any, data: common.Digits, rtol: float = 1e-3) -> dict[str, Any]:
    """Evaluations on 500 test digits at equal residual: Peaceman and Rachford's splitting, and forward-backward's."""
    x, _ = next(common.batches(data.test, 500, 0, False))
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


def draw(axes, losses: list[float]) -> None:
    """The training loss."""
    axes.semilogy(range(1, len(losses) + 1), losses, marker="o")
    axes.set(xlabel="epoch", ylabel="training loss")


if __name__ == "__main__":
    main()
