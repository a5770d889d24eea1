"""What a cheaper backward pass costs in accuracy, on the residual equilibrium: `python -m examples.backward_pareto`.

The same network is trained from the same start with each adjoint. Then, on the network that the exact gradient trained,
each adjoint takes the gradient of the same batches: the time of the backward pass (of the processor, so that a busy
machine does not count), the products with the Jacobian, and the cosine to the exact gradient of all parameters. With
`--twin` only the explicit twin is trained, the network with its block applied once.
"""

import time
from collections.abc import Sequence
from statistics import fmean, median

import torch
from torch import nn

import torchimplicit as ti
from examples._digits import batches, distort, sizes
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record
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


TWIN = "explicit twin: the block once"
EXPERIMENT = Experiment(
    name="backward_pareto",
    title="Backward pass: cost and accuracy",
    metric="accuracy",
    unit="%",
    ours="exact",
    twin=TWIN,
    models={name: literature for name, (_, literature) in ADJOINTS.items()} | {TWIN: ""},
    literature=(
        "the shape: 5 refinements cost 2.4 times less backward time and 2 cost 3.9 times less, both at no loss of "
        "accuracy; one step loses 0.4 points (MDEQ on CIFAR-10)"
    ),
    source="SHINE repository, cifar_aggreg_results.csv",
    notes=(
        "short trainings, to be compared with each other and not with the best figures",
        "all are trained with the same Jacobian penalty (Bai, Koltun & Kolter 2021), weight 1: without it the exact "
        "gradient went astray in one seed of three (4,000 images: 96.5 %, and a Jacobian nearly singular)",
        "backward_ms: processor time of the layer's own backward pass, 100 images, median of 15; exact is "
        "Implicit(GMRES(), rtol=1e-4); refinements are terms of the Neumann series",
        "evaluations_backward: products with the Jacobian; evaluations_test: those of the solves of the test",
    ),
)


def train(
    model: nn.Sequential, data: Split, adjoint: ti.Adjoint | None, epochs: int, penalty: float, seed: int, label: str
) -> dict[str, float]:
    """Some epochs of AdamW, all with one adjoint, or of the twin, which has none; evaluations and the time.

    A Jacobian that nothing holds down may come so near to singular that the exact gradient goes astray: `penalty` is
    the weight of its size in the loss (Bai, Koltun & Kolter 2021), the same for all.
    """
    generator = torch.Generator().manual_seed(seed)
    size = 100
    steps = epochs * (len(data) // size)
    optimiser = torch.optim.AdamW(model.parameters(), 6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    stem, block, head = model
    block.adjoint = adjoint
    meter = Meter()
    with ti.monitor(model) as log, progress(label, steps) as advance:
        for _ in range(epochs):
            for images, labels in batches(data, size, generator):
                injected = stem(distort(images, generator))
                z = block(injected)
                loss = nn.functional.cross_entropy(head(z), labels)
                if adjoint is not None:
                    loss = loss + penalty * ti.jacobian_penalty(block, z.detach(), injected)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                meter.take(log)
                advance(f"loss {loss.item():.3f}")
    return meter.figures()


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
    return {"backward_ms": median(times), "evaluations_backward": fmean(products), "cosine": fmean(cosines)}


def plot(record: Record) -> None:
    """Accuracy and cosine over the time of a backward pass."""
    with figure(record.out, "backward_pareto", width=9, height=3.6, columns=2) as both:
        for name, runs in record.models.items():
            for axes, key in zip(both, ("accuracy", "cosine"), strict=True):
                if name != TWIN:
                    at = fmean(r["backward_ms"] for r in runs), fmean(r[key] for r in runs)
                    axes.plot(*at, "o")
                    above = name not in ("5 refinements", "exact")  # where the cosine is 1 they meet
                    axes.annotate(name, at, fontsize=7, xytext=(3, 3 if above else -9), textcoords="offset points")
        for axes, label in zip(both, ("test accuracy, %", "cosine to the exact gradient"), strict=True):
            axes.set(xlabel="backward pass, ms", ylabel=label, xscale="log", xlim=(4, 150))
            axes.set_xticks([5, 10, 20, 50, 100], labels=["5", "10", "20", "50", "100"])
            axes.minorticks_off()


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options; `--images`, the first of the training set."""
    smoke = {"epochs": 1, "batches": 1}
    settings = {"images": 10_000, "epochs": 4, "penalty": 1.0, "batches": 5}
    return options(argv, __doc__ or "", digits=True, twin=True, smoke=smoke, **settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    chosen = command_line(argv)
    data = load_digits(chosen.data_dir)
    few = Split(data.train.images[: chosen.images], data.train.labels[: chosen.images])
    record = Record.open(EXPERIMENT, chosen, data=sizes(data))
    for seed in chosen.seeds:
        probe: nn.Sequential | None = None
        for name in (TWIN,) if chosen.twin else ADJOINTS:
            adjoint = None if chosen.twin else ADJOINTS[name][0]
            torch.manual_seed(seed)
            model = network(implicit=not chosen.twin)
            what = f"{name}, seed {seed}"
            figures = train(model, few, adjoint, chosen.epochs, chosen.penalty, seed, what) | test(model, data.test)
            if adjoint is not None:
                probe = model if probe is None else probe  # the first was trained by the exact gradient
                figures |= measure(probe, data.test, adjoint, chosen.batches)
                print(f"{name}: {figures['backward_ms']:.1f} ms, cosine {figures['cosine']:.4f}", flush=True)
            record.add(name, seed, **figures, parameters=parameters(model))
            sane(chosen, "an accuracy above 60 %", figures["accuracy"] > 60)
    if not chosen.twin:
        plot(record)
        exact, few_terms = (record.models[name][0]["cosine"] for name in ("exact", "5 refinements"))
        sane(chosen, "the exact gradient exact, 5 refinements near it", exact > 0.999 and 0.9 < few_terms < 0.99999)


if __name__ == "__main__":
    main()
