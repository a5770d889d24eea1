"""The evidence table averages the seeds it was given, and refuses runs that are not what they should be."""

import json
from pathlib import Path

import pytest

from benchmarks.evidence import TARGETS, main


def _write(folder: Path, layer: str, seed: int, error: float, changes: dict[str, object] | None = None) -> None:
    """Write a run folder as the training job does."""
    epochs = TARGETS[layer].epochs
    told = {"layer": layer, "seed": seed, "epochs": epochs, "tolerance": 1e-4, "batch_size": 100} | (changes or {})
    run = folder / f"{layer}-{seed}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"options": told, "data": {"train": 60_000}}))
    rows = [
        {"epoch": epoch, "test_error": error + epochs - 1 - epoch, "iterations": 60.0, "seconds": 5.0}
        for epoch in range(epochs)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = [{"converged": 0.97 if batch == 3 and seed == 1 else 1.0} for batch in range(10)]
    (run / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in batches))


def _all(folder: Path, **errors: float) -> None:
    for layer in TARGETS:
        for seed in range(3):
            _write(folder, layer, seed, errors.get(layer, 3.0) + 0.1 * (seed - 1))


def test_mean_of_the_last_epochs_is_compared_with_the_target(tmp_path: Path) -> None:
    _all(tmp_path, picard=3.19)
    assert main([str(tmp_path), "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    picard = result["layers"]["picard"]
    assert picard["test_error"] == pytest.approx(3.19)
    assert [run["test_error"] for run in picard["runs"]] == pytest.approx([3.09, 3.19, 3.29])
    assert [run["below_one"] for run in picard["runs"]] == [0, 1, 0]
    assert [run["worst"] for run in picard["runs"]] == [1.0, 0.97, 1.0]
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


def test_a_missed_target_fails(tmp_path: Path) -> None:
    _all(tmp_path, newton=3.51)
    assert main([str(tmp_path), "--out", str(tmp_path / "out.json")]) == 1


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--out", str(tmp_path / "out.json")])
    assert stop.value.code == 1
    assert "picard-0" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("option, value", [("layer", "newton"), ("seed", 5), ("epochs", 3), ("tolerance", 1e-2)])
def test_a_run_with_other_options_is_refused(
    option: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, "picard", 0, 3.0, {option: value})
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "out.json")])
    assert f"{option} is {value!r}" in capsys.readouterr().err


def test_a_run_on_fewer_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, "picard", 0, 3.0)
    config = tmp_path / "picard-0" / "config.json"
    config.write_text(config.read_text().replace("60000", "4000"))
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "out.json")])
    assert "60,000 images" in capsys.readouterr().err
