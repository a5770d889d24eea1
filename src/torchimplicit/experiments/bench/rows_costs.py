"""What the library itself costs: operations per step, memory, time outside the cell, time to import."""

import os
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from statistics import median

import torch

from torchimplicit.experiments.bench import operations, overhead, peak_memory
from torchimplicit.experiments.bench.row import Measurement, Row, Settings

STEPS = (10, 20, 50, 100, 200)


def measure_operations(name: str, settings: Settings) -> Measurement:
    """Count ours and TorchDEQ's; a count has no spread."""
    ours = operations.ours(name, settings.seed)
    theirs = operations.torchdeq(name, settings.seed)
    value = float(ours.total())
    return Measurement(
        value=value,
        low=value,
        high=value,
        runs=1,
        ours=value,
        theirs=float(theirs.total()),
        verified=True,  # `operations.ours` sees to it that all samples take all steps
        evidence={"ours": dict(ours.most_common()), "torchdeq": dict(theirs.most_common())},
    )


def measure_memory(settings: Settings) -> Measurement:
    """The largest ratio among our solvers of the peak at 200 steps to that at 10.

    The value is of forward and backward together; the evidence has the forward pass alone, the others, and what the
    operating system saw.
    """
    rivals = ("notebook", "torchdeq") if find_spec("torchdeq") else ("notebook",)
    steps = (STEPS[0], STEPS[-1]) if settings.quick else STEPS
    peaks = {name: [peak_memory.measure(name, count) for count in steps] for name in (*peak_memory.OURS, *rivals)}
    ratios = {name: row[-1].both / row[0].both for name, row in peaks.items()}
    resident = {
        name: {count: peak_memory.resident_bytes(name, count) for count in (steps[0], steps[-1])}
        for name in ("picard", "notebook")
    }
    worst = max(peak_memory.OURS, key=lambda name: ratios[name])
    return Measurement(
        value=ratios[worst],
        low=min(ratios[name] for name in peak_memory.OURS),
        high=ratios[worst],
        runs=1,
        ours=peaks[worst][-1].both / 1e6,
        theirs=peaks["notebook"][-1].both / 1e6,
        verified=all(peak_memory.takes_all_steps(name, steps[-1]) for name in peak_memory.OURS),
        evidence={
            "what": f"peak bytes, batch {peak_memory.BATCH}, n = {peak_memory.N}, float64; ours and theirs in MB",
            "worst": worst,
            "ratios": ratios,
            "forward_ratios": {name: row[-1].forward / row[0].forward for name, row in peaks.items()},
            "peaks": {name: [asdict(peak) for peak in row] for name, row in peaks.items()},
            "resident": resident,
        },
    )


def measure_overhead(name: str, settings: Settings) -> Measurement:
    """The fraction of the time of forward and backward that is spent outside the cell."""
    layer, x = overhead.make_layer(name, settings.seed)
    runs = []
    for repeat in range(settings.repeats + 1):
        cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(repeat))
        runs.append(overhead.outside(layer, x, cotangent))
    runs = runs[1:]  # the first warms up
    cell = overhead.cell_seconds(layer, x)
    return Measurement(
        value=median(one.fraction for one in runs),
        low=min(one.fraction for one in runs),
        high=max(one.fraction for one in runs),
        runs=settings.repeats,
        ours=median(one.seconds for one in runs),
        theirs=None,
        verified=all(one.converged for one in runs) and cell >= 5e-3,
        evidence={
            "cell_seconds": cell,
            "evaluations": runs[0].evaluations,
            "products": runs[0].products,
            "state": x.numel(),
        },
    )


def measure_import(settings: Settings) -> Measurement:
    """Seconds that `import torchimplicit` takes after `import torch`, in processes of their own.

    The evidence has the time with everything that is imported when it is first asked for, too.
    """
    after, everything, alone, both = [], [], [], []
    _python("import torchimplicit.nn, torchimplicit.diagnostics")  # compiles, once
    for _ in range(settings.repeats):
        alone.append(_python("import torch")[0])
        whole, told = _python(
            "import time, torch; began = time.perf_counter(); import torchimplicit; print(time.perf_counter() - began);"
            "import torchimplicit.nn, torchimplicit.diagnostics; print(time.perf_counter() - began)"
        )
        both.append(whole)
        package, with_layers = map(float, told.split())
        after.append(package)
        everything.append(with_layers)
    return Measurement(
        value=median(after),
        low=min(after),
        high=max(after),
        runs=settings.repeats,
        ours=median(after),
        theirs=None,
        verified=True,  # the process fails if the import does
        evidence={
            "with nn and diagnostics": median(everything),
            "process_with_torch": median(alone),
            "process_with_all": median(both),
        },
    )


def _python(code: str) -> tuple[float, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return time.perf_counter() - began, done.stdout


def _operations_row(name: str, bar: float) -> Row:
    title = f"operations per step of {name.capitalize()} beside the cell's own"
    return Row(
        f"operations/{name}", title, bar, partial(measure_operations, name), unit="operations", needs=("torchdeq",)
    )


ROWS = (
    _operations_row("picard", 8),
    _operations_row("anderson", 25),
    _operations_row("broyden", 25),
    Row("memory/steps", "peak memory of forward and backward at 200 steps against 10", 1.02, measure_memory),
    *(
        Row(
            f"overhead/{name}",
            f"time outside a cell that takes at least 5 ms, forward and backward: {name}",
            0.03,
            partial(measure_overhead, name),
            unit="of the time",
        )
        for name in overhead.SOLVERS
    ),
    Row("import", "import time of the package after torch", 0.1, measure_import, unit="s"),
)
