"""The story of the tutorial, `z = tanh(W z + x)` on digits, told with evidence: `python -m examples.tutorial`.

Chapter 1 of the Deep Implicit Layers tutorial (Kolter, Duvenaud & Johnson 2020) solves this equation by fixed-point
iteration and by Newton's method, and differentiates through the steps. This script trains its classifier with the
library, and beside it shows what goes wrong in the notebook, each with a number:

1. memory grows with the steps, since all of them are kept for the backward pass;
2. one norm for the whole batch decides when to stop, so that what a sample gets depends on who is beside it;
3. a layer that does not converge says nothing: it returns its last iterate, or zeros, as if it were the answer.

And one thing to be careful about with any library: the linearised gradient of a sample that did *not* converge may be
huge. In the row "Newton, gradient of all samples" one such sample in the 114th batch (seed 0) brings the gradient to a
norm of 540, after which W has norm 29 and the training is lost. `Implicit(unconverged="zero")` leaves such samples out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import torchimplicit as ti
from examples._digits import batches, sizes
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record
from torchimplicit.experiments.bench.notebook import NotebookFixedPoint, NotebookNewton
from torchimplicit.experiments.data import Digits, load_digits

FEATURES = 100
TOLERANCE = 1e-5
"""Of a sample's two-norm: what the notebook's 1e-4 for a batch of 100 comes to."""


CAREFUL = ti.Implicit(unconverged="zero")


@dataclass(frozen=True)
class Way:
    """A layer, and how its model is called in the results."""

    make: type[nn.Module] | None
    solver: ti.Picard | ti.Anderson | ti.Newton | None = None
    adjoint: ti.Implicit = CAREFUL
    literature: str = ""


WAYS = {
    "notebook, fixed point": Way(NotebookFixedPoint, literature="3.04 % on full MNIST, 10 epochs (the notebook)"),
    "Picard": Way(None, ti.Picard(atol=TOLERANCE, rtol=0.0, norm="two", check_every=4)),
    "Anderson": Way(None, ti.Anderson(atol=TOLERANCE, rtol=0.0, norm="two")),
    "Newton": Way(None, ti.Newton(linear_solver=ti.GMRES(), warmup=20, atol=TOLERANCE, rtol=0.0, norm="two")),
    "Newton, gradient of all samples": Way(
        None, ti.Newton(linear_solver=ti.GMRES(), atol=TOLERANCE, rtol=0.0, norm="two"), ti.Implicit()
    ),
    "explicit twin": Way(None),
}


class Twin(nn.Module):
    """`tanh(W x + x)`: the same parameters, nothing to solve."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, n)` to `(B, n)`."""
        return torch.tanh(self.linear(x) + x)


def classifier(way: Way) -> nn.Sequential:
    """The notebook's: 784 → 100, the layer, 100 → 10."""
    if way.make is not None:
        layer = way.make(FEATURES)
    elif way.solver is not None:
        layer = ti.nn.TanhEquilibrium(FEATURES, solver=way.solver, adjoint=way.adjoint, on_failure="ignore")
    else:
        layer = Twin()
    return nn.Sequential(nn.Flatten(), nn.Linear(784, FEATURES), layer, nn.Linear(FEATURES, 10))


def train(model: nn.Sequential, data: Digits, epochs: int, seed: int, label: str) -> dict[str, float]:
    """SGD as in the notebook: 0.1, and 0.01 in the second half; the test error and what it took."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    steps, notebook, meter = epochs * (len(data.train) // 100), 0, Meter()
    with ti.monitor(model) as log, progress(label, steps) as advance:
        for epoch in range(epochs):
            optimiser.param_groups[0]["lr"] = 0.1 if epoch < epochs / 2 else 0.01
            for images, labels in batches(data.train, 100, generator):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                meter.take(log)
                if isinstance(model[2], NotebookFixedPoint):
                    notebook += model[2].iterations
                advance(f"loss {loss.item():.3f}")
    cost = meter.seconds() | meter.solves() | ({"evaluations_forward": notebook / steps} if notebook else {})
    with torch.no_grad():
        wrong = sum(int((model(images).argmax(1) != labels).sum()) for images, labels in batches(data.test, 100))
    return {"test_error": 100 * wrong / len(data.test), **cost}


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps for the backward pass of one call, in bytes, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    del output
    return sum(sizes.values())


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The layer with this W."""
    with torch.no_grad():
        layer.linear.weight.copy_(weight)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return layer


