"""Small digits as an IDX folder, and the command line as a function."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from torchimplicit.experiments.cli import app
from torchimplicit.experiments.data import IMAGES, LABELS, Digits, load_embedded
from torchimplicit.experiments.idx import write_idx


@pytest.fixture(scope="session")
def embedded() -> Digits:
    return load_embedded()


@pytest.fixture(scope="session")
def small_data(embedded: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 training and 60 test digits, of all classes."""
    folder = tmp_path_factory.mktemp("idx")
    for part, split, count in (("train", embedded.train, 240), ("test", embedded.test, 60)):
        rows = torch.linspace(0, len(split) - 1, count).long()
        write_idx(folder / IMAGES[part], split.images[rows])
        write_idx(folder / f"{LABELS[part]}.gz", split.labels[rows])
    return folder


Command = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `torchimplicit ARGUMENTS...` in this process, in a wide window."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("TORCHIMPLICIT_DATA", raising=False)

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def small_run(run: Command, small_data: Path) -> Command:
    """Train on the small digits: 12 batches of 20 an epoch."""

    def invoke(*arguments: object) -> Result:
        options = ("--data-dir", small_data, "--batch-size", 20, "--threads", 1)
        return run("train", "mnist", *options, *arguments)

    return invoke
