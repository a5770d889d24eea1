"""A residual block at its equilibrium classifies digits: `python -m examples.residual_deq`.

A small stem reduces an image to 32 channels of 7 × 7; there a residual block is solved for its fixed point, and a
linear layer reads the class. Most of the training takes the one-step gradient (cheap, and close enough far from the
minimum), the last epochs the exact one. The explicit twin is the same network with the block applied once.

The data are those that TORCHIMPLICIT_DATA names, else the 5,000 embedded digits. For Fashion-MNIST (the same four IDX
files; Debian has them as dataset-fashion-mnist) say `--name fashion --data-dir /usr/share/datasets/fashion-mnist`.
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import torchimplicit as ti
from examples._residual import Row, batches, distort, figure_path, peak_megabytes, pin_threads, progress, save_result
from torchimplicit.experiments.data import Digits, Split, load_digits

EXACT = ti.Implicit(linear_solver=ti.GMRES(), rtol=1e-2)  # GMRES takes 6 products where the Neumann series takes 21
LITERATURE = {
    "mnist": "99.4 with 54K parameters (implicit ResNet of JFB, Fung et al., AAAI 2022, Table 1; explicit twin 99.4)",
    "fashion": "",
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


def train(model: nn.Sequential, data: Split, epochs: int, exact_epochs: int, seed: int) -> dict[str, float]:
    """AdamW and one cycle of the learning rate; the figures of the last epoch."""
    generator = torch.Generator().manual_seed(seed)
    size, peak = 100, 6e-3
    steps = len(data) // size
    optimiser = torch.optim.AdamW(model.parameters(), peak, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=epochs * steps, pct_start=0.25)
    block = model[1]
    forward, backward, started = 0, 0, time.perf_counter()
    with progress() as bar, ti.monitor(model) as log:
        task = bar.add_task("training", total=epochs * steps, note="")
        for epoch in range(epochs):
            forward, backward = 0, 0
            block.adjoint = EXACT if epoch >= epochs - exact_epochs else ti.JacobianFree()
            for images, labels in batches(data, size, generator):
                loss = nn.functional.cross_entropy(model(distort(images, generator)), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                for record in log.records:
                    forward += record.solution.evaluations
                    backward += record.solution.adjoint.evaluations or 0
                log.records.clear()
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}")
    wall = time.perf_counter() - started
    return {"forward evaluations": forward / steps, "backward products": backward / steps, "training seconds": wall}


@torch.no_grad()
def test(model: nn.Sequential, data: Split) -> dict[str, float]:
    """Accuracy in percent, and how the solves at a smaller tolerance ended."""
    model.eval()
    block = model[1]
    kept = (block.solver, block.max_steps) if isinstance(block, ti.nn.ResidualEquilibrium) else None
    if kept is not None:
        block.solver, block.max_steps = ti.Anderson(rtol=1e-3), 100
    right, converged, evaluations = 0, 0, []
    with ti.monitor(model) as log:
        for images, labels in batches(data, 100):
            right += int((model(images).argmax(1) == labels).sum())
        for record in log.records:
            converged += int(record.solution.converged.sum())
            evaluations.append(record.solution.evaluations)
    if kept is not None:
        block.solver, block.max_steps = kept
    model.train()
    figures = {"accuracy": 100 * right / len(data)}
    if evaluations:
        figures |= {"converged": converged / len(data), "test evaluations": sum(evaluations) / len(evaluations)}
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


def plot(model: nn.Sequential, data: Split, name: str) -> None:
    """Residuals of 100 test images beside the steps."""
    block = model.eval()[1]
    images, _ = data.batch(slice(0, 100))
    with torch.no_grad():
        injected = model[0](images[:, None])
        figure, axes = plt.subplots(figsize=(5, 3.5))
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
    figure.tight_layout()
    figure.savefig(figure_path(name), dpi=120)


def main() -> None:
    """Train and test both networks, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=("mnist", "fashion"), default="mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--exact-epochs", type=int, default=1, help="of these, the last, by the exact gradient")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    pin_threads()
    data = load(options.name, options.data_dir)
    print(data.describe())
    name = f"residual_{options.name}"
    parameters = sum(p.numel() for p in network().parameters())
    ours = Row("residual equilibrium", "accuracy", parameters, LITERATURE[options.name])
    twin = Row("explicit twin: the block once", "accuracy", parameters)
    weights = Path("runs/examples")
    weights.mkdir(parents=True, exist_ok=True)
    for done, seed in enumerate(options.seeds, 1):
        for row, implicit in ((ours, True), (twin, False)):
            torch.manual_seed(seed)
            model = network(implicit)
            figures = train(model, data.train, options.epochs, options.exact_epochs, seed) | test(model, data.test)
            row.add(figures.pop("accuracy"), **figures, **{"peak MB": peak_megabytes()})
            print(row)
            if implicit:
                torch.save(model.state_dict(), weights / f"{name}-{seed}.pt")
                plot(model, data.test, name)
        notes = [
            f"{data.source.split(' in ')[0]}, {len(data.train):,} + {len(data.test):,}",
            f"{options.epochs} epochs in batches of 100, AdamW, one cycle of the learning rate up to 6e-3",
            f"one-step gradient, then {options.exact_epochs} epochs of the exact one (GMRES, rtol=1e-2), which is "
            "the one that the training's evaluations are of; images turned, scaled and moved at random",
            "training: Anderson(rtol=1e-2), 12 steps at most; test: Anderson(rtol=1e-3), 100 at most",
            "peak memory is the process's, data and torch itself included",
        ]
        path = save_result(name, "Residual equilibrium", options.seeds[:done], [ours, twin], notes)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
