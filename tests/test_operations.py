"""What must not become dearer unnoticed: operations of torch per step, and evaluations on a fixed problem.

Counts, never seconds: they are the same on every machine. The numbers are what the solvers take now; when one takes
less, lower it here.
"""

import pytest
import torch

import torchimplicit as ti
from torchimplicit.experiments.bench import operations
from torchimplicit.solvers import Method

OPERATIONS = {"picard": 4.5, "anderson": 22.5, "broyden": 17.5}
"""Per step, beside the cell's own."""
SOLVES: dict[str, tuple[Method, int]] = {
    "picard": (ti.Picard(rtol=1e-5), 51),
    "anderson": (ti.Anderson(rtol=1e-5), 45),
    "broyden": (ti.Broyden(rtol=1e-5), 44),
    "newton": (ti.Newton(rtol=1e-5), 10),
    "auto": (ti.Auto(rtol=1e-5), 45),
}
"""Each with the evaluations of its solve, Jacobian products included."""
PRODUCTS = 61
"""Of the backward pass."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_per_step(name: str) -> None:
    assert operations.ours(name, seed=0).total() <= OPERATIONS[name]


def test_steps_that_nobody_looks_at_cost_nothing_beside_the_cell() -> None:
    f, start = operations.slow_map(0)
    solver = ti.Picard(check_every=operations.LAST)

    def solve(steps: int) -> None:
        ti.fixed_point(f, start, solver=solver, batch_dims=1, max_steps=steps, on_failure="ignore")

    assert operations.operations_per_step(solve).total() == 0


def test_the_count_sees_views_and_leaves_out_the_map() -> None:
    f, start = operations.slow_map(0)

    def solve(steps: int) -> None:
        z = start
        for _ in range(steps):
            z = f(z).mT.mT + 1.0

    counts = operations.operations_per_step(solve)
    assert counts == {"aten.transpose.int": 2, "aten.add.Tensor": 1}


@pytest.mark.parametrize("name", SOLVES)
def test_evaluations_on_a_fixed_problem(name: str) -> None:
    """`z = tanh(W z + x)` with W of norm 0.8, in float64 to 1e-5."""
    solver, most = SOLVES[name]
    torch.manual_seed(0)
    layer = ti.nn.TanhEquilibrium(30, solver=solver, adjoint=ti.Implicit(rtol=1e-5)).double()
    with torch.no_grad():
        layer.linear.weight.copy_(0.8 * torch.linalg.qr(layer.linear.weight).Q)
    solution = layer.solve(0.1 * torch.randn(10, 30, dtype=torch.float64))
    solution.value.sum().backward()
    assert bool(solution.converged.all())
    assert solution.evaluations <= most
    assert (solution.adjoint.evaluations or 0) <= PRODUCTS
