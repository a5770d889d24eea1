"""Killed runs go on where they stood and end with the numbers of an uninterrupted one; damage destroys nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from torchimplicit.experiments.cli import app

from .conftest import Command

# Runs the command line and kills its own process, with SIGKILL, when a function is called for the n-th time.
KILLER = """
import os, signal, sys
from torchimplicit.experiments import checkpoint, files, train
from torchimplicit.experiments.cli import app

owner = {"train": train, "files.os": files.os, "checkpoint": checkpoint}[sys.argv[1]]
name, left = sys.argv[2], int(sys.argv[3])
original = getattr(owner, name)

def counted(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

setattr(owner, name, counted)
app(sys.argv[4:])
"""

OPTIONS = ("--epochs", 3, "--checkpoint-every", 5, "--lr-schedule", "1:0.05")
TIMES = {"seconds", "test_seconds"}


def rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in text.splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code = "import sys; from torchimplicit.experiments.cli import app; app(sys.argv[1:])"
    done = subprocess.run(_command(code, small_data, folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def _command(code: str, data: Path, folder: Path, *before: object) -> list[str]:
    options = ("--data-dir", data, "--batch-size", 20, "--threads", 1, "--out", folder, *OPTIONS)
    return [sys.executable, "-c", code, *map(str, (*before, "train", "mnist", *options))]


KILLS = {
    # 12 batches an epoch, checkpoints after 5 and 10 of them and at the end; a run begins with one.
    "in mid-epoch, after unsaved batches": ("train", "train_batch", 12 + 9),
    "before the first batch": ("train", "train_batch", 1),
    "while a checkpoint is written": ("files.os", "replace", 9),
    "between the evaluation and its checkpoint": ("train", "evaluate", 2),
}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
def test_a_killed_run_resumes_to_exactly_the_same_end(
    small_run: Command, small_data: Path, tmp_path: Path, uninterrupted: Path, kill: tuple[str, str, int]
) -> None:
    folder = tmp_path / "run"
    done = subprocess.run(_command(KILLER, small_data, folder, *kill), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(rows(folder)) < 3
    result = small_run("--out", folder, *OPTIONS, "--resume")
    assert result.exit_code == 0, result.output
    assert rows(folder) == rows(uninterrupted)
    assert (folder / "batches.jsonl").read_bytes() == (uninterrupted / "batches.jsonl").read_bytes()
    for name, value in weights(uninterrupted).items():
        assert torch.equal(weights(folder)[name], value), name


@pytest.fixture(scope="module")
def halted_once(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped in mid-epoch: the next checkpoint to come could not be written."""
    from torchimplicit.experiments import checkpoint

    original = checkpoint.save

    def save(folder: Path, progress: checkpoint.Progress, *arguments: Any) -> None:
        if (progress.epoch, progress.batch) == (1, 10):
            raise OSError(28, "No space left on device")
        original(folder, progress, *arguments)

    folder = tmp_path_factory.mktemp("halted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        result = CliRunner().invoke(app, _command("", small_data, folder)[3:])
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    return folder


@pytest.fixture
def halted(halted_once: Path, tmp_path: Path) -> Path:
    """A copy of the halted run."""
    return Path(shutil.copytree(halted_once, tmp_path / "run"))


def test_resume_after_a_full_disk(small_run: Command, halted: Path, uninterrupted: Path) -> None:
    result = small_run("--out", halted, *OPTIONS, "--resume")
    assert result.exit_code == 0, result.output
    assert "resuming at epoch 1, batch 5" in result.output
    assert rows(halted) == rows(uninterrupted)


@pytest.mark.parametrize("kept", [0, 1000, -7])
def test_a_truncated_checkpoint_is_named_and_nothing_is_lost(
    small_run: Command, halted: Path, uninterrupted: Path, kept: int
) -> None:
    path = halted / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:kept])
    before = contents(halted)
    result = small_run("--out", halted, *OPTIONS, "--resume")
    assert result.exit_code == 2
    assert contents(halted) == before
    [line] = result.stderr.splitlines()
    assert f"{path}: damaged or cut short ({len(before['checkpoint.pt'])} bytes), nothing was changed" in line
    assert f"(epoch 1, batch 0): mv '{halted / 'checkpoint.prev.pt'}' '{path}', then --resume again" in line
    # The remedy works.
    os.replace(halted / "checkpoint.prev.pt", path)
    result = small_run("--out", halted, *OPTIONS, "--resume")
    assert result.exit_code == 0, result.output
    assert rows(halted) == rows(uninterrupted)


def test_a_flipped_byte_in_the_weights_is_noticed(small_run: Command, halted: Path) -> None:
    path = halted / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    result = small_run("--out", halted, *OPTIONS, "--resume")
    assert result.exit_code == 2
    assert "damaged" in result.stderr


def test_a_lost_checkpoint_is_named(small_run: Command, halted: Path) -> None:
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (halted / name).unlink()
        before = contents(halted)
        result = small_run("--out", halted, *OPTIONS, "--resume")
        assert result.exit_code == 2
        assert f"{halted / 'checkpoint.pt'}: missing" in result.stderr
        assert contents(halted) == before


def test_a_shortened_metrics_file_is_named(small_run: Command, halted: Path) -> None:
    (halted / "batches.jsonl").write_bytes(b"")
    before = contents(halted)
    result = small_run("--out", halted, *OPTIONS, "--resume")
    assert result.exit_code == 2
    assert "batches.jsonl: 0 bytes, but the checkpoint knows" in result.stderr
    assert contents(halted) == before


def test_a_checkpoint_is_plain_data(halted: Path) -> None:
    content = torch.load(halted / "checkpoint.pt", weights_only=True)
    assert content["progress"]["epoch"] == 1
    assert content["progress"]["batch"] == 5


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--lr", 0.2, "--lr: the run in '{folder}' began with 0.1, not 0.2"),
        ("--layer", "newton", "--layer: the run in '{folder}' began with picard, not newton"),
        ("--seed", 5, "--seed: the run in '{folder}' began with 0, not 5"),
        ("--batch-size", 30, "--batch-size: the run in '{folder}' began with 20, not 30"),
    ],
)
def test_resuming_under_other_options_is_refused(
    small_run: Command, halted: Path, option: str, value: object, message: str
) -> None:
    before = contents(halted)
    result = small_run("--out", halted, *OPTIONS, "--resume", option, value)
    assert result.exit_code == 2
    assert message.format(folder=halted) in result.stderr
    assert contents(halted) == before


def test_resuming_with_other_data_is_refused(small_run: Command, run: Command, halted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(json.loads((halted / "config.json").read_text())["data"]["source"].split(" in ")[1], other)
    images = bytearray((other / "train-images-idx3-ubyte").read_bytes())
    images[500] ^= 1
    (other / "train-images-idx3-ubyte").write_bytes(images)
    result = small_run("--out", halted, *OPTIONS, "--resume", "--data-dir", other)
    assert result.exit_code == 2
    assert "began with other data" in result.stderr


def test_resuming_a_finished_run_changes_no_number(small_run: Command, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert small_run("--epochs", 1, "--out", folder).exit_code == 0
    before = contents(folder)
    result = small_run("--epochs", 1, "--out", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert "already complete" in result.output
    assert contents(folder) == before


def test_a_new_run_never_overwrites_an_old_one(small_run: Command, halted: Path) -> None:
    before = contents(halted)
    result = small_run("--out", halted, *OPTIONS)
    assert result.exit_code == 2
    assert f"--out: '{halted}' is not empty; add --resume" in result.stderr
    assert contents(halted) == before
