"""Certified accuracy on MNIST: no attack of that size can change the answer, by the layer's Lipschitz bound.

    python -m examples.certified

A `LipschitzBounded` equilibrium maps x to y with `‖y(x) − y(x')‖₂ ≤ L ‖x − x'‖₂`, for whatever parameters. The
difference of two logits then changes by at most `√2 L ‖x − x'‖₂`: where the largest logit is ahead by more than
`√2 L r`, no x' within r of x is classified otherwise. A projected gradient attack, with exact gradients through the
equilibrium, shows how much of the rest can really be broken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchimplicit as ti
from examples._digits import batches, sizes
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record
from torchimplicit.experiments.data import Split, load_digits

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
TEMPERATURE = 0.125
SETTINGS = {"features": 64, "lipschitz": 1.0, "epochs": 6, "batch": 128, "rate": 5e-3, "temperature": TEMPERATURE}
OURS, TWIN = "Lipschitz-bounded equilibrium", "explicit twin, spectral norms"
EXPERIMENT = Experiment(
    name="certified",
    title="Certified accuracy on MNIST by the Lipschitz bound",
    metric="accuracy",
    unit="fraction",
    ours=OURS,
    twin=TWIN,
    models={OURS: "", TWIN: ""},
    literature=(
        "no figure for this set-up was found; the bound of an unrolled monDEQ is 1e5 to 1e13 where the layer's own is "
        "about 10"
    ),
    source="Pabbaraju, Winston & Kolter, ICLR 2021, §5.1",
    notes=(
        "certified and attacked: the fraction of the test digits that is certified, and that a projected gradient "
        "attack on 500 of them leaves, for each of the radii",
        "evaluations and converged: of the solve of the test digits, at a tolerance of 1e-5",
    ),
)


class Bounded(nn.Module):
    """Pixels in [0, 1] to logits; the whole map has Lipschitz constant 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ti.nn.LipschitzBounded(
            784,
            SETTINGS["features"],
            10,
            lipschitz=SETTINGS["lipschitz"],
            solver=ti.PeacemanRachford(rtol=1e-3),
            adjoint=ti.Implicit(linear_solver=ti.Splitting(), rtol=1e-2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 28, 28)` to logits `(B, 10)`."""
        return self.layer(x.flatten(1))


class Explicit(nn.Sequential):
    """The twin: two more layers in the place of the equilibrium, each map of spectral norm 1, by power iteration."""

    def __init__(self) -> None:
        n, layers = SETTINGS["features"], []
        for inputs, outputs in ((784, n), (n, n), (n, n), (n, 10)):
            layers += [parametrizations.spectral_norm(nn.Linear(inputs, outputs), n_power_iterations=2), nn.ReLU()]
        super().__init__(nn.Flatten(), *layers[:-1])

    def bound(self) -> float:
        """The product of the norms themselves, which power iteration estimates from below."""
        weights = [layer.weight.detach() for layer in self if isinstance(layer, nn.Linear)]
        return float(torch.stack([torch.linalg.matrix_norm(w.double(), 2) for w in weights]).prod())


def train(model: nn.Module, data: Split, what: str, epochs: int) -> list[float]:
    """The losses of the epochs; the temperature makes the largest logit want to be far ahead."""
    optimiser = torch.optim.Adam(model.parameters(), lr=SETTINGS["rate"])
    steps = epochs * -(-len(data) // SETTINGS["batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, SETTINGS["rate"], total_steps=steps, pct_start=0.25)
    losses = []
    with progress(what, steps) as advance:
        for _ in range(epochs):
            total = 0.0
            for x, labels in batches(data, SETTINGS["batch"], torch.default_generator, odd=True):
                loss = nn.functional.cross_entropy(model(x) / TEMPERATURE, labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                total += loss.item() * len(x)
                advance(f"loss {loss.item():.4f}")
            losses.append(total / len(data))
    return losses


def ahead(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the right logit is above the largest other, `(B,)`."""
    right = logits.gather(1, labels[:, None])[:, 0]
    return right - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def attack(model: nn.Module, x: Tensor, labels: Tensor, radius: float, steps: int = 15) -> Tensor:
    """Images within `radius` of x in the two-norm, moved by projected gradient descent on the lead."""
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (grad,) = torch.autograd.grad(ahead(model(moved), labels).sum(), moved)
        size = grad.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
        away = moved.detach() - (2.5 * radius / steps) * grad / size - x
        length = away.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
        moved = (x + away * (radius / length).clamp_max(1.0)).clamp(0.0, 1.0)
    return moved.detach()


@torch.no_grad()
def certify(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The radius within which each answer stays right, `(B,)`, −inf where it is not or was not solved for."""
    if isinstance(model, Explicit):
        return ahead(model(x), labels) / (2**0.5 * model.bound()), {}
    # An error of the solve is an error of the lead: here it is made far smaller than a radius.
    model.layer.solver = ti.PeacemanRachford(rtol=1e-5)
    certificate = model.layer.certificate()
    print(certificate)
    assert certificate.lipschitz is not None
    meter, solution = Meter(), model.layer.solve(x.flatten(1))
    lead = ahead(model.layer.readout(meter.see(solution)), labels)
    solves = meter.solves()
    solves.pop("evaluations_backward")
    return torch.where(solution.converged, lead, -torch.inf) / (2**0.5 * certificate.lipschitz), solves


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options."""
    smoke = {"epochs": 1, "attacked": 20}
    chosen = options(argv, __doc__ or "", twin=True, digits=True, smoke=smoke, epochs=SETTINGS["epochs"], attacked=500)
    chosen.settings = SETTINGS | chosen.settings
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Train, certify, attack, record, plot."""
    chosen = command_line(argv)
    data = load_digits(chosen.data_dir)
    print(data.describe())
    record = Record.open(EXPERIMENT, chosen, data=sizes(data))
    name = TWIN if chosen.twin else OURS
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        meter, model = Meter(), Explicit() if chosen.twin else Bounded()
        losses = train(model, data.train, f"{name}, seed {seed}", chosen.epochs)
        seconds = meter.seconds()
        model.eval()
        x, labels = data.test.batch(slice(None))
        radius, solves = certify(model, x, labels)
        certified = [float((radius > r).float().mean()) for r in RADII]
        some, answers = x[: chosen.attacked], labels[: chosen.attacked]
        attacked = []
        for r in RADII:
            with torch.no_grad() if r == 0.0 else torch.enable_grad():
                left = ahead(model(attack(model, some, answers, r) if r else some), answers) > 0
            attacked.append(float(left.float().mean()))
            broken = (radius[: chosen.attacked] > r) & ~left
            assert not bool(broken.any()), f"an attack of size {r} broke {int(broken.sum())} certified digits"
        for r, c, a in zip(RADII, certified, attacked, strict=True):
            print(f"radius {r:4.2f}: certified {c:.2%}, attack leaves {a:.2%} of {chosen.attacked}")
        curves = {"radii": list(RADII), "certified": certified, "attacked": attacked, "losses": losses}
        figures = {"accuracy": certified[0], "certified_at_0.5": certified[2], "parameters": parameters(model)}
        record.add(name, seed, **figures, **solves, **seconds, **curves)
        sane(chosen, "an accuracy above 80 %", certified[0] > 0.8)
        sane(chosen, "a third of the digits certified within 0.25", certified[1] > 1 / 3)
        sane(chosen, "every test sample converged", solves.get("converged", 1.0) == 1.0)
    if chosen.twin:
        return
    with figure(chosen.out, "certified") as axes:
        axes.plot(RADII, attacked, marker="o", label="left by the attack")
        axes.plot(RADII, certified, marker="s", label="certified")
        axes.set(xlabel="radius, two-norm of pixels in [0, 1]", ylabel="accuracy", ylim=(0, 1))
        axes.legend()


if __name__ == "__main__":
    main()
