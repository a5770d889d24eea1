"""The results of the examples: one format that keeps the runs of other seeds, and a page that says what is missing."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import torchimplicit as ti
from examples import results_table
from examples._meter import Meter
from examples._options import options
from examples._record import STANDARD, Experiment, Record, without_folders

EXAMPLES = Path(results_table.__file__).parent
OF_ONE_SCRIPT = {"mondeq_fc", "mondeq_conv", "residual_mnist", "residual_fashion"}
RESULTS = sorted((EXAMPLES / "results").glob("*.json"))
EXPERIMENT = Experiment(
    name="some",
    title="Some",
    metric="accuracy",
    unit="fraction",
    ours="ours",
    twin="twin",
    models={"ours": "98 %", "twin": ""},
    bar=0.98,
    literature="98 %",
    source="Someone 2020",
)


def _record(out: Path, **settings: Any) -> Record:
    chosen = options(["--out", str(out)], "", smoke={}, **{"steps": 5} | settings)
    return Record.open(EXPERIMENT, chosen)


def test_the_runs_of_other_seeds_and_models_are_kept_and_that_of_the_same_is_replaced(tmp_path: Path) -> None:
    _record(tmp_path).add("ours", 1, accuracy=0.99)
    _record(tmp_path).add("ours", 0, accuracy=0.97, losses=[1.0, 0.5])
    _record(tmp_path).add("twin", 0, accuracy=0.5)
    record = _record(tmp_path)
    record.add("ours", 1, accuracy=0.98)
    models = json.loads(record.path.read_text())["models"]
    assert [(r["seed"], r["accuracy"]) for r in models["ours"]["runs"]] == [(0, 0.97), (1, 0.98)]
    assert models["ours"]["runs"][0]["losses"] == [1.0, 0.5]
    assert len(models["twin"]["runs"]) == 1
    run = models["ours"]["runs"][1]
    assert run["versions"]["torch"] == torch.__version__
    assert run["command"].startswith("python -m examples.")
    assert run["threads"] == 1
    assert run["peak_memory_mb"] > 10


def test_runs_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    _record(tmp_path).add("ours", 1, accuracy=0.99)
    record = _record(tmp_path, steps=6)
    record.add("ours", 0, accuracy=0.9)
    content = json.loads(record.path.read_text())
    assert content["settings"] == {"steps": 6}
    assert [r["seed"] for r in content["models"]["ours"]["runs"]] == [0]


def test_a_recorded_command_names_no_folder() -> None:
    given = ["--name", "fashion", "--data-dir", "/a/b", "--out=/c", "--seeds", "0"]
    assert without_folders(given) == ["--name", "fashion", "--data-dir", "FOLDER", "--out=FOLDER", "--seeds", "0"]


def test_a_model_that_the_experiment_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'other' is not among the models: ours, twin"):
        _record(tmp_path).add("other", 0, accuracy=0.1)


def test_the_reduced_setting_stays_away_from_the_recorded_results() -> None:
    chosen = options(["--smoke"], "", smoke={"steps": 1}, steps=5)
    assert (chosen.steps, chosen.seeds, str(chosen.out)) == (1, [0], "runs/smoke")
    assert options(["--smoke", "--steps", "3"], "", smoke={"steps": 1}, steps=5).steps == 3
    assert options([], "", smoke={"steps": 1}, steps=5).out == EXAMPLES


def test_the_meter_counts_evaluations_forward_and_backward_and_who_converged() -> None:
    layer, meter = ti.nn.TanhEquilibrium(3, solver=ti.Picard()), Meter()
    expected = []
    with ti.monitor(layer) as log:
        for _ in range(3):
            layer(torch.randn(4, 3)).sum().backward()
            expected.append(log.records[0].solution)
            meter.take(log)
    found = meter.figures()
    assert found["evaluations_forward"] == sum(s.evaluations for s in expected) / 3
    assert found["evaluations_backward"] == sum(s.adjoint.evaluations for s in expected) / 3 > 0
    assert found["converged"] == 1.0
    assert not Meter().solves()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_recorded_result_is_whole(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["name"] == path.stem in results_table.ORDER
    assert (path.parent.parent / "plots" / f"{path.stem}.png").exists()
    assert result["models"][result["ours"]]["runs"]
    for model in result["models"].values():
        for run in model["runs"]:
            assert {"seed", result["metric"], "command", "date", "versions", "threads"} <= set(run)
            assert run["command"].startswith("python -m examples.")
            assert all(isinstance(run[key], int | float) for key in STANDARD if key in run)


@pytest.mark.parametrize("name", sorted({"mondeq", "residual_deq", *results_table.ORDER} - OF_ONE_SCRIPT))
def test_the_recorded_facts_are_those_of_the_script(name: str) -> None:
    """`write` puts them into the file; a script that has changed since says something else than its result."""
    if name == "lightning_mnist":
        pytest.importorskip("lightning.pytorch")
    script = importlib.import_module(f"examples.{name}")
    experiments = script.EXPERIMENTS.values() if hasattr(script, "EXPERIMENTS") else [script.EXPERIMENT]
    for experiment in experiments:
        path = EXAMPLES / "results" / f"{experiment.name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            for key, value in asdict(experiment).items():
                if key != "models":
                    assert result[key] == (list(value) if isinstance(value, tuple) else value), key
            assert all(experiment.models[model] == entry["literature"] for model, entry in result["models"].items())


def test_the_page_is_what_the_script_makes_of_the_results() -> None:
    assert (EXAMPLES / "RESULTS.md").read_text() == results_table.render(), "run make examples-results"


def test_the_page_has_mean_and_deviation_and_says_what_is_missed_and_missing(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.96, 0.98)):
        _record(tmp_path).add("ours", seed, accuracy=accuracy, parameters=1234)
    page = results_table.render(tmp_path)
    assert "97.00 ± 1.4 % (2)" in page
    assert "accuracy of each seed: ours 0.96, 0.98" in page
    assert "**missed**" in page
    assert "the explicit twin has not been run" in page
    assert "ours: 2 seeds of 3" in page
    assert "There is no plot." in page
    assert "It needs Fashion-MNIST" in page
    _record(tmp_path).add("twin", 0, accuracy=0.5)
    assert "| 50.00 % | better |" in results_table.render(tmp_path)


def test_a_loss_meets_its_figure_from_below() -> None:
    result = {"ours": "a", "metric": "loss", "bar": 1e-6, "more_is_better": False, "models": {"a": {"runs": []}}}
    result["models"]["a"]["runs"] = [{"loss": 2e-6}]
    assert results_table.verdict(result) == "**missed**"
    result["models"]["a"]["runs"] = [{"loss": 5e-7}]
    assert results_table.verdict(result) == "met"
