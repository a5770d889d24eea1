"""The most memory that a forward and backward pass holds at once, against the number of solver steps."""

# The peers are an extra of their own, and need not be there for the types to be checked.
# pyright: reportMissingImports=false

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import torchimplicit as ti
from torchimplicit.experiments.bench.notebook import NotebookFixedPoint
from torchimplicit.solvers import Solver

BATCH, N = 100, 100
CONTRACTION = 0.9
"""With a Jacobian that is a multiple of an orthogonal one no solver arrives within the steps that are counted, but the
adjoint system, solved to 1e-3, takes no dense matrix."""
OURS = ("picard", "anderson", "broyden")

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peak:
    """Bytes held at once beyond what was there before, most of all moments."""

    steps: int
    forward: int
    both: int


def make_layer(name: str, steps: int) -> Layer:
    """A layer `z = tanh(W z + x)` that takes exactly `steps` steps: one of `OURS`, "notebook" or "torchdeq"."""
    torch.manual_seed(0)
    if name == "notebook":
        layer: nn.Module = NotebookFixedPoint(N, 0.0, steps)
        linear = layer.linear
    else:
        solvers: dict[str, Solver[Any]] = {
            "picard": ti.Picard(atol=0.0, rtol=0.0),
            "anderson": ti.Anderson(atol=0.0, rtol=0.0),
            "broyden": ti.Broyden(atol=0.0, rtol=0.0),
        }
        equilibrium = ti.nn.TanhEquilibrium(
            N, solver=solvers.get(name), adjoint=ti.Implicit(rtol=1e-3), max_steps=steps, on_failure="ignore"
        )
        layer, linear = equilibrium, equilibrium.linear
    with torch.no_grad():
        linear.weight.copy_(CONTRACTION * torch.linalg.qr(linear.weight).Q)
    if name == "torchdeq":
        return _torchdeq(linear.double(), steps)
    return layer.double()


def _torchdeq(linear: nn.Linear, steps: int) -> Layer:
    """TorchDEQ's Anderson with its exact gradient, which it solves for in as many steps."""
    from torchdeq import get_deq

    deq = get_deq(
        f_solver="anderson", f_max_iter=steps, f_tol=0.0, b_solver="anderson", b_max_iter=steps, b_tol=0.0, ift=True
    )
    return lambda x: deq(lambda z: torch.tanh(linear(z) + x), torch.zeros_like(x))[0][-1]


def make_input() -> Tensor:
    """Small, so that the slopes are near 1 and the contraction near that of W."""
    generator = torch.Generator().manual_seed(1)
    return (0.001 * torch.randn(BATCH, N, generator=generator, dtype=torch.float64)).requires_grad_()


def measure(name: str, steps: int) -> Peak:
    """One pass of the contender, after one that warms up."""
    layer, x = make_layer(name, steps), make_input()
    layer(x).sum().backward()
    with torch.no_grad():
        for tensor in [x, *(p for p in getattr(layer, "parameters", list)())]:
            tensor.grad = None

    def forward() -> Tensor:
        return layer(x).sum()

    return Peak(steps, peak_bytes(forward), peak_bytes(lambda: forward().backward()))


def takes_all_steps(name: str, steps: int) -> bool:
    """Whether a layer of `OURS` takes exactly so many steps, for every sample."""
    layer = make_layer(name, steps)
    assert isinstance(layer, ti.nn.TanhEquilibrium)
    return bool((layer.solve(make_input()).steps == steps).all())


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that the allocator had out at once while `run` ran, of what it did not have out before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports each start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        run()
    profiler: Any = log.profiler  # its types are not declared
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def resident_bytes(name: str, steps: int) -> int | None:
    """Peak resident memory of a process that does nothing else; None where the system does not tell."""
    if not _STATUS.is_file():
        return None
    command = [sys.executable, "-m", __name__, name, str(steps)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


_STATUS = Path("/proc/self/status")


def _high_water() -> int:
    """`VmHWM` in bytes: what `getrusage` reports begins with what the parent process had."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_layer(sys.argv[1], int(sys.argv[2]))(make_input()).sum().backward()
    print(_high_water())
