"""The training job under torchrun: one process's numbers, one writer, and a run that survives the loss of a process."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from torchimplicit.experiments import world
from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.metrics import BatchRecord, Solves
from torchimplicit.experiments.world import ElsewhereError, World

OPTIONS = ("--epochs", 2, "--batch-size", 37, "--checkpoint-every", 2, "--threads", 1, "--lr-schedule", "1:0.05")
"""The last of 7 batches an epoch has 18 images; parts of a batch of 37 differ."""
RUN = "from torchimplicit.experiments.cli import app; import sys; app(sys.argv[1:])"
KILLER = """
import os, signal, sys
from torchimplicit.experiments import train
from torchimplicit.experiments.cli import app

original, left = train.train_batch, 11

def counted(*arguments, **options):
    global left
    left -= 1
    if left == 0 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

train.train_batch = counted
app(sys.argv[1:])
"""
SPOILER = """
import os, sys
from torchimplicit.experiments import step
from torchimplicit.experiments.cli import app

original, left = step.nn.functional.cross_entropy, 3

def spoilt(logits, labels, **options):
    global left
    left -= logits.requires_grad
    return original(logits, labels, **options) + (float("inf") if left == 0 and os.environ["RANK"] == "1" else 0.0)

step.nn.functional.cross_entropy = spoilt
app(sys.argv[1:])
"""
"""Once the second process's loss is infinite, and the gradient that it has by itself is finite."""
TIMES = {"seconds", "test_seconds"}
CALLS = {"evaluations_forward", "evaluations_backward", "test_evaluations"}
"""Of all processes together, each of which makes as many for its part as it needs."""


def _launch(
    code: str, folder: Path, data: Path, processes: int, *more: object, restarts: int = 1
) -> subprocess.CompletedProcess[str]:
    program = folder.with_name(f"run{processes}.py")
    program.write_text(code)
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--max-restarts", restarts]
    job = [program, "train", "mnist", "--data-dir", data, "--out", folder, *OPTIONS, *more]
    command = map(str, [sys.executable, *(starter if processes > 1 else []), *job])
    environment = {k: v for k, v in os.environ.items() if k != "TORCHIMPLICIT_DATA"} | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)


def _rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    left_out = TIMES | CALLS
    lines = (folder / name).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in left_out} for line in lines]


def _assert_alike(found: Any, expected: Any) -> None:
    """Equal counts, and figures that differ by rounding at most."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-4)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_alike(found[key], expected[key])
    else:
        assert found == expected


@pytest.fixture(scope="module")
def alone(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = _launch(RUN, folder, small_data, 1)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run of two, one of which is killed in the second epoch, between two checkpoints."""
    folder = tmp_path_factory.mktemp("two") / "run"
    # Gloo may abort on its way down or fail to connect on a busy machine: one more loss to get over.
    done = _launch(KILLER, folder, small_data, 2, "--safetensors", restarts=5)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes_train_as_one_and_survive_a_kill(alone: Path, killed: tuple[Path, str]) -> None:
    folder, output = killed
    assert re.search(r"started again \([1-5]\), resuming at epoch 1, batch 2", output)
    assert output.count("data: ") >= output.count("run: ") >= 2  # by the first process, in each attempt
    mine, theirs = _rows(folder), _rows(alone)
    assert len(mine) == len(theirs) == 2
    for found, expected in zip(mine, theirs, strict=True):
        steps = found.pop("steps"), expected.pop("steps")
        assert steps[0] == pytest.approx(steps[1], rel=0.02)  # where a residual ends just at the tolerance
        found.pop("test_steps"), expected.pop("test_steps")
        _assert_alike(found, expected)
    batches = _rows(folder, "batches.jsonl")
    assert [b["batch"] for b in batches] == [*range(7)] * 2
    for found, expected in zip(batches, _rows(alone, "batches.jsonl"), strict=True):
        assert (found["epoch"], found["skipped"]) == (expected["epoch"], None)
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-4)
    weights = [torch.load(f / "checkpoint.pt", weights_only=True)["model"] for f in (folder, alone)]
    for name, expected in weights[1].items():
        torch.testing.assert_close(weights[0][name], expected, rtol=0, atol=2e-6)
    assert not [*folder.glob(".*.tmp")]


