"""What a cheaper backward pass costs in accuracy, on the residual equilibrium: `python -m examples.backward_pareto`.

The same network is trained from the same start with each adjoint. Then, on the network that the exact gradient trained,
each adjoint takes the gradient of the same batches: the time of the backward pass (of the processor, so that a busy
machine does not count), the products with the Jacobian, and the cosine to the exact gradient of all parameters.
"""

import argparse
import time
from pathlib import Path
from statistics import fmean, median

import matplotlib.pyplot as plt
import torch
from torch import nn

import torchimplicit as ti
from examples._residual import Row, batches, distort, figure_path, pin_threads, progress, save_result
from examples.residual_deq import network, test
from torchimplicit.experiments.data import Split, load_digits

EXACT = ti.Implicit(linear_solver=ti.GMRES(), rtol=1e-4)
SHINE = "SHINE repository, cifar_aggreg_results.csv: MDEQ on CIFAR-10, "
ADJOINTS: dict[str, tuple[ti.Adjoint, str]] = {
    "exact": (EXACT, SHINE + "93.51 ± 0.15 at 209 ms"),
    "5 refinements": (ti.NeumannSeries(5), SHINE + "93.6 at 86 ms (truncated, r = 5)"),
    "2 refinements": (ti.NeumannSeries(2), SHINE + "93.4 at 54 ms (r = 2)"),
    "one step": (ti.JacobianFree(), SHINE + "93.09 at 12.9 ms (JFB)"),
    "phantom": (ti.PhantomGradient(5, 0.5), "Geng et al. 2021: backward about 1.7 times faster"),
    "Shine": (ti.Shine(refine=0), SHINE + "93.14 at 16.0 ms"),
    "Shine, 5 refinements": (ti.Shine(refine=5), SHINE + "93.54 at 96.6 ms"),
}


def train(model: nn.Sequential, data: Split, adjoint: ti.Adjoint, epochs: int, seed: int, label: str) -> None:
    """Some epochs of AdamW, all with one adjoint."""
    generator = torch.Generator().manual_seed(seed)
    size = 100
    steps = epochs * (len(data) // size)
    optimiser = torch.optim.AdamW(model.parameters(), 6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    model[1].adjoint = adjoint
    with progress() as bar:
        task = bar.add_task(label, total=steps, note="")
        for _ in range(epochs):
            for images, labels in batches(data, size, generator):
                loss = nn.functional.cross_entropy(model(distort(images, generator)), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update(task, advance=1, note=f"loss {loss.item():.3f}")


def measure(model: nn.Sequential, data: Split, adjoint: ti.Adjoint, count: int = 5) -> dict[str, float]:
    """Milliseconds and products of a backward pass, and the cosine to the exact gradient; medians and means."""
    block, times, products, cosines = model.eval()[1], [], [], []
    block.solver, block.max_steps = ti.Anderson(rtol=1e-3), 100
    for images, labels in list(batches(data, 100))[:count]:
        with torch.no_grad():
            injected = model[0](images)
        injected.requires_grad_()

        def loss(output: torch.Tensor, labels: torch.Tensor = labels) -> torch.Tensor:
            return nn.functional.cross_entropy(output, labels, reduction="sum")

        for _ in range(3):
            block.adjoint = adjoint
            solution = block.solve(injected)
            v = torch.autograd.grad(loss(model[2](solution.value)), solution.value, retain_graph=True)[0]
            started = time.process_time()
            torch.autograd.grad(solution.value, [injected, *block.parameters()], v)
            times.append(1e3 * (time.process_time() - started))
        products.append(solution.adjoint.evaluations or 0)
        cosines.append(ti.gradient_error(model, images, adjoint=adjoint, loss=loss).cosine)
    return {"backward ms": median(times), "backward products": fmean(products), "cosine": fmean(cosines)}


def plot(rows: list[Row]) -> None:
    """Accuracy and cosine over the time of a backward pass."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6))
    for row in rows:
        x = fmean(row.more["backward ms"])
        for axes, value in zip(both, (fmean(row.values), fmean(row.more["cosine"])), strict=True):
            axes.plot(x, value, "o")
            axes.annotate(row.model, (x, value), fontsize=7, xytext=(3, 3), textcoords="offset points")
    for axes, label in zip(both, ("test accuracy, %", "cosine to the exact gradient"), strict=True):
        axes.set(xlabel="backward pass, ms", ylabel=label, xscale="log")
    figure.tight_layout()
    figure.savefig(figure_path("backward_pareto"), dpi=120)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--images", type=int, default=4000, help="of the training set, the first")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    pin_threads()
    data = load_digits(options.data_dir)
    few = Split(data.train.images[: options.images], data.train.labels[: options.images])
    parameters = sum(p.numel() for p in network().parameters())
    rows = [Row(name, "accuracy", parameters, source) for name, (_, source) in ADJOINTS.items()]
    for done, seed in enumerate(options.seeds, 1):
        probe: nn.Sequential | None = None
        for row in rows:
            adjoint, _ = ADJOINTS[row.model]
            torch.manual_seed(seed)
            model = network()
            train(model, few, adjoint, options.epochs, seed, f"{row.model}, seed {seed}")
            accuracy = test(model, data.test)
            probe = model if probe is None else probe  # the first was trained by the exact gradient
            row.add(accuracy.pop("accuracy"), **accuracy, **measure(probe, data.test, adjoint))
            print(f"{row}, {row.more['backward ms'][-1]:.1f} ms, cosine {row.more['cosine'][-1]:.4f}", flush=True)
        notes = [
            f"trained on {len(few):,} images for {options.epochs} epochs, tested on {len(data.test):,}: short, "
            "to be compared with each other and not with the best figures",
            "backward ms: processor time of the layer's own backward pass, 100 images, median of 15; exact is "
            "Implicit(GMRES(), rtol=1e-4); refinements are terms of the Neumann series",
        ]
        path = save_result("backward_pareto", "Backward pass: cost and accuracy", options.seeds[:done], rows, notes)
        plot(rows)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
