"""Memory kept for the backward pass, at 10 and at 200 solver steps: ours, and the notebook's loop for contrast.

Two counts, since the first has a blind spot. `saved` is what autograd keeps, seen through
`torch.autograd.graph.saved_tensors_hooks`; a tensor put on a Python object would escape it. `held` is what the
allocator has not got back after the forward pass, which nothing escapes.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import torchimplicit as ti
from benchmarks.record import RESULTS, circumstances, write
from torchimplicit.experiments.bench.notebook import NotebookFixedPoint

STEPS = (10, 200)
FEATURES = 16
BATCH = 32


class NeverThere(nn.Module):
    """The cell `z -> exp(W z + x)`, which has no root: a Newton step lowers `W z + x` by exactly 1, for ever."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Evaluate the residual."""
        return torch.exp(self.linear(z) + x)


@dataclass(frozen=True)
class Footprint:
    """One forward pass: the steps it took and the bytes it left behind for the backward pass."""

    layer: str
    steps: int
    saved: int
    held: int


class _Saved:
    """One thing that autograd saved; it lives as long as the graph that needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Count the bytes of the distinct storages that autograd has saved and still keeps when `forward` has returned."""
    kept: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        # Detached, since an output saved by its own node would otherwise hold itself.
        saved = _Saved(tensor.detach())
        kept.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = forward()
    assert output.requires_grad
    storages = [saved.tensor.untyped_storage() for saved in kept]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_bytes(forward: Callable[[], Tensor]) -> int:
    """Count the bytes allocated while `forward` runs and not given back as long as its output lives."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        output = forward()
    assert output.requires_grad
    # `log.key_averages()` sums the same events, but builds a tree of all operations first: 20 times slower.
    profiler: Any = log.profiler  # its types are not declared
    events = profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def make_layer(name: str, steps: int) -> nn.Module:
    """Build the layer called `name`, which will take `steps` steps on every sample: no residual is ever below zero.

    With an orthogonal `W` and small inputs `z = tanh(W z + x)` is a contraction only barely, so that neither Picard nor
    Anderson arrives. Newton does within a few steps, so it is given an equation without a root.
    """
    if name == "newton":
        cell = NeverThere(FEATURES)
        nn.init.orthogonal_(cell.linear.weight)
        return ti.nn.Root(cell, solver=ti.Newton(rtol=0.0, atol=0.0), max_steps=steps, on_failure="ignore")
    if name == "notebook fixed point":
        layer = NotebookFixedPoint(FEATURES, 0.0, steps)
    else:
        solver = {"picard": ti.Picard, "anderson": ti.Anderson}[name](rtol=0.0, atol=0.0)
        layer = ti.nn.TanhEquilibrium(FEATURES, solver=solver, max_steps=steps, on_failure="ignore")
    nn.init.orthogonal_(layer.linear.weight)
    return layer


def steps_taken(layer: nn.Module, x: Tensor) -> int:
    """Count the steps of a forward pass, those of the sample with the fewest."""
    if isinstance(layer, NotebookFixedPoint):
        layer(x)
        return layer.iterations
    with ti.monitor(layer) as log:
        layer(x)
    return int(log.records[0].solution.steps.min())


LAYERS = ("notebook fixed point", "picard", "anderson", "newton")


def footprint(name: str, steps: int) -> Footprint:
    """Measure one forward pass of the layer `name` in float64."""
    torch.manual_seed(0)
    layer = make_layer(name, steps).double()
    x = 0.01 * torch.randn(BATCH, FEATURES, dtype=torch.float64)
    taken = steps_taken(layer, x)  # also makes whatever is made once
    return Footprint(name, taken, saved_bytes(lambda: layer(x)), held_bytes(lambda: layer(x)))


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table, write the figures; the status is 1 if a layer of ours needs more for more steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json", help="where the figures go")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {name: [footprint(name, steps) for steps in STEPS] for name in LAYERS}
    table = Table(title=f"bytes kept for the backward pass, {BATCH} samples of {FEATURES} features, float64")
    for heading in ("layer", "steps", "saved by autograd", "held by the allocator"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for rows in results.values():
        for row in rows:
            table.add_row(row.layer, str(row.steps), f"{row.saved:,}", f"{row.held:,}")
    Console().print(table)
    write(
        options.out,
        {
            **circumstances("benchmarks.memory", arguments),
            "footprints": [asdict(row) for rows in results.values() for row in rows],
        },
    )
    ours = [rows for name, rows in results.items() if not name.startswith("notebook")]
    return 0 if all((a.saved, a.held) == (b.saved, b.held) for a, b in ours) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
