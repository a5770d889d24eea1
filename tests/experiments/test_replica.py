"""What one process of several knows of its model: nothing that keeps either alive."""

import gc
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

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
