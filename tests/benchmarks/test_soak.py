"""A short soak: spikes, NaN inputs and a kill in a few hundred steps; `make soak` runs the long one."""

from pathlib import Path

import pytest
import torch

from benchmarks import soak


@pytest.mark.slow
def test_a_spoilt_and_killed_run_ends_with_finite_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(soak.__file__).parents[1]), prepend=":")
    found = soak.soak(tmp_path, 500, 400, "picard", "bf16", settled=150)
    assert found["step"] == 500
    assert found["kills"] == 1
    # What the seeds of the steps make happen: pixels spoil a gradient, which is skipped, features do not.
    assert found["nan_pixels"] == found["skipped"]["non-finite gradient norm"] == 1
    assert found["nan_features"] == found["taken_with_nan"] == 3
    assert max(found["growth"]) < 0.05
    content = torch.load(tmp_path / "soak.pt", weights_only=True)
    assert all(t.isfinite().all() for t in content["model"].values())
    assert content["tally"]["loss"] < 1.5  # it has learned something: 2.3 is guessing
