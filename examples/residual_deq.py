"""A residual block at its equilibrium classifies digits: `python -m examples.residual_deq`.

A small stem reduces an image to 32 channels of 7 × 7; there a residual block is solved for its fixed point, and a
linear layer reads the class. Most of the training takes the one-step gradient (cheap, and close enough far from the
minimum), the last epochs the exact one. The explicit twin is the same network with the block applied once.

The data are those that TORCHIMPLICIT_DATA names, else the 5,000 embedded digits. For Fashion-MNIST (the same four IDX
files; Debian has them as dataset-fashion-mnist) say `--name fashion --data-dir /usr/share/datasets/fashion-mnist`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import torchimplicit as ti
from examples._digits import batches, distort, sizes
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record
from torchimplicit.experiments.data import Digits, Split, load_digits

EXACT = ti.Implicit(linear_solver=ti.GMRES(), rtol=1e-2)  # GMRES takes 6 products where the Neumann series takes 21
OURS, TWIN = "residual equilibrium", "explicit twin: the block once"
JFB = "99.4 with 54K parameters (implicit ResNet; explicit twin 99.4)"
EXPERIMENTS = {
    name: Experiment(
        name=f"residual_{name}",
        title=f"Residual equilibrium on {data}",
        metric="accuracy",
        unit="%",
        ours=OURS,
        twin=TWIN,
        models={OURS: literature, TWIN: ""},
        bar=99.4 if literature else None,
        literature=literature or "none for an equilibrium model of this size",
        source="JFB: Fung et al., AAAI 2022, table 1" if literature else "",
        notes=(
            "batches of 100, AdamW, one cycle of the learning rate up to 6e-3; images distorted at random",
            "one-step gradient, in the last epochs the exact one (GMRES, rtol=1e-2): evaluations are those of the last",
            "training: Anderson(rtol=1e-2), 12 steps at most; test, with the converged fraction: Anderson(rtol=1e-3), "
            "100 at most",
        ),
    )
    for name, data, literature in (("mnist", "MNIST", JFB), ("fashion", "Fashion-MNIST", ""))
}


class Once(nn.Module):
    """The explicit twin of a layer: its cell, applied once."""

    def __init__(self, layer: ti.nn.ResidualEquilibrium) -> None:
        super().__init__()
        self.cell = layer.cell

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same."""
        return self.cell(x, x)


def network(implicit: bool = True, channels: int = 32) -> nn.Sequential:
    """Stem, block and classifier: `(B, 1, 28, 28)` to `(B, 10)`."""
    stem = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)),
    )
    block = ti.nn.ResidualEquilibrium(channels, max_steps=12, on_failure="ignore", solver=ti.Anderson(rtol=1e-2))
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels * 49, 10))
    return nn.Sequential(stem, block if implicit else Once(block), head)


def train(
    model: nn.Sequential, data: Split, epochs: int, exact_epochs: int, seed: int, what: str = "training"
) -> dict[str, float]:
    """AdamW and one cycle of the learning rate; the evaluations of the last epoch, the time of all."""
    generator = torch.Generator().manual_seed(seed)
    size, peak = 100, 6e-3
    steps = epochs * (len(data) // size)
    optimiser = torch.optim.AdamW(model.parameters(), peak, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps, pct_start=0.25)
    block, clock, meter = model[1], Meter(), Meter()
    with ti.monitor(model) as log, progress(what, steps) as advance:
        for epoch in range(epochs):
            meter = Meter()
            block.adjoint = EXACT if epoch >= epochs - exact_epochs else ti.JacobianFree()
            for images, labels in batches(data, size, generator):
                loss = nn.functional.cross_entropy(model(distort(images, generator)), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                meter.take(log)
                advance(f"loss {loss.item():.3f}")
    return meter.solves() | clock.seconds()


@torch.no_grad()
def test(model: nn.Sequential, data: Split) -> dict[str, float]:
    """Accuracy in percent, and how the solves at a smaller tolerance ended."""
    model.eval()
    block = model[1]
    kept = (block.solver, block.max_steps) if isinstance(block, ti.nn.ResidualEquilibrium) else None
    if kept is not None:
        block.solver, block.max_steps = ti.Anderson(rtol=1e-3), 100
    right, meter = 0, Meter()
    with ti.monitor(model) as log:
        for images, labels in batches(data, 100):
            right += int((model(images).argmax(1) == labels).sum())
            meter.take(log)
    if kept is not None:
        block.solver, block.max_steps = kept
    model.train()
    figures, solves = {"accuracy": 100 * right / len(data)}, meter.solves()
    if solves:
        figures |= {"converged": solves["converged"], "evaluations_test": solves["evaluations_forward"]}
    return figures


def load(name: str, folder: Path | None) -> Digits:
    """The data, or how to come by them."""
    if name == "fashion" and folder is None:
        folder = Path("/usr/share/datasets/fashion-mnist")
        if not folder.is_dir():
            raise SystemExit(
                "no Fashion-MNIST here: install Debian's dataset-fashion-mnist, or name a folder with its four IDX "
                "files by --data-dir (https://github.com/zalandoresearch/fashion-mnist has them)"
            )
    return load_digits(folder)


@torch.no_grad()
def plot(model: nn.Sequential, data: Split, out: Path, name: str) -> None:
    """Residuals of 100 test images beside the steps."""
    block = model.eval()[1]
    images, _ = data.batch(slice(0, 100))
    injected = model[0](images[:, None])
    with figure(out, name, width=5) as axes:
        for label, solver in (("Picard", ti.Picard(rtol=1e-4)), ("Anderson(5)", ti.Anderson(rtol=1e-4))):
            solution = ti.fixed_point(
                block.cell,
                torch.zeros_like(injected),
                injected,
                solver=solver,
                batch_dims=1,
                max_steps=60,
                trace=True,
                on_failure="ignore",
            )
            assert solution.trace is not None
            axes.semilogy(solution.trace.nanmedian(1).values, label=label)
        axes.set(xlabel="step", ylabel="residual, median of 100 test images", title="The trained block")
        axes.legend()


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options; `--exact-epochs`, the last, take the exact gradient."""
    return options(
        argv,
        __doc__ or "",
        digits=True,
        smoke={"epochs": 1},
        name=("mnist", "fashion"),
        epochs=8,
        exact_epochs=1,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train and test both networks, seed by seed."""
    chosen = command_line(argv)
    data = load(chosen.name, chosen.data_dir)
    print(data.describe())
    experiment = EXPERIMENTS[chosen.name]
    record = Record.open(experiment, chosen, data=sizes(data))
    for seed in chosen.seeds:
        for name, implicit in ((OURS, True), (TWIN, False)):
            torch.manual_seed(seed)
            model = network(implicit)
            cost = train(model, data.train, chosen.epochs, chosen.exact_epochs, seed, f"{name}, seed {seed}")
            figures = cost | test(model, data.test)
            record.add(name, seed, **figures, parameters=parameters(model))
            sane(chosen, "an accuracy above 85 %", figures["accuracy"] > 85)
            if implicit:
                sane(chosen, "99 % of the test images converged", figures["converged"] > 0.99)
                record.keep(model, seed)
                plot(model, data.test, chosen.out, experiment.name)


if __name__ == "__main__":
    main()
