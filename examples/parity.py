"""Parity of a bit string, learned at length 32 and asked at length 128: an equilibrium transformer keeps a state.

python examples/parity.py
"""

import torch
from _record import Meter, figure, options, parameters, progress, record
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti

FEATURES, SPAN = 16, 3


class Tagger(nn.Module):
    """Two symbols in, two scores out at every position; between them a layer `(B, T, d) -> (B, T, d)`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, FEATURES)
        self.layer = layer
        self.read = nn.Linear(FEATURES, 2)

    def forward(self, bits: Tensor, meter: Meter | None = None) -> Tensor:
        """`(B, T)` to `(B, T, 2)`."""
        x = self.embed(bits)
        z = self.layer(x) if meter is None else meter.see(self.layer.solve(x))
        return self.read(z)


class OnePass(nn.Module):
    """The explicit twin: the same block, applied as often as a transformer has layers, weights tied."""

    def __init__(self, layer: ti.nn.EquilibriumTransformer, depth: int) -> None:
        super().__init__()
        self.cell, self.depth = layer.cell, depth

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, d)` to `(B, T, d)`."""
        z = torch.zeros_like(x)
        for _ in range(self.depth):
            z = self.cell(z, x)
        return z


def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Random bits, and the parity of each prefix."""
    bits = torch.randint(2, (size, length))
    return bits, bits.cumsum(1) % 2


def train(model: Tagger, steps: int, length: int, what: str, meter: Meter | None = None) -> list[float]:
    """Adam on fresh batches whose lengths grow to `length` over the first two thirds of the steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps, pct_start=0.1)
    losses = []
    with progress(what, steps) as advance:
        for step in range(steps):
            bits, parity = batch(32, min(length, 2 + 3 * length * step // (2 * steps)))
            loss = functional.cross_entropy(model(bits, meter).flatten(0, 1), parity.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance(f"loss {loss.item():.4f}")
    return losses


@torch.no_grad()
def accuracy(model: Tagger, length: int) -> float:
    """Of the parity of the whole string, on 500 of them; an equilibrium is found token by token."""
    bits, parity = batch(500, length)
    x = model.embed(bits)
    layer = model.layer
    z = layer.by_token(x).value if isinstance(layer, ti.nn.EquilibriumTransformer) else layer(x)
    return (model.read(z[:, -1]).argmax(1) == parity[:, -1]).float().mean().item()


def main() -> None:
    """Train, ask at twice and four times the length, and record it."""
    chosen = options("parity", steps=300, length=32)
    runs = []
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        meter = Meter()
        layer = ti.nn.EquilibriumTransformer(FEATURES, heads=2, span=SPAN, solver=ti.Picard(rtol=1e-4))
        with torch.no_grad():
            layer.cell.bias[:, 0] = 3.0  # begin by looking at the nearest position
        model = Tagger(layer)
        losses = train(model, chosen.steps, chosen.length, f"equilibrium, seed {seed}", meter)
        run = {"seed": seed, "parameters": parameters(model), "loss": losses[-1], **meter.figures()}
        run |= {f"accuracy_{n}": accuracy(model, n) for n in (32, 64, 128, 256)}
        torch.manual_seed(seed)
        block = ti.nn.EquilibriumTransformer(FEATURES, heads=2, span=SPAN)
        with torch.no_grad():
            block.cell.bias[:, 0] = 3.0
        twin = Tagger(OnePass(block, depth=4))
        run["twin_loss"] = train(twin, chosen.steps, chosen.length, f"4 passes, seed {seed}")[-1]
        run |= {f"twin_accuracy_{n}": accuracy(twin, n) for n in (32, 128)}
        runs.append(run)
        print(run, flush=True)
        with figure("parity") as axes:
            lengths = (32, 64, 128, 256)
            for run in runs:
                axes.plot(lengths, [run[f"accuracy_{n}"] for n in lengths], "o-", color="C0")
                axes.plot((32, 128), [run["twin_accuracy_32"], run["twin_accuracy_128"]], "s--", color="C1")
            axes.set(xlabel="length (trained at 32)", ylabel="accuracy of the last position", ylim=(0.4, 1.02))
        record(
            "parity",
            what="parity of 128 bits, trained at 32",
            metric="accuracy_128",
            runs=runs,
            literature="98.1 % (fixed-point reasoning model, trained at 32)",
            source="research/frontier.md, table 5, row 11 (second-hand)",
            note="Every prefix's parity is a target; lengths grow from 2 to 32. The twin: the same block four times. "
            "Without a bias at the beginning accuracies were 0.952, 0.480 and 1.000 (seeds 0 to 2): one failed.",
        )


if __name__ == "__main__":
    main()
