"""Two processes on the CPU: DDP, FSDP2 and cells that communicate give what one process gives, to rounding."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti

from .job import COUNTS, SOLVERS, Standardised, gradients, loss_of, problem

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    job = Path(__file__).with_name("job.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", job, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


def _one_process(**options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Value and gradients of all samples in this process."""
    model, x = problem(**options)
    x.requires_grad_()
    value = model(x)
    loss_of(value).backward()
    return value.detach(), x.grad, gradients(model)


def _check(parts: list[dict[str, Any]], expected: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
    value, of_x, of_parameters = expected
    torch.testing.assert_close(torch.cat([p["value"] for p in parts]), value, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat([p["x"] for p in parts]), of_x, rtol=1e-9, atol=1e-10)
    for part in parts:
        assert part["gradients"].keys() == of_parameters.keys()
        for name, gradient in of_parameters.items():
            torch.testing.assert_close(part["gradients"][name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_ranks_that_need_different_numbers_of_steps_share_their_gradients(
    found: list[dict[str, Any]], name: str
) -> None:
    parts = [f["ddp"][name] for f in found]
    _check(parts, _one_process(solver=SOLVERS[name]))
    evaluations = [part["evaluations"][0] for part in parts]
    assert evaluations[0] < evaluations[1]  # the second one's samples are the harder ones


@pytest.mark.parametrize("what", ["model", "layer"])
def test_parameters_may_be_sharded(found: list[dict[str, Any]], what: str) -> None:
    _check([f["fsdp"][what] for f in found], _one_process())


def test_the_cell_itself_may_be_sharded_where_the_processes_solve_together(found: list[dict[str, Any]]) -> None:
    parts = [f["fsdp of the cell"]["cell"] for f in found]
    _check(parts, _one_process())
    assert parts[0]["evaluations"] == parts[1]["evaluations"]  # each of which gathers the parameters


@pytest.mark.parametrize("name", SOLVERS)
def test_processes_that_solve_together_evaluate_equally_often(found: list[dict[str, Any]], name: str) -> None:
    parts = [f["together"][name] for f in found]
    _check(parts, _one_process(solver=SOLVERS[name]))
    assert parts[0]["evaluations"] == parts[1]["evaluations"]
    # Each sample stops by itself all the same, and is told of to its own process.
    for part, own in zip(parts, [f["ddp"][name] for f in found], strict=True):
        assert part["steps"] == own["steps"]
        assert part["status"] == part["adjoint"] == [0] * len(own["steps"])


@pytest.mark.parametrize("name", SOLVERS)
def test_a_cell_with_statistics_over_all_processes(found: list[dict[str, Any]], name: str) -> None:
    parts = [f["coupled"][name] for f in found]
    _check(parts, _one_process(cell=Standardised, solver=SOLVERS[name], batch_dims=0))
    assert parts[0]["evaluations"] == parts[1]["evaluations"]
    assert parts[0]["status"] == parts[1]["status"] == 0


def test_a_failed_sample_of_one_process_poisons_nobody(found: list[dict[str, Any]]) -> None:
    statuses = [f["failed"]["status"] for f in found]
    assert statuses == [[0] * COUNTS[0], [0] * (COUNTS[1] - 1) + [ti.Status.NONFINITE]]
    for f in found:
        assert f["failed"]["gradient"].isfinite().all()


def test_second_derivatives_of_a_common_solve(found: list[dict[str, Any]]) -> None:
    model, x = problem()
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss_of(model[1](x)), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(torch.cat([f["second order"] for f in found]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, words",
    [
        ("torch.func", "not under torch.func transforms"),
        ("other features", "(rows, unknowns) are [(5, 4), (3, 5)]"),
        ("another state", "have come to different states"),
    ],
)
def test_every_process_says_what_cannot_be(found: list[dict[str, Any]], name: str, words: str) -> None:
    for f in found:
        assert words in f["refusals"][name]


def test_alone_a_process_is_the_world() -> None:
    model, x = problem(process_group="world")
    expected = _one_process()
    torch.testing.assert_close(model(x).detach(), expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("group", ["word", 3, torch.nn.Identity()], ids=repr)
def test_what_is_no_group_is_refused(group: Any) -> None:
    model, x = problem(process_group=group)
    with pytest.raises(TypeError, match=r"is no group; give a torch\.distributed\.ProcessGroup"):
        model(x)


def test_memories_of_one_process_and_common_solves_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="init=Previous"):
        problem(process_group="world", init=ti.nn.Previous())


def test_only_the_calls_that_can_be_spread_take_a_group() -> None:
    with pytest.raises(TypeError, match="unknown option 'process_group'"):
        ti.minimize(lambda z: (z**2).sum(), torch.ones(2), process_group="world")  # pyright: ignore
