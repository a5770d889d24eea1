"""The training job: what it writes, what it counts, and that nothing it cannot trust reaches the weights."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.experiments import train
from torchimplicit.experiments.config import LAYERS
from torchimplicit.experiments.metrics import BatchRecord, EpochTotals, Solves, outcome
from torchimplicit.experiments.recipe import make_model
from torchimplicit.experiments.train import train_batch

from .conftest import Command


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_trains_and_leaves_a_whole_folder(small_run: Command, tmp_path: Path, layer: str) -> None:
    result = small_run("--layer", layer, "--epochs", 3, "--lr-schedule", "2:0.01", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"config.json", "metrics.jsonl", "batches.jsonl", "checkpoint.pt", "analysis.json", "report.html"}
    assert names == expected | {"checkpoint.prev.pt"}
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [row["lr"] for row in rows] == [0.1, 0.1, 0.01]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["test_error"] < 80.0  # chance is 90
    assert "240 training and 60 test images" in result.output
    assert f"{rows[-1]['test_error']:.2f}" in result.output


def test_the_epoch_is_the_sum_of_its_batches(small_run: Command, tmp_path: Path) -> None:
    result = small_run("--epochs", 1, "--max-steps", 12, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    [row] = lines(tmp_path / "run" / "metrics.jsonl")
    batches = lines(tmp_path / "run" / "batches.jsonl")
    assert [(batch["epoch"], batch["batch"]) for batch in batches] == [(0, i) for i in range(12)]

    def mean(key: str) -> float:
        return sum(batch[key] for batch in batches) / 12

    assert row["train_loss"] == pytest.approx(mean("loss"), rel=1e-12)
    assert row["train_error"] == pytest.approx(100 * mean("error"), rel=1e-12)
    assert row["iterations"] == mean("iterations") == 12.0
    assert row["steps"] == pytest.approx(mean("steps"), rel=1e-12)
    assert row["converged"] == pytest.approx(mean("converged"), rel=1e-12)
    assert 0.0 <= row["worst_batch_converged"] == min(batch["converged"] for batch in batches) < 1.0
    assert row["evaluations_forward"] == sum(batch["evaluations_forward"] for batch in batches)
    assert row["evaluations_backward"] == sum(batch["evaluations_backward"] for batch in batches)
    assert row["failed_batches"] == sum(bool(batch["statuses"]) for batch in batches) > 0
    failed = sum(batch["statuses"].get("MAX_STEPS", 0) for batch in batches)
    assert row["statuses"] == {"MAX_STEPS": failed}
    assert f"{row['failed_batches']} of 12 batches: {failed} MAX_STEPS samples did not converge" in result.output


def test_the_same_seed_gives_the_same_run(small_run: Command, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert small_run("--epochs", 1, "--seed", seed, "--out", tmp_path / name).exit_code == 0
    a, b, c = ((tmp_path / name / "batches.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_a_learning_rate_far_too_large_ends_finite_and_says_so(small_run: Command, tmp_path: Path) -> None:
    result = small_run("--epochs", 3, "--lr", 10, "--lr-schedule", "constant", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, value in weights.items():
        assert bool(torch.isfinite(value).all()), name
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["failed_batches"] for row in rows) > 0
    assert "samples did not converge" in result.output
    assert f"The loss ended at {rows[-1]['train_loss']:.2f}, worse than guessing (2.30)" in result.output


def test_a_learning_rate_beyond_all_bounds_ends_finite_and_says_so(small_run: Command, tmp_path: Path) -> None:
    result = small_run("--epochs", 1, "--lr", 1e38, "--layer", "explicit", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, value in weights.items():
        assert bool(torch.isfinite(value).all()), name
    [row] = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["skipped"].values()) >= 1
    for reason, count in row["skipped"].items():
        assert f"{count} of 12 steps skipped: {reason}" in result.output


class Broken(nn.Module):
    """A linear classifier whose loss or gradient is not finite."""

    def __init__(self, forward_factor: float, backward_factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 10)
        self.forward_factor, self.backward_factor = forward_factor, backward_factor

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        out.register_hook(lambda gradient: gradient * self.backward_factor)
        return out * self.forward_factor


@pytest.mark.parametrize(
    "model, lr, reason",
    [
        (Broken(math.nan, 1.0), 0.1, "non-finite loss"),
        (Broken(1.0, math.nan), 0.1, "non-finite gradient norm"),
        (Broken(1.0, math.inf), 0.1, "non-finite gradient norm"),
        (Broken(1.0, 1e18), 1e30, "the step would overflow the parameters"),
        (Broken(1.0, 1.0), 0.1, None),
    ],
    ids=["loss", "nan gradient", "infinite gradient", "overflow", "sound"],
)
def test_what_is_not_finite_never_reaches_the_weights(model: Broken, lr: float, reason: str | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    before = [p.detach().clone() for p in model.parameters()]
    record = train_batch(model, optimizer, torch.randn(5, 4), torch.arange(5), 0, 0)
    assert record.skipped == reason
    unchanged = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert unchanged == [reason is not None] * 2


def test_an_unsolved_sample_does_not_steer_the_layers_weights() -> None:
    torch.manual_seed(0)
    model = make_model("picard", batch_size=3, features=10, max_steps=1)
    model(torch.rand(3, 28, 28)).sum().backward()
    assert isinstance(model[2], ti.nn.TanhEquilibrium)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        moved = gradient is not None and int(torch.count_nonzero(gradient)) > 0
        assert moved == name.startswith("3."), name  # the layer behind the equation still learns


def test_counting_follows_the_solutions() -> None:
    model = make_model("picard", batch_size=6, features=12, max_steps=7)
    images, labels = torch.rand(6, 28, 28), torch.zeros(6, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    record = train_batch(model, optimizer, images, labels, 0, 0)
    layer = model[2]
    assert isinstance(layer, ti.nn.TanhEquilibrium)
    solution = layer.solve(model[1](model[0](images)))
    solves = record.solves
    assert solves.samples == 6
    assert solves.iterations == int(solution.steps.max())
    assert solves.steps == int(solution.steps.sum())
    assert solves.converged == int(solution.converged.sum())
    assert solves.evaluations_forward == solution.evaluations
    assert sum(solves.statuses.values()) == 6 - solves.converged


def test_totals_survive_a_checkpoint() -> None:
    totals = EpochTotals()
    solves = Solves(samples=4, iterations=9, steps=20, converged=3, statuses={"STALLED": 1})
    totals.add(BatchRecord(0, 0, 4, 0.1, 2, solves, 1.0))
    totals.add(BatchRecord(0, 1, 4, math.nan, 4, Solves(samples=4, converged=4), None, "non-finite loss"))
    assert EpochTotals(**totals.state()) == totals
    row = totals.summary()
    assert (row["train_loss"], row["train_error"], row["skipped"]) == (0.1, 75.0, {"non-finite loss": 1})
    assert (row["converged"], row["worst_batch_converged"], row["failed_batches"]) == (0.875, 0.75, 1)
    said = outcome([row, row])
    assert said[0].startswith("2 of 4 batches: 2 STALLED samples did not converge. " + ti.Status.STALLED.advice)
    assert said[1].startswith("2 of 4 steps skipped: non-finite loss.")


def test_nothing_is_said_when_nothing_went_wrong() -> None:
    totals = EpochTotals()
    totals.add(BatchRecord(0, 0, 4, 0.1, 2, Solves(samples=4, converged=4), 1.0))
    assert outcome([totals.summary()]) == []


def test_evaluation_leaves_gradients_and_weights_alone(small_data: Path) -> None:
    from torchimplicit.experiments.data import load_folder

    model = make_model("anderson", batch_size=10, features=10)
    split = load_folder(small_data).test
    row = train.evaluate(model, split)
    with torch.no_grad():
        wrong = (model(split.images.float() / 255).argmax(1) != split.labels).sum().item()
    assert row["test_error"] == pytest.approx(100 * wrong / 60)
    assert all(p.grad is None for p in model.parameters())
