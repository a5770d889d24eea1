"""What a first-order backward pass costs beside its vector-Jacobian products, at n = 100 and batch 100, one thread.

The bar: `(adjoint steps + 2)` products of the cell plus 15 %. A product is `torch.autograd.grad(cell(z, x), inputs, u)`
with the graph retained: with respect to everything that the cell reads, and (less) to z alone. Each repeat times the
backward pass and the products in turn.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import torchimplicit as ti
from benchmarks.record import RESULTS, circumstances, write

BOUND = 1.15
N, BATCH = 100, 100


def measure(repeats: int, contraction: float) -> dict[str, float]:
    """Medians over the repeats: seconds, steps, and the ratios to the products."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, N, generator=generator).mul_(contraction / N**0.5).requires_grad_()
    x = torch.randn(BATCH, N, generator=generator).requires_grad_()

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(x, z, weight.T))

    z = torch.randn(BATCH, N, generator=generator).requires_grad_()
    out = cell(z, x)
    rows = []
    for _ in range(repeats + 3):
        v = torch.randn(BATCH, N, generator=generator)
        solution = ti.fixed_point(cell, torch.zeros(BATCH, N), x, batch_dims=1)
        began = time.perf_counter()
        solution.value.backward(v)
        seconds = time.perf_counter() - began
        full, partial = (_product(out, inputs, v) for inputs in ((z, weight, x), (z,)))
        assert solution.adjoint.steps is not None
        steps = int(solution.adjoint.steps.max())
        rows.append((seconds, steps, full, partial, seconds / ((steps + 2) * full), seconds / ((steps + 2) * partial)))
    names = ("seconds", "steps", "product", "product_in_z", "ratio", "ratio_in_z")
    return {name: median(column) for name, column in zip(names, zip(*rows[3:], strict=True), strict=True)}


def _product(out: Tensor, inputs: Sequence[Tensor], v: Tensor, count: int = 30) -> float:
    began = time.perf_counter()
    for _ in range(count):
        torch.autograd.grad(out, inputs, v, retain_graph=True)
    return (time.perf_counter() - began) / count


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write; the status is 1 when the bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adjoint_cost", description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=40, help="backward passes timed")
    parser.add_argument("--out", type=Path, default=RESULTS / "adjoint-cost.json", help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result, good = {}, True
    for contraction in (0.5, 0.7, 0.9):
        row = result[f"{contraction:g}"] = measure(options.repeats, contraction)
        good = good and row["ratio"] <= BOUND
        print(
            f"contraction {contraction:g}: backward {1e3 * row['seconds']:.2f} ms, {row['steps']:.0f} steps, "
            f"{row['ratio']:.2f} of (steps + 2) products ({row['ratio_in_z']:.2f} of products in z alone)"
        )
    write(options.out, {**circumstances("benchmarks.adjoint_cost", arguments), "bound": BOUND, "rows": result})
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
