"""Bratu's equation Δu + λeᵘ = 0 as a layer: `python -m examples.bratu`.

A gradient through Newton–Krylov against finite differences, the fold in one dimension, and λ from noisy data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import torchimplicit as ti
from examples._meter import Meter
from examples._options import Options, options, sane
from examples._plot import figure
from examples._record import Experiment, Record

SOLVER = ti.NewtonKrylov(rtol=1e-12)


def equation(u: Tensor, lam: Tensor) -> Tensor:
    """`−h²(Δu + λeᵘ)` on a square of N × N inner points, u = 0 on the boundary; `(N, N)`."""
    h = 1 / (u.shape[-1] + 1)
    edged = torch.nn.functional.pad(u, (1, 1, 1, 1))
    around = edged[2:, 1:-1] + edged[:-2, 1:-1] + edged[1:-1, 2:] + edged[1:-1, :-2]
    return 4 * u - around - h**2 * lam * u.exp()


def solve(lam: Tensor, size: int, meter: Meter) -> Tensor:
    """The lower branch."""
    u0 = torch.zeros(size, size, dtype=torch.float64)
    return meter.see(ti.root(equation, u0, lam, solver=SOLVER))


def gradient_error(size: int, meter: Meter) -> float:
    """Of `d(mean u²)/dλ` against central differences, relative."""
    lam = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(solve(lam, size, meter).square().mean(), lam)
    with torch.no_grad():
        step = 1e-4
        near = [solve(lam + s * step, size, meter).square().mean() for s in (-2, -1, 1, 2)]
    exact = (near[0] - 8 * near[1] + 8 * near[2] - near[3]) / (12 * step)
    return abs(float((grad - exact) / exact))


def fold(points: int) -> float:
    """The largest λ with a solution in one dimension: along the branch λ is a function of `s = max u`; `dλ/ds = 0`."""
    h = 1 / (points + 1)

    def curve(state: Tensor, s: Tensor) -> Tensor:
        u, lam = state[:-1], state[-1:]
        edged = torch.nn.functional.pad(u, (1, 1))
        inner = 2 * u - edged[2:] - edged[:-2] - h**2 * lam * u.exp()
        return torch.cat([inner, (u[points // 2] - s)[None]])

    start = torch.ones(points + 1, dtype=torch.float64)

    def slope(s: Tensor) -> tuple[Tensor, Tensor]:
        s = s.detach().requires_grad_()
        lam = ti.root(curve, start, s, solver=ti.Newton()).value[-1]
        return lam.detach(), torch.autograd.grad(lam, s)[0]

    low, high = torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle)[1] > 0 else (low, middle)
    return float(slope(low)[0])


def estimate(size: int, seed: int, meter: Meter) -> tuple[float, int, list[float]]:
    """λ = 5 from u at all points with 1 % noise, by least squares: error, optimiser steps, losses.

    BFGS in one dimension is the secant method for the derivative. It comes from above, since u grows faster with λ,
    the larger λ is, and beyond 6.808 there is none: a first step from below would lead there.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        u = solve(torch.tensor(5.0, dtype=torch.float64), size, meter)
        seen = u + 0.01 * u.std() * torch.randn_like(u)
    before, lam = torch.tensor([6.5, 6.4], dtype=torch.float64)
    losses: list[float] = []
    slope = torch.tensor(0.0)
    for step in range(15):
        at = (before if step == 0 else lam).clone().requires_grad_()
        loss = (solve(at, size, meter) - seen).square().mean() / seen.square().mean()
        (new,) = torch.autograd.grad(loss, at)
        losses.append(float(loss.detach()))
        if step:
            before, lam = lam, lam - new * (lam - before) / (new - slope)
            if abs(lam - before) < 1e-8:
                break
        slope = new
    return abs(float(lam) - 5.0), len(losses), losses


EXPERIMENT = Experiment(
    name="bratu",
    title="Bratu's equation",
    metric="gradient_error",
    more_is_better=False,
    ours="Newton–Krylov",
    models={"Newton–Krylov": ""},
    bar=1e-6,
    literature="the fold in one dimension is at 3.5138; for the gradient 1e-6 is our own bar",
    source="from memory",
    notes=(
        "gradient_error: of d(mean u²)/dλ on a grid of 32 × 32 points against finite differences, relative",
        "fold: the largest λ with a solution, in one dimension with 199 points",
        "lambda_error: of the estimate of λ = 5 from data with 1 % noise",
        "no explicit twin: there is no equation-free model of one number to compare with",
    ),
)


def command_line(argv: Sequence[str] | None = None) -> Options:
    """The options."""
    return options(argv, __doc__ or "", smoke={"size": 12, "points": 49}, size=32, points=199)


def main(argv: Sequence[str] | None = None) -> None:
    """All three, and the record."""
    chosen = command_line(argv)
    record = Record.open(EXPERIMENT, chosen)
    histories = []
    at = fold(chosen.points)
    for seed in chosen.seeds:
        meter = Meter()
        error, steps, losses = estimate(chosen.size, seed, meter)
        histories.append(losses)
        wrong = gradient_error(chosen.size, meter)
        figures = {"gradient_error": wrong, "fold": at, "lambda_error": error, "optimiser_steps": steps}
        record.add("Newton–Krylov", seed, **figures, parameters=1, **meter.figures())
        sane(chosen, "a gradient within 1e-6 of differences", wrong < 1e-6)
        sane(chosen, "the fold at 3.514 within 1e-2, and λ = 5 within 1e-2", abs(at - 3.5138) < 1e-2 and error < 1e-2)
    with figure(chosen.out, "bratu", width=7.0, height=3.2, columns=2) as axes:
        for history in histories:
            axes[0].semilogy(history, "o-")
        axes[0].set(xlabel="optimiser step", ylabel="misfit")
        axes[1].imshow(solve(torch.tensor(5.0, dtype=torch.float64), chosen.size, Meter()))
        axes[1].set(title="u at λ = 5")


if __name__ == "__main__":
    main()
