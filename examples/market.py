"""A market's equilibrium as a layer, with tastes learned from prices: `python -m examples.market`.

The prices of an exchange economy clear its markets. Their derivatives come from the implicit function theorem, and the
mean tastes of the agents are learned from the prices of 64 markets, then used to predict those of 64 others. The
explicit twin is a perceptron from endowments to prices: it has to learn what a market is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import torchimplicit as ti
from examples._meter import Meter, parameters
from examples._options import Options, options, sane
from examples._plot import figure
from examples._progress import progress
from examples._record import Experiment, Record

GOODS, AGENTS, MARKETS = 5, 8, 64


def excess(log_price: Tensor, endowment: Tensor, taste: Tensor) -> Tensor:
    """Excess demand of every good but the last, whose price is 1, over the supply; `(B, goods − 1)`.

    Agents have CES utilities with elasticity of substitution 1/2 and tastes `(agents, goods)`. By Walras' law the last
    market clears when the others do.
    """
    price = torch.nn.functional.pad(log_price, (0, 1)).exp()
    wealth = torch.einsum("bg,bag->ba", price, endowment)
    weight = taste * price[:, None, :] ** 0.5
    demand = weight / weight.sum(-1, keepdim=True) * (wealth[..., None] / price[:, None, :])
    supply = endowment.sum(1)
    return ((demand.sum(1) - supply) / supply)[:, :-1]


def equilibrium(endowment: Tensor, taste: Tensor, meter: Meter) -> Tensor:
    """Log prices relative to the last good's, `(B, goods − 1)`."""
    start = endowment.new_zeros(len(endowment), GOODS - 1)
    return meter.see(ti.root(excess, start, endowment, taste, batch_dims=1))


def gradient_error(endowment: Tensor, taste: Tensor, meter: Meter) -> float:
    """Of the derivative of prices along a random change of endowments, against central differences, relative."""
    change, weight = torch.randn_like(endowment), torch.randn(MARKETS, GOODS - 1)
    endowment = endowment.clone().requires_grad_()
    value = (weight * equilibrium(endowment, taste, meter)).sum()
    (grad,) = torch.autograd.grad(value, endowment)
    with torch.no_grad():
        ends = [(weight * equilibrium(endowment + s * 1e-5 * change, taste, meter)).sum() for s in (1, -1)]
    exact = (ends[0] - ends[1]) / 2e-5
    return abs(float(((grad * change).sum() - exact) / exact))


def learn(guess: list[Tensor], predict, seen: Tensor, steps: int, rate: float, what: str) -> list[float]:
    """Adam on the mean squared error of `predict()`; the losses."""
    optimizer = torch.optim.Adam(guess, lr=rate)
    losses = []
    with progress(what, steps) as advance:
        for _ in range(steps):
            loss = (predict() - seen).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            advance(f"loss {loss.item():.1e}")
    return losses


def perceptron() -> nn.Module:
    """The explicit twin: `(B, agents, goods)` to log prices."""
    return nn.Sequential(nn.Flatten(), nn.Linear(AGENTS * GOODS, 32), nn.Tanh(), nn.Linear(32, GOODS - 1))


EXPERIMENT = Experiment(
    name="market",
    title="A market's equilibrium",
    metric="price_error",
    more_is_better=False,
    ours="equilibrium",
    twin="perceptron",
    models={"equilibrium": "", "perceptron": ""},
    literature="none",
    notes=(
        "price_error: of the log prices of 64 markets that were not seen, root mean square; price_spread: the error of "
        "predicting their mean",
        "gradient_error: of prices with respect to endowments, against central differences, relative",
    ),
)


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options."""
    return options(argv, __doc__ or "", smoke={"steps": 40}, steps=200)


def main(argv: Sequence[str] | None = None) -> None:
    """Learn the mean tastes of the agents from the prices of 64 markets, and predict those of 64 others."""
    chosen = command_line(argv)
    torch.set_default_dtype(torch.float64)
    record = Record.open(EXPERIMENT, chosen)
    histories = []
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        meter = Meter()
        taste = torch.softmax(torch.randn(AGENTS, GOODS), dim=1)
        endowment, others = 0.2 + torch.rand(2, MARKETS, AGENTS, GOODS)
        with torch.no_grad():
            seen, held_out = (equilibrium(e, taste, meter) for e in (endowment, others))
        guess = torch.zeros(AGENTS, GOODS, requires_grad=True)
        losses = learn(
            [guess],
            lambda e=endowment, g=guess, m=meter: equilibrium(e, g.softmax(1), m),
            seen,
            chosen.steps,
            0.1,
            f"market, seed {seed}",
        )
        with torch.no_grad():
            error = (equilibrium(others, guess.softmax(1), meter) - held_out).square().mean().sqrt().item()
        histories.append(losses)
        spread, wrong = held_out.std().item(), gradient_error(endowment, taste, meter)
        figures = {"price_error": error, "price_spread": spread, "gradient_error": wrong}
        record.add("equilibrium", seed, **figures, parameters=guess.numel(), **meter.figures())

        torch.manual_seed(seed)
        meter, twin = Meter(), perceptron()
        learn(list(twin.parameters()), lambda e=endowment, t=twin: t(e), seen, 5 * chosen.steps, 1e-2, f"twin, {seed}")
        with torch.no_grad():
            missed = (twin(others) - held_out).square().mean().sqrt().item()
        record.add("perceptron", seed, price_error=missed, parameters=parameters(twin), **meter.figures())
        sane(chosen, "a gradient within 1e-6 of differences", wrong < 1e-6)
        sane(chosen, "an error below half the spread of the prices", error < spread / 2)
    with figure(chosen.out, "market", width=4.5) as axes:
        for history in histories:
            axes.semilogy(history)
        axes.set(xlabel="step", ylabel="mean squared error of log prices")


if __name__ == "__main__":
    main()