def what_goes_wrong() -> dict[str, dict[str, float]]:
    """The three, in numbers."""
    torch.manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(FEATURES, FEATURES))[0]
    x = 0.1 * torch.randn(100, FEATURES)

    # 1. A slow contraction: the notebook takes, and keeps, every step.
    slow = 0.95 * orthogonal
    theirs = with_weight(NotebookFixedPoint(FEATURES), slow)
    ours = with_weight(ti.nn.TanhEquilibrium(FEATURES, solver=ti.Anderson(rtol=1e-5)), slow)
    memory = {
        "steps of the notebook": float(_iterations(theirs, x)),
        "kept by the notebook, bytes": float(kept_bytes(theirs, x.clone().requires_grad_())),
        "kept by the library, bytes": float(kept_bytes(ours, x.clone().requires_grad_())),
    }

    # 2. The same sample alone, and beside others that take longer.
    first = x[:1]
    easy, hard = torch.cat([first, 30 * x[1:]]), torch.cat([first, 0.01 * x[1:]])
    gap = (theirs(easy)[0] - theirs(hard)[0]).norm().item()
    ours.solver = ti.Picard(atol=1e-6, rtol=0.0, norm="two")
    our_gap = (ours(easy)[0] - ours(hard)[0]).norm().item()
    company = {"the notebook's answers differ by": gap, "the library's by": our_gap}

    # 3. No contraction: W of norm 4.
    large = 4.0 * orthogonal
    theirs = with_weight(NotebookFixedPoint(FEATURES), large)
    newton = with_weight(NotebookNewton(FEATURES), large)
    ours = with_weight(ti.nn.TanhEquilibrium(FEATURES, solver=ti.Picard(), on_failure="ignore"), large)
    with torch.no_grad():
        z, n = theirs(x), newton(x)
        off = (torch.tanh(z @ large.T + x) - z).norm(dim=1)
        plain = ours.solve(x)
        ours.solver = None
        strong = ours.solve(x)
    failure = {
        "notebook's fixed point: median residual of what it returns": off.median().item(),
        "notebook's Newton: share of samples set to zero": (n == 0).all(1).double().mean().item(),
        "Picard: share called converged": plain.converged.double().mean().item(),
        "Auto: share called converged": strong.converged.double().mean().item(),
        "Auto: largest residual among them": strong.residual[strong.converged].max().item()
        if bool(strong.converged.any())
        else float("nan"),
    }
    return {"memory": memory, "company": company, "failure": failure}


def _iterations(layer: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        layer(x)
    return layer.iterations  # pyright: ignore[reportReturnType]


@torch.no_grad()
def plot(model: nn.Sequential, images: Tensor, out: Path) -> None:
    """Residuals of the trained layer beside the steps of three solvers."""
    x = model[1](model[0](images))
    with figure(out, "tutorial", width=5) as axes:
        for name, solver in (("Picard", ti.Picard()), ("Anderson", ti.Anderson()), ("Newton", ti.Newton())):
            layer = ti.nn.TanhEquilibrium(FEATURES, solver=solver, on_failure="ignore")
            layer.load_state_dict(model[2].state_dict())
            trace = layer.solve(x, trace=True).trace
            assert trace is not None
            axes.semilogy(trace.nanmedian(1).values, label=name, marker=".")
        axes.set(xlabel="step", ylabel="residual, median of 100 digits", title="z = tanh(W z + x), trained")
        axes.legend()


EXPERIMENT = Experiment(
    name="tutorial",
    title="The tutorial's layer",
    metric="test_error",
    unit="%",
    more_is_better=False,
    ours="Anderson",
    twin="explicit twin",
    models={name: way.literature for name, way in WAYS.items()},
    literature="3.04 % on the full MNIST, 10 epochs",
    source="the notebook of Deep Implicit Layers, chapter 1 (Kolter, Duvenaud & Johnson 2020)",
    notes=(
        "the notebook stops at a norm of 1e-4 over the batch, the others at 1e-5 for each sample",
        "the literature's figure is of the full MNIST, a run on the 5,000 digits cannot be compared with it",
    ),
)


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options."""
    return options(argv, __doc__ or "", digits=True, smoke={"epochs": 2}, epochs=10)


def main(argv: Sequence[str] | None = None) -> None:
    """Show, train, write."""
    chosen = command_line(argv)
    shown = what_goes_wrong()
    for title, figures in shown.items():
        print(title)
        for name, value in figures.items():
            print(f"  {name}: {value:.3g}")
    data = load_digits(chosen.data_dir)
    print(data.describe())
    record = Record.open(EXPERIMENT, chosen, data=sizes(data))
    record.more = {"what_goes_wrong": shown}
    for seed in chosen.seeds:
        for name, way in WAYS.items():
            torch.manual_seed(seed)
            model = classifier(way)
            figures = train(model, data, chosen.epochs, seed, f"{name}, seed {seed}")
            record.add(name, seed, **figures, parameters=parameters(model))
            sane(chosen, "a test error below 40 %", figures["test_error"] < 40)
            if name == "Anderson":
                plot(model, data.test.batch(slice(0, 100))[0], chosen.out)
    errors = [
        record.models[name][0]["test_error"] for name in ("notebook, fixed point", "Picard", "Anderson", "Newton")
    ]
    sane(chosen, "four solvers of one equation within a point of each other", max(errors) - min(errors) < 1.0)


if __name__ == "__main__":
    main()
