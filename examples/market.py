"""A market's equilibrium as a layer: prices of an exchange economy, their derivatives, and tastes learned from prices.

python examples/market.py
"""

import torch
from _record import Meter, figure, options, progress, record
from torch import Tensor

import torchimplicit as ti

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


def main() -> None:
    """Learn the mean tastes of the agents from the prices of 64 markets, and predict those of 64 others."""
    chosen = options("market equilibrium", steps=200)
    torch.set_default_dtype(torch.float64)
    runs, histories = [], []
    for seed in chosen.seeds:
        torch.manual_seed(seed)
        meter = Meter()
        taste = torch.softmax(torch.randn(AGENTS, GOODS), dim=1)
        endowment, others = 0.2 + torch.rand(2, MARKETS, AGENTS, GOODS)
        with torch.no_grad():
            seen, held_out = (equilibrium(e, taste, meter) for e in (endowment, others))
        guess = torch.zeros(AGENTS, GOODS, requires_grad=True)
        optimizer = torch.optim.Adam([guess], lr=0.1)
        losses = []
        with progress(f"market, seed {seed}", chosen.steps) as advance:
            for _ in range(chosen.steps):
                loss = (equilibrium(endowment, guess.softmax(1), meter) - seen).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                advance(f"loss {loss.item():.1e}")
        with torch.no_grad():
            error = (equilibrium(others, guess.softmax(1), meter) - held_out).square().mean().sqrt()
            naive = held_out.std()
        histories.append(losses)
        runs.append(
            {
                "seed": seed,
                "price_error": error.item(),
                "price_spread": naive.item(),
                "gradient_error": gradient_error(endowment, taste, meter),
                "parameters": guess.numel(),
                **meter.figures(),
            }
        )
        print(runs[-1], flush=True)
    with figure("market", width=4.5) as axes:
        for history in histories:
            axes.semilogy(history)
        axes.set(xlabel="step", ylabel="mean squared error of log prices")
    record(
        "market",
        what="log prices of 64 markets that were not seen, root mean square error",
        metric="price_error",
        runs=runs,
        literature="none; price_spread is the error of predicting the mean",
        source="",
        note="gradient_error: of prices with respect to endowments, against central differences, relative.",
    )


if __name__ == "__main__":
    main()
