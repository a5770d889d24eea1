"""The maps of the benchmark: accelerated solvers go down to what float32 can reach on every one of them."""

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from benchmarks.maps import maps


def _rms(t: Tensor) -> Tensor:
    return t.flatten(1).square().mean(dim=1).sqrt()


@pytest.mark.slow
def test_accelerated_solvers_reach_ten_rounding_units_on_every_map() -> None:
    tight = 10 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        for problem in maps():
            for solver in (ti.Anderson(rtol=tight, atol=0.0), ti.Broyden(rtol=tight, atol=0.0)):
                sol = ti.fixed_point(problem.fn, problem.z0, *problem.args, solver=solver, batch_dims=1)
                value = problem.fn(sol.value, *problem.args)
                assert sol.converged.all(), problem.name
                assert (_rms(value - sol.value) <= 1.1 * tight * _rms(value)).all(), problem.name
