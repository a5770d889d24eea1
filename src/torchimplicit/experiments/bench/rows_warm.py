"""What it saves to start from the last solution where inputs vary slowly: copies of a batch of digits, with noise."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments.bench.accuracy import give, make_exact_model, make_fast_model
from torchimplicit.experiments.bench.epochs import BATCH, FEATURES, make_batches, trained
from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.bench.timing import batch_residual
from torchimplicit.experiments.data import load_digits
from torchimplicit.experiments.recipe import make_solver
from torchimplicit.solvers import Method

COPIES, NOISE = 20, 0.01
"""Copies of a test batch; the norm of an image's noise relative to that of the image, drawn anew for each copy."""
TOLERANCE = 1e-4
EPOCHS = 3
"""Of training behind the trained weights."""

STARTS: dict[str, Callable[[], ti.nn.Previous | None]] = {
    "cold": lambda: None,
    "previous solution": lambda: ti.nn.Previous(corrections=0),
    "previous": ti.nn.Previous,
}


@dataclass(frozen=True)
class Pass:
    """The solves of all copies but the first, which is cold in any case; means over the copies.

    `steps` is the mean of the samples, `longest` that of the sample which takes longest; `residual` is the largest.
    """

    steps: float
    longest: float
    evaluations: float
    seconds: float
    residual: float


def make_copies(images: Tensor, seed: int) -> list[Tensor]:
    """Noisy copies of images `(B, 28, 28)`."""
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for _ in range(COPIES):
        noise = torch.randn(images.shape, generator=generator)
        size = torch.linalg.vector_norm(images, dim=(1, 2), keepdim=True)
        copies.append(images + noise * (NOISE * size / torch.linalg.vector_norm(noise, dim=(1, 2), keepdim=True)))
    return copies


@torch.no_grad()
def solve_copies(model: nn.Sequential, copies: list[Tensor], solver: Method, init: ti.nn.Previous | None) -> Pass:
    """Solve the model's layer for each copy in turn."""
    exact = model[2]
    assert isinstance(exact, ti.nn.TanhEquilibrium)
    layer = ti.nn.TanhEquilibrium(FEATURES, solver=solver, init=init, on_failure="ignore")
    layer.linear.weight.copy_(exact.linear.weight)
    inputs = [model[1](model[0](images)) for images in copies]
    layer.solve(inputs[0])
    began = time.perf_counter()
    found = [layer.solve(x) for x in inputs[1:]]
    seconds = time.perf_counter() - began
    residuals = [batch_residual(layer.linear.weight, x, s.value) for x, s in zip(inputs[1:], found, strict=True)]
    return Pass(
        steps=mean(float(s.steps.double().mean()) for s in found),
        longest=mean(float(s.steps.max()) for s in found),
        evaluations=mean(s.evaluations for s in found),
        seconds=seconds / len(found),
        residual=max(residuals),
    )


def measure(settings: Settings) -> Measurement:
    """Evaluations of the cell, warm against cold, of the recipe's layer with the weights for which that is worse.

    Evaluations count all: the corrections, and the Jacobians behind them. The first copy is left out.
    """
    digits = load_digits(settings.data_dir)
    images, _ = digits.test.batch(slice(0, BATCH))
    torch.manual_seed(settings.seed)
    model = make_fast_model()
    few = 20 if settings.quick else None
    epochs = [make_batches(digits, settings.seed + epoch, batches=few) for epoch in range(EPOCHS)]
    weights = {"initial": trained(model, []), "trained": trained(model, epochs)}
    recipe = make_solver("picard", TOLERANCE, BATCH)
    passes: dict[str, dict[str, list[Pass]]] = {}
    for moment, start in weights.items():
        exact = give(make_exact_model(), start)
        passes[moment] = {name: [] for name in STARTS}
        for repeat in range(settings.repeats):
            copies = make_copies(images, settings.seed + repeat)
            for name, init in STARTS.items():
                passes[moment][name].append(solve_copies(exact, copies, recipe, init()))
    ratios = {moment: _ratios(runs, "previous") for moment, runs in passes.items()}
    worst = max(ratios, key=lambda moment: median(ratios[moment]))
    return Measurement(
        value=median(ratios[worst]),
        low=min(ratios[worst]),
        high=max(ratios[worst]),
        runs=settings.repeats,
        ours=median(one.evaluations for one in passes[worst]["previous"]),
        theirs=median(one.evaluations for one in passes[worst]["cold"]),
        verified=all(one.residual <= TOLERANCE for runs in passes.values() for r in runs.values() for one in r),
        evidence={
            "tolerance": TOLERANCE,
            "noise": NOISE,
            "copies": COPIES,
            "worst": worst,
            **{moment: _evidence(runs) for moment, runs in passes.items()},
            "other solvers, trained": _others(give(make_exact_model(), weights["trained"]), images, settings.seed),
        },
    )


def _ratios(runs: dict[str, list[Pass]], name: str) -> list[float]:
    return [warm.evaluations / cold.evaluations for warm, cold in zip(runs[name], runs["cold"], strict=True)]


def _evidence(runs: dict[str, list[Pass]]) -> dict[str, Any]:
    fields = ("steps", "longest", "evaluations", "seconds", "residual")
    return {name: {f: median(getattr(one, f) for one in found) for f in fields} for name, found in runs.items()}


def _others(model: nn.Sequential, images: Tensor, seed: int) -> dict[str, Any]:
    """Evaluations cold and warm of other solvers at the same tolerance."""
    copies = make_copies(images, seed)
    solvers: dict[str, Method] = {name: make_solver(name, TOLERANCE, BATCH) for name in ("anderson", "newton")}
    solvers["auto"] = ti.Auto(atol=TOLERANCE / BATCH**0.5, rtol=0.0, norm="two")
    return {
        name: {start: solve_copies(model, copies, solver, init()).evaluations for start, init in STARTS.items()}
        for name, solver in solvers.items()
    }


ROWS = (
    Row(
        "warm-start",
        "evaluations from the previous solution against from zero, inputs that vary by 1 %",
        0.2,
        measure,
        unit="ratio of evaluations",
    ),
)
