"""The command line: every wrong use gives one line that names the option and the remedy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.experiments import main as entry
from torchimplicit.experiments.idx import write_idx

from .conftest import Command

MISTAKES = {
    "unknown layer": (
        ["--layer", "newtn"],
        "--layer: unknown layer 'newtn', valid ones are picard, anderson, newton, explicit; did you mean 'newton'?",
    ),
    "layer unlike any": (["--layer", "xyz"], "--layer: unknown layer 'xyz', valid ones are picard,"),
    "upper case": (["--layer", "Picard"], "did you mean 'picard'?"),
    "negative tolerance": (
        ["--tolerance", "-1e-4"],
        "--tolerance: must be a finite number above 0, not -0.0001",
    ),
    "no tolerance": (["--tolerance", "nan"], "--tolerance: must be a finite number above 0, not nan"),
    "no epochs": (["--epochs", "0"], "--epochs: must be at least 1, not 0"),
    "empty batch": (["--batch-size", "0"], "--batch-size: must be at least 1, not 0"),
    "batch too large": (["--batch-size", "500"], "--batch-size: 500 is more than the 240 training images"),
    "no steps": (["--max-steps", "0"], "--max-steps: must be at least 1, not 0"),
    "no threads": (["--threads", "0"], "--threads: must be at least 1, not 0"),
    "no width": (["--width", "-3"], "--width: must be at least 1, not -3"),
    "negative rate": (["--lr", "-0.1"], "--lr: must be a finite number above 0, not -0.1"),
    "negative seed": (["--seed", "-1"], "--seed: must be between 0 and 2147483647, not -1"),
    "schedule": (["--lr-schedule", "later"], "--lr-schedule: cannot read 'later'"),
    "checkpoints": (["--checkpoint-every", "0"], "--checkpoint-every: must be at least 1, not 0"),
    "unknown device": (["--device", "abacus"], "--device: cannot use 'abacus'"),
    "missing directory": (
        ["--data-dir", "nowhere"],
        "--data-dir: no such directory 'nowhere'; name a folder with the IDX files of MNIST, add --download",
    ),
    "empty directory": (["--data-dir", "."], "--data-dir: '.' lacks train-images-idx3-ubyte, train-labels-idx1-ubyte"),
    "nothing to resume": (["--resume", "--out", "new"], "--resume: no run to go on with in 'new'; leave out --resume"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gives_one_line_and_leaves_nothing_behind(
    small_run: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = small_run(*arguments)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_option_names_the_nearest(run: Command) -> None:
    result = run("train", "mnist", "--epoch", "3")
    assert result.exit_code == 2
    assert "--epochs" in result.stderr


def test_a_truncated_data_file_is_named(small_run: Command, small_data: Path, tmp_path: Path) -> None:
    import shutil

    data = shutil.copytree(small_data, tmp_path / "data")
    path = data / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    result = small_run("--data-dir", data, "--out", tmp_path / "run")
    assert result.exit_code == 2
    size = 16 + 240 * 784
    [line] = result.stderr.splitlines()
    assert f"{path}: truncated, its header [240, 28, 28] promises {size} bytes, found {size - 100}" in line
    assert not (tmp_path / "run").exists()


def test_out_must_not_be_a_file(small_run: Command, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    result = small_run("--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "is a file; name a folder" in result.stderr
    assert (tmp_path / "run").read_text() == "mine"


def test_help_shows_panels_defaults_and_examples(run: Command) -> None:
    text = run("train", "mnist", "--help").output
    for panel in ("Model", "Optimisation", "Solver", "Data", "Run"):
        assert f"─ {panel} ─" in text
    for option in ("layer", "epochs", "batch-size", "lr", "lr-schedule", "tolerance", "max-steps", "seed", "device"):
        assert f"--{option} " in text
    for option in ("threads", "out", "data-dir", "download", "resume", "checkpoint-every", "width"):
        assert f"--{option} " in text
    for default in ("picard", "10, newton 8", "100", "0.1", "5:0.01", "0.0001", "runs/mnist-LAYER-seedSEED", "cpu"):
        assert re.search(rf"\[default: \(?{re.escape(default)}\)?\]", text), default
    assert "TORCHIMPLICIT_DATA" in text
    assert "torchimplicit train mnist --layer newton --data-dir ~/mnist" in text


def test_help_lists_the_commands(run: Command) -> None:
    text = run("--help").output
    for name in ("train", "report", "demo", "--version"):
        assert name in text


def test_version(run: Command) -> None:
    assert run("--version").output == f"torchimplicit {ti.__version__}\n"


def test_missing_extras_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == "torchimplicit: the command line needs typer: pip install 'torchimplicit[train]'"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_bars_and_a_table(small_data: Path, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    arguments = ["train", "mnist", "--data-dir", small_data, "--epochs", 1, "--threads", 1, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torchimplicit.experiments.main", *map(str, arguments)],
        stdout=theirs,
        stderr=subprocess.STDOUT,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "130", "LINES": "40"},
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait() == 0, output
    text = output.decode()
    for shown in ("train / test", "batches", "epochs", "━", "\x1b["):
        assert shown in text


@pytest.fixture
def random_images(tmp_path: Path) -> Tensor:
    images = torch.randint(256, (30, 28, 28), dtype=torch.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", (torch.arange(30) % 10).to(torch.uint8))
    return images


def test_the_last_batch_may_be_smaller(small_run: Command, random_images: Tensor, tmp_path: Path) -> None:
    result = small_run("--data-dir", tmp_path, "--epochs", 1, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "run" / "batches.jsonl").read_text().splitlines()) == 2
