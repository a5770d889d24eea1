"""Certified accuracy on MNIST: no attack of that size can change the answer, by the layer's Lipschitz bound.

    python -m examples.certified

A `LipschitzBounded` equilibrium maps x to y with `‖y(x) − y(x')‖₂ ≤ L ‖x − x'‖₂`, for whatever parameters. The
difference of two logits then changes by at most `√2 L ‖x − x'‖₂`: where the largest logit is ahead by more than
`√2 L r`, no x' within r of x is classified otherwise. A projected gradient attack, with exact gradients through the
equilibrium, shows how much of the rest can really be broken.
"""

import argparse
import time

import torch
from rich.progress import track
from torch import Tensor, nn

import torchimplicit as ti
from examples import _mono as common

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
TEMPERATURE = 0.125
SETTINGS = {"features": 64, "lipschitz": 1.0, "epochs": 6, "batch": 128, "rate": 5e-3, "temperature": TEMPERATURE}
LITERATURE = (
    "no figure for this set-up was found; the bound of an unrolled monDEQ is 1e5 to 1e13 where the layer's own is "
    "about 10 (Pabbaraju, Winston & Kolter, ICLR 2021, §5.1)"
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


def train(model: nn.Module, data: common.Digits) -> list[float]:
    """The losses of the epochs; the temperature makes the largest logit want to be far ahead."""
    optimiser = torch.optim.Adam(model.parameters(), lr=SETTINGS["rate"])
    count = -(-len(data.train) // SETTINGS["batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, SETTINGS["rate"], total_steps=SETTINGS["epochs"] * count, pct_start=0.25
    )
    losses = []
    for epoch in range(SETTINGS["epochs"]):
        total = 0.0
        for index in track(torch.randperm(len(data.train)).split(SETTINGS["batch"]), f"epoch {epoch + 1}", count):
            x, labels = data.train.batch(index)
            loss = nn.functional.cross_entropy(model(x) / TEMPERATURE, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(x)
        losses.append(total / len(data.train))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}", flush=True)
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


def main() -> None:
    """Train, certify, attack, record, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--attacked", type=int, default=500, help="test digits to attack")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = common.digits()
    print(data.describe())
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        begun, model = time.perf_counter(), Bounded()
        losses = train(model, data)
        wall = time.perf_counter() - begun
        # An error of the solve is an error of the lead: here it is made far smaller than a radius.
        model.layer.solver = ti.PeacemanRachford(rtol=1e-5)
        certificate = model.layer.certificate()
        print(certificate)
        assert certificate.lipschitz is not None
        x, labels = data.test.batch(slice(None))
        with torch.no_grad():
            solution = model.layer.solve(x.flatten(1))
            lead = ahead(model.layer.readout(solution.value), labels)
        radius = torch.where(solution.converged, lead, -torch.inf) / (2**0.5 * certificate.lipschitz)
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
        run = {
            "radii": RADII,
            "certified": certified,
            "attacked": attacked,
            "accuracy": certified[0],
            "converged": float(solution.converged.float().mean()),
            "losses": losses,
            "parameters": common.parameters(model),
            "wall_s": wall,
            "peak_memory_bytes": common.peak_memory(),
            "settings": SETTINGS,
            "data": f"{len(data.train)} + {len(data.test)}",
        }
        facts = {"title": "certified accuracy on MNIST by the Lipschitz bound", "literature": LITERATURE}
        common.record("certified", f"seed {seed}", run, facts)
        common.plot("certified", lambda axes, c=certified, a=attacked: draw(axes, c, a))


def draw(axes, certified: list[float], attacked: list[float]) -> None:
    """Two curves over the radius."""
    axes.plot(RADII, attacked, marker="o", label="left by the attack")
    axes.plot(RADII, certified, marker="s", label="certified")
    axes.set(xlabel="radius, two-norm of pixels in [0, 1]", ylabel="accuracy", ylim=(0, 1))
    axes.legend()


if __name__ == "__main__":
    main()
