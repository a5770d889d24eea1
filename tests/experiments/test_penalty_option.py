"""`train mnist --jacobian-penalty`: recorded, resumed to the same end, and validated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit.experiments import train
from torchimplicit.experiments.recipe import make_model, with_penalty
from torchimplicit.experiments.step import Scheme, train_batch

from .conftest import Command

OPTIONS = ("--epochs", 2, "--checkpoint-every", 5, "--jacobian-penalty", 0.5)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]


def test_an_interrupted_run_resumes_to_exactly_the_same_end(
    small_run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random vectors of the penalty among it."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert small_run("--out", whole, *OPTIONS).exit_code == 0
    original, left = train.train_batch, 8

    def stopping(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(train, "train_batch", stopping)
    assert small_run("--out", folder, *OPTIONS).exit_code == 130
    assert json.loads((folder / "config.json").read_text())["options"]["jacobian_penalty"] == 0.5
    refused = small_run("--out", folder, *OPTIONS, "--resume", "--jacobian-penalty", 0.25)
    assert "--jacobian-penalty: the run in" in refused.stderr and "began with 0.5, not 0.25" in refused.stderr
    left = -1
    assert small_run("--out", folder, *OPTIONS, "--resume").exit_code == 0
    assert (folder / "batches.jsonl").read_bytes() == (whole / "batches.jsonl").read_bytes()
    penalties = [line["penalty"] for line in _lines(folder)]
    assert len(penalties) == 24
    assert min(penalties) > 0.05 and max(penalties) < 1.0


def test_a_run_without_it_has_none_and_one_begun_before_there_was_the_option_resumes(
    small_run: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert small_run("--epochs", 1, "--out", folder).exit_code == 0
    assert {line["penalty"] for line in _lines(folder)} == {None}
    content = json.loads((folder / "config.json").read_text())
    del content["options"]["jacobian_penalty"]
    (folder / "config.json").write_text(json.dumps(content))
    assert small_run("--epochs", 1, "--out", folder, "--resume").exit_code == 0
    assert small_run("--epochs", 1, "--out", folder, "--resume", "--jacobian-penalty", 0.5).exit_code == 2


def test_the_gradient_is_that_of_the_loss_and_the_weighted_penalty() -> None:
    model = make_model("newton", batch_size=6, features=12, tolerance=1e-10).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images, labels = torch.rand(6, 28, 28, dtype=torch.float64), torch.arange(6)
    torch.manual_seed(1)
    train_batch(model, optimizer, images, labels, 0, 0, Scheme(jacobian_penalty=2.0))
    found = [p.grad for p in model.parameters()]
    torch.manual_seed(1)
    x = model[1](model[0](images))
    z = model[2](x)
    penalty = ti.jacobian_penalty(model[2], z.detach(), x)
    loss = torch.nn.functional.cross_entropy(model[3](z), labels) + 2.0 * penalty
    for a, b in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)
    torch.manual_seed(1)
    logits, size = with_penalty(model, images)
    assert torch.equal(size, penalty) and torch.equal(logits, model(images))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--jacobian-penalty", -1), "--jacobian-penalty: must be a finite number of at least 0, not -1.0"),
        (("--jacobian-penalty", "inf"), "must be a finite number"),
        (("--jacobian-penalty", 1, "--layer", "explicit"), "the explicit twin solves nothing"),
    ],
)
def test_a_weight_that_makes_no_sense_is_refused(
    small_run: Command, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = small_run("--out", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
