"""The rows about the library's own costs count what they say."""

import json

import pytest
import torch

from torchimplicit.experiments.bench import operations, overhead, peak_memory, rows_costs
from torchimplicit.experiments.bench.row import Settings

ROWS = {row.name: row for row in rows_costs.ROWS}
QUICK = Settings(repeats=1, quick=True)


def test_bars_are_those_of_the_claims() -> None:
    bars = {name: row.bar for name, row in ROWS.items()}
    assert bars == {
        "operations/picard": 8,
        "operations/anderson": 25,
        "operations/broyden": 25,
        "memory/steps": 1.02,
        "overhead/picard": 0.03,
        "overhead/anderson": 0.03,
        "overhead/broyden": 0.03,
        "overhead/auto": 0.03,
        "import": 0.1,
    }


@pytest.mark.parametrize("name, count", [("picard", 42), ("anderson", 90), ("broyden", 159)])
def test_operations_of_torchdeq(name: str, count: int) -> None:
    pytest.importorskip("torchdeq")
    assert operations.torchdeq(name, seed=0).total() == count


def test_peak_bytes_is_the_most_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(1000, dtype=torch.float64)  # freed each time
        kept = [torch.empty(500, dtype=torch.float64) for _ in range(3)]
        kept.clear()

    assert peak_memory.peak_bytes(run) == pytest.approx(12_000, abs=200)


def test_the_notebook_keeps_every_step_and_ours_none() -> None:
    few, many = (peak_memory.measure("notebook", steps) for steps in (5, 20))
    assert many.both > 2.5 * few.both
    few, many = (peak_memory.measure("picard", steps) for steps in (5, 20))
    assert many.both == few.both
    assert all(peak_memory.takes_all_steps(name, 20) for name in peak_memory.OURS)


def test_resident_bytes_are_those_of_another_process() -> None:
    found = peak_memory.resident_bytes("picard", 2)
    assert found is None or 50e6 < found < 5e9


def test_the_clock_runs_in_every_call_and_every_product() -> None:
    class Counting(overhead.Clock):
        entered = left = 0

        def start(self) -> None:
            self.entered += not self._product
            super().start()

        def stop(self) -> None:
            self.left += self._began is not None and not self._product
            super().stop()

    layer, x = overhead.make_layer("picard", 0)
    clock = layer.cell.clock = Counting()
    found = overhead.outside(layer, x, torch.randn_like(x))
    assert found.converged
    # The solve's evaluations and products, and the product that goes to the parameters; the rest is the evaluation that
    # is recorded, twice where torch's compiler is loaded.
    assert clock.entered == clock.left
    assert clock.entered - (found.evaluations + found.products + 1) in (1, 2)
    assert 0 < found.fraction < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memory/steps", "overhead/picard", "import"])
def test_a_row_measures(name: str) -> None:
    found = ROWS[name].measure(QUICK)
    assert found.verified
    assert found.low <= found.value <= found.high
    json.dumps(found.evidence)
