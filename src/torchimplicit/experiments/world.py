"""The processes of one run: alone, or those that torchrun started; what they share, and who writes."""

from __future__ import annotations

import gc
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.replica import Replica

Thing = TypeVar("Thing")


class ElsewhereError(ExperimentError):
    """What the first process has met, and will tell of."""


@dataclass(frozen=True)
class World:
    """This process's place among those of the run.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number on this machine.
        restarts: how often torchrun has started the run again after a process was lost.
        launch: torchrun's name for this launch, the same after a restart; empty without torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    launch: str = ""

    @property
    def leads(self) -> bool:
        """Whether it is the one that reads checkpoints, writes files and reports."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Of several GPUs of a machine, its own."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def replicated(self, model: nn.Module) -> Replica | None:
        """The model as several processes train it: what the first one has, with the mean of all gradients."""
        return None if self.size == 1 else Replica(model, self.rank, self.size)

    def gathered(self, numbers: list[float]) -> list[list[float]]:
        """The numbers of every process, in order."""
        if self.size == 1:
            return [numbers]
        mine = torch.tensor(numbers, dtype=torch.float64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def from_first(self, make: Callable[[], Thing]) -> Thing:
        """What the first process makes, for all; an `ExperimentError` that it meets, all raise."""
        if self.size == 1:
            return make()
        error, made = None, None
        if self.leads:
            try:
                made = make()
            except (ExperimentError, OSError) as met:
                error = met
        box: list[Any] = [made, None if error is None else str(error)]
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if box[1] is not None:
            raise ElsewhereError(box[1])
        return box[0]

    def in_turn(self, make: Callable[[], Thing]) -> Thing:
        """What every process makes for itself, the first one before the others: it may fetch what all then find."""
        if self.size == 1:
            return make()
        if not self.leads:
            self.from_first(lambda: None)
            return make()
        made: list[Thing] = []
        self.from_first(lambda: made.append(make()))
        return made[0]


def fresh(store: Any, rank: int, size: int, patience: float = 300.0) -> Any:
    """torchrun's store without what an earlier attempt has left in it: all processes' must agree on a name for theirs.

    torchrun keeps its store when it starts the processes again (torch 2.13), with the addresses of those that were
    lost, to which gloo would then connect: it fails, or waits for ever. How often it has done so is no such name: it
    may differ between machines. So the first process makes one up, and the others ask for it under names of their own,
    which are new, too; it answers until all have said that they know.

    Raises:
        ExperimentError: some process does not come.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + patience
    if rank:
        store.set(f"torchimplicit/ask/{rank}", name)
        answer = store.get(f"torchimplicit/answer/{name}").decode()
        store.set(f"torchimplicit/known/{answer}/{rank}", "")
        return dist.PrefixStore(answer, store)  # pyright: ignore[reportPrivateImportUsage]
    missing = set(range(1, size))
    while missing:
        for other in [*missing]:
            if store.check([f"torchimplicit/known/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"torchimplicit/ask/{other}"]):
                # Of an earlier attempt, perhaps: then nobody reads it.
                asking = store.get(f"torchimplicit/ask/{other}").decode()
                store.set(f"torchimplicit/answer/{asking}", name)
        if missing and time.monotonic() > end:
            raise ExperimentError(f"torchrun: processes {sorted(missing)} have not come in {patience:.0f} seconds")
        time.sleep(0.02 if missing else 0.0)
    return dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def join(device: str) -> Iterator[World]:
    """The world that this process belongs to, for the length of a run."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield World(restarts=restarts, launch=launch)
        return
    # Numbers are exchanged on the CPU, gradients where they are.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, size = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=fresh(store, rank, size), rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        yield World(dist.get_rank(), dist.get_world_size(), local, restarts, launch)
    finally:
        _leave()


def _leave() -> None:
    """End what `join` began, and wait for its threads.

    They need Python's lock to let go of the tensors that they have exchanged, and abort the process if Python has
    ended by then (torch 2.13). They end with the group; the group, when nothing knows it any more.
    """
    gc.collect()
    dist.destroy_process_group()
    time.sleep(0.05)
