"""Ten symbols, 200 blanks, and then the ten symbols again: `python -m examples.copy_memory`.

An equilibrium transformer remembers them (the task "copy memory"). The explicit twin, `--twin`, is the same block
applied four times with the same weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchimplicit as ti
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record
from examples.parity import Passes

FEATURES, SYMBOLS, COPIED = 16, 8, 10
BLANK, GO = 0, SYMBOLS + 1


class Copier(nn.Module):
    """`(B, T)` symbols in, scores `(B, T, 9)` out."""

    def __init__(self, length: int, twin: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 2, FEATURES)
        layer = ti.nn.EquilibriumTransformer(
            FEATURES,
            heads=1,
            span=length + 2 * COPIED,
            solver=ti.Picard(rtol=1e-3),
            adjoint=ti.Implicit(linear_solver=ti.Neumann(max_steps=500, slowest=0.999, patience=8), rtol=1e-2),
        )
        self.layer = Passes(layer, depth=4) if twin else layer
        self.read = nn.Linear(FEATURES, SYMBOLS + 1)

    def forward(self, symbols: Tensor, meter: Meter | None = None) -> Tensor:
        """The scores."""
        x = self.embed(symbols)
        solved = meter is not None and isinstance(self.layer, ti.nn.EquilibriumTransformer)
        z = meter.see(self.layer.solve(x)) if solved else self.layer(x)
        return 4 * self.read(z)  # z is of unit size, which bounds how sure the scores can be


def batch(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Ten symbols, `length` positions of which the last says "go", ten blanks; and what is to be said (Bai et al.)."""
    symbols = torch.randint(1, SYMBOLS + 1, (size, COPIED))
    blanks = torch.full((size, length - 1), BLANK)
    given = torch.cat([symbols, blanks, torch.full((size, 1), GO), torch.full((size, COPIED), BLANK)], dim=1)
    target = torch.cat([torch.full((size, length + COPIED), BLANK), symbols], dim=1)
    return given, target


def losses(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all positions, as the literature reports it, and over the ten that matter."""
    each = functional.cross_entropy(scores.mT, target, reduction="none")
    return each.mean(), each[:, -COPIED:].mean()


def train(model: Copier, steps: int, length: int, what: str, meter: Meter | None = None) -> list[float]:
    """Adam on fresh batches; returns the loss over all positions."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, steps, pct_start=0.1)
    history = []
    with progress(what, steps) as advance:
        for _ in range(steps):
            given, target = batch(8, length)
            over_all, of_copy = losses(model(given, meter), target)
            optimizer.zero_grad()
            (over_all + of_copy).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            history.append(over_all.item())
            advance(f"loss {over_all.item():.2e}")
    return history


TWIN = "four passes, weights tied"
EXPERIMENT = Experiment(
    name="copy_memory",
    title="Copy memory",
    metric="loss",
    more_is_better=False,
    ours="equilibrium transformer",
    twin=TWIN,
    models={"equilibrium transformer": "", TWIN: ""},
    bar=3.5e-6,
    literature="3.5e-6 at T = 400 with 14K parameters (TCN 2.7e-5, LSTM 0.05)",
    source="Bai, Kolter & Koltun 2019, table 1",
    notes=(
        "T = 200, half the literature's; 600 steps of batches of 8",
        "loss: the mean over all positions of 100 fresh sequences; loss_of_the_ten: over those that are copied",
    ),
)


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options."""
    return options(argv, __doc__ or "", twin=True, smoke={"steps": 60, "length": 10}, steps=600, length=200)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure on fresh sequences, and record it."""
    chosen = command_line(argv)
    record = Record.open(EXPERIMENT, chosen)
    name = TWIN if chosen.twin else "equilibrium transformer"
    histories = []
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        meter = Meter()
        model = Copier(chosen.length, chosen.twin)
        histories.append(train(model, chosen.steps, chosen.length, f"{name}, seed {seed}", meter))
        with torch.no_grad():
            given, target = batch(100, chosen.length)
            scores = model(given)
            over_all, of_copy = losses(scores, target)
            right = (scores.argmax(2)[:, -COPIED:] == target[:, -COPIED:]).float().mean()
        figures = {"loss": over_all.item(), "loss_of_the_ten": of_copy.item(), "accuracy": right.item()}
        record.add(name, seed, **figures, parameters=parameters(model), **meter.figures())
        # A guess that knows where the symbols are, and nothing of them, has log 8 = 2.08 there.
        sane(chosen, "a loss of the ten below 2", of_copy.item() < 2.0)
        sane(chosen, "all solves converged", chosen.twin or meter.solves()["converged"] == 1.0)
    if chosen.twin:
        return
    with figure(chosen.out, "copy_memory", width=7.0, height=3.2) as axes:
        for history in histories:
            axes.semilogy(history, lw=0.8)
        axes.axhline(1e-4, color="grey", ls=":")
        axes.set(xlabel="step", ylabel="loss over all positions")


if __name__ == "__main__":
    main()
