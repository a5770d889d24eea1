"""What two processes compute: run by torchrun, leaves what it found in the folder that it is given.

The problems are also those of the tests themselves, which solve them in one process.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import torchimplicit as ti
from torchimplicit._spread import SpreadLayout

FEATURES = 6
COUNTS = (5, 3)
"""Samples of each process."""
SOLVERS: dict[str, ti.solvers.Method] = {
    "Picard": ti.Picard(rtol=1e-12),
    "Anderson": ti.Anderson(rtol=1e-12),
    "Broyden": ti.Broyden(rtol=1e-12),
    "Newton": ti.Newton(rtol=1e-12),
    "NewtonKrylov": ti.NewtonKrylov(rtol=1e-12),
    "Auto": ti.Auto(rtol=1e-12),
}
ADJOINT = ti.Implicit(rtol=1e-12)


class Cell(nn.Module):
    """`tanh(W z + x)` with `‖W‖ = 0.9`."""

    samplewise = True  # who is done leaves the batch, unless the processes solve together

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.mul_(0.9 / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Standardised(Cell):
    """`tanh((y − mean) / deviation)/2 + x/4` of `y = W z + x` over the samples of all processes, as SyncBatchNorm's."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.linear(z) + x
        sums = torch.stack((y.sum(0), y.square().sum(0), torch.full_like(y[0], len(y))))
        if dist.is_initialized():
            sums = all_reduce(sums)
        mean, square = sums[0] / sums[2], sums[1] / sums[2]
        return 0.5 * torch.tanh((y - mean) / (square - mean.square() + 0.1).sqrt()) + 0.25 * x


def problem(cell: type[Cell] = Cell, **options: Any) -> tuple[nn.Sequential, Tensor]:
    """The same model and inputs in every process; the first process's samples are far easier than the other's."""
    torch.manual_seed(1)
    layer = ti.nn.FixedPoint(cell(), adjoint=ADJOINT, **options)
    x = torch.randn(sum(COUNTS), FEATURES, dtype=torch.float64)
    x[: COUNTS[0]] *= 20.0
    return nn.Sequential(nn.Linear(FEATURES, FEATURES, dtype=torch.float64), layer), x


def loss_of(value: Tensor) -> Tensor:
    """Of some samples; that of all is the sum."""
    return (value**3).sum() + value.square().sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, on one process, whole."""
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in named.items()}


def train_step(model: nn.Module, solve: ti.nn.FixedPoint, x: Tensor) -> dict[str, Any]:
    """Forward and backward on this process's samples; what all processes' gradients add up to."""
    x = x.clone().requires_grad_()
    with ti.monitor(solve) as log:
        value = model(x)
    (dist.get_world_size() * loss_of(value)).backward()  # DDP and FSDP take the mean over the processes
    solution = log.solutions[0]
    return {
        "value": value.detach(),
        "x": x.grad / dist.get_world_size(),
        "gradients": gradients(model),
        "steps": solution.steps.tolist(),
        "status": solution.status.tolist(),
        "evaluations": (solution.evaluations, solution.adjoint.evaluations),
        "adjoint": solution.adjoint.status.tolist(),
    }


def data_parallel(own: slice, **options: Any) -> dict[str, Any]:
    model, x = problem(**options)
    return train_step(DistributedDataParallel(model), model[1], x[own])


def sharded(own: slice, what: str, **options: Any) -> dict[str, Any]:
    """FSDP2 of the model, the layer, or the cell."""
    model, x = problem(**options)
    for module in {"model": [], "layer": [model[1]], "cell": [model[1].cell]}[what]:
        fully_shard(module)
    fully_shard(model)
    return train_step(model, model[1], x[own])


def failed(own: slice) -> dict[str, Any]:
    """One sample of the second process is NaN, and has no gradient."""
    model, x = problem(on_failure="ignore", process_group="world")
    x[-1] = torch.nan
    solution = model[1].solve(x[own])
    loss_of(solution.value).backward()
    return {"status": solution.status.tolist(), "gradient": model[1].cell.linear.weight.grad}


def second_order(own: slice) -> Tensor:
    """The derivative of the squared gradient with respect to the inputs."""
    model, x = problem(process_group="world")
    x = x[own].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(model[1](x)), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def refusals(own: slice, rank: int) -> dict[str, str]:
    """What is said of uses that cannot be."""
    model, x = problem(process_group="world")
    layer, x, said = model[1], x[own], {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except (RuntimeError, ValueError, TypeError) as error:
            said[name] = str(error)

    attempt("torch.func", lambda: torch.func.grad(lambda x: layer(x).sum())(x))
    attempt("other features", lambda: layer(x[:, : 4 + rank]))
    whole = SpreadLayout.part
    SpreadLayout.part = lambda self, matrix: whole(self, matrix + rank * 1e-9)  # as another machine might round
    attempt("another state", lambda: layer(x))
    SpreadLayout.part = whole
    return said


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = slice(0, COUNTS[0]) if rank == 0 else slice(COUNTS[0], None)
    found: dict[str, Any] = {
        "ddp": {name: data_parallel(own, solver=solver) for name, solver in SOLVERS.items()},
        "fsdp": {what: sharded(own, what) for what in ("model", "layer")},
        "fsdp of the cell": {"cell": sharded(own, "cell", process_group="world")},
        "together": {name: data_parallel(own, solver=s, process_group="world") for name, s in SOLVERS.items()},
        "coupled": {
            name: data_parallel(own, cell=Standardised, solver=s, process_group=dist.group.WORLD, batch_dims=0)
            for name, s in SOLVERS.items()
        },
        "failed": failed(own),
        "second order": second_order(own),
        "refusals": refusals(own, rank),
    }
    torch.save(found, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