@pytest.mark.slow
def test_the_weights_as_safetensors_are_those_of_the_checkpoint(killed: tuple[Path, str]) -> None:
    from safetensors.torch import load_file

    weights = load_file(killed[0] / "model.safetensors")
    expected = torch.load(killed[0] / "checkpoint.pt", weights_only=True)["model"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_makes_all_skip_the_step(small_data: Path, tmp_path: Path) -> None:
    done = _launch(SPOILER, tmp_path / "run", small_data, 2, restarts=5)
    assert done.returncode == 0, done.stderr
    batches = _rows(tmp_path / "run", "batches.jsonl")
    assert [b["batch"] for b in batches if b["skipped"]] == [2]
    assert batches[2]["skipped"] == "non-finite loss"
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert all(bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.slow
def test_an_error_is_told_once_and_ends_all(alone: Path, small_data: Path) -> None:
    before = (alone / "metrics.jsonl").read_bytes()
    done = _launch(RUN, alone, small_data, 2)
    assert done.returncode == 1
    # By the first process, in each of two attempts: the run in the folder is not of this launch.
    assert done.stderr.count("is not empty; add --resume") == 2
    assert (alone / "metrics.jsonl").read_bytes() == before


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with world.join("cpu") as here:
        assert here == World()
        assert here.leads
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with world.join("cpu") as here:
        assert here.restarts == 2


def test_processes_agree_on_a_store_without_what_a_lost_attempt_has_left() -> None:
    whole = torch.distributed.HashStore()
    # Of an attempt before: what the others asked, were told, and where they could be reached.
    for rank in (1, 2):
        whole.set(f"torchimplicit/ask/{rank}", "old")
    whole.set("torchimplicit/answer/old", "older")
    whole.set("address", "of one who is lost")
    with ThreadPoolExecutor(3) as pool:
        late = [pool.submit(world.fresh, whole, 0, 3, 30.0)]
        time.sleep(0.1)  # the first one sees nothing but the old questions
        late += [pool.submit(world.fresh, whole, rank, 3) for rank in (1, 2)]
        stores = [made.result(timeout=60) for made in late]
    stores[0].set("address", "of the first")
    assert [store.get("address") for store in stores] == [b"of the first"] * 3
    assert whole.get("address") == b"of one who is lost"
    with pytest.raises(ExperimentError, match=r"processes \[1, 2\] have not come"):
        world.fresh(torch.distributed.HashStore(), 0, 3, patience=0.1)


def test_each_process_has_a_gpu_of_its_own() -> None:
    assert [World(1, 2, local_rank=1).device(name) for name in ("cpu", "cuda", "cuda:5")] == ["cpu", "cuda:1", "cuda:5"]


def test_records_of_parts_make_that_of_the_batch() -> None:
    solves = Solves(10, 7, 60, 9, 5, 3, {"STALLED": 1}, {"NONFINITE": 2})
    part = BatchRecord(1, 2, 10, 0.5, 4, solves)
    # The others' numbers are twice and three times this one's.
    whole = part.of_all([[by * n for n in part.numbers()] for by in (1, 2, 3)])
    assert (whole.epoch, whole.batch, whole.size, whole.wrong) == (1, 2, 60, 24)
    # The sum of the losses is 5, and here 10 and 15 elsewhere.
    assert whole.loss == pytest.approx(30 / 60)
    assert whole.solves == Solves(60, 21, 360, 54, 30, 18, {"STALLED": 6}, {"NONFINITE": 12})
    nothing = BatchRecord(1, 2, 0, float("nan"), 0, Solves())
    assert part.of_all([part.numbers(), nothing.numbers()]) == part


def test_what_the_first_process_meets_is_no_error_of_its_own_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[list[Any]] = []

    def broadcast(box: list[Any], src: int) -> None:
        assert src == 0
        if boxes:
            box[:] = boxes[0]
        else:
            boxes.append([*box])

    monkeypatch.setattr(world.dist, "broadcast_object_list", broadcast)

    def fail() -> None:
        raise ExperimentError("--out: full")

    with pytest.raises(ExperimentError, match="--out: full") as first:
        World(0, 2).from_first(fail)
    assert not isinstance(first.value, ElsewhereError)
    with pytest.raises(ElsewhereError, match="--out: full"):
        World(1, 2).from_first(lambda: pytest.fail("made twice"))
    boxes.clear()
    assert World(0, 2).from_first(lambda: 3) == 3
    assert World(1, 2).from_first(lambda: 4) == 3
