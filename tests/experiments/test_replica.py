"""A model that several processes train: what their messages come to, and what one of them knows of its model."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from torchimplicit.experiments.replica import Replica


def test_a_replica_is_gone_when_nobody_knows_it(tmp_path: Path) -> None:
    """Its group's threads end with it; those that outlive Python abort the process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = torch.nn.Linear(3, 2)
        replica = Replica(model, 0, 1)
        done: list[int] = []
        loss = replica(torch.ones(4, 3)).sum()
        parts = replica.backward(loss.backward, lambda: [1.0, float("inf"), 3.0], lambda: done.append(1))
        assert parts == [[1.0, float("inf"), 3.0]] and done == [1]
        assert model.weight.grad is not None and torch.equal(model.weight.grad, torch.full((2, 3), 4.0))
        known = weakref.ref(replica._model)
        del replica, model, loss
        gc.collect()
        assert known() is None
    finally:
        dist.destroy_process_group()


def exchange(rank: int, size: int, folder: Path) -> None:
    """Three steps of one process; leaves its gradients and what it was told."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3))
    replica, found = Replica(model, rank, size), []
    for step in range(3):
        loss = replica(torch.full((4, 3), float(10 * step + rank))).sum()
        parts = replica.backward(loss.backward, lambda step=step: [float(rank), float(step), float("nan")])
        found.append((model.weight.grad.clone(), [part[:2] for part in parts], [part[2] for part in parts]))
        model.weight.grad.zero_()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_all_have_the_mean_of_the_gradients_and_the_numbers_of_each(size: int, tmp_path: Path) -> None:
    """Two processes send each other all they have, more of them take sums in parts."""
    multiprocessing.start_processes(exchange, (size, tmp_path), nprocs=size, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for step in range(3):
        gradient = torch.full((2, 3), 4.0 * (10 * step + (size - 1) / 2))
        for of_rank in found:
            mean, parts, nans = of_rank[step]
            assert torch.equal(mean, found[0][step][0])
            torch.testing.assert_close(mean, gradient)
            assert parts == [[float(rank), float(step)] for rank in range(size)]
            assert all(nan != nan for nan in nans)
