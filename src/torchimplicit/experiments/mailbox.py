"""Sums over the processes of one machine, by memory that they share."""

from __future__ import annotations

import os
import platform
import tempfile
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_LINE = 64  # bytes of a cache line: no two processes write to the same one
_SPIN = 2e-3  # seconds of waiting after which a process lets others have its core
_LONG = 1.0  # after which it asks whether the others are still there


class Mailbox:
    """A place for a message of each process, which the others read there.

    A message on its way through a socket and a thread takes as long as a dozen steps of a small layer, and the process
    that waits for it goes to sleep; here it is a copy, and a number that says that it is complete. Each process has two
    places, used in turn: when it comes back to the first, the others have sent the second message, and so have read
    the first.

    Args:
        memory: shared, of `bytes_for(size, count)` bytes, zero.
        rank: of this process.
        size: how many there are.
        count: of numbers in a message, float32.
    """

    def __init__(self, memory: Tensor, rank: int, size: int, count: int) -> None:
        self.rank, self.size, self.count = rank, size, count
        head = size * _LINE
        # NumPy's view reads what is there now, at a fraction of the cost of torch's.
        lines = memory[:head].view(torch.int64).view(size, -1).numpy()
        self._sent, self._processes = lines[:, 0], lines[:, 1]
        self._processes[rank] = os.getpid()
        self._places = memory[head:].view(torch.float32).view(2, size, -1)[:, :, :count]
        self._number = 0

    @staticmethod
    def bytes_for(size: int, count: int) -> int:
        """Of the memory."""
        line = -(-4 * count // _LINE) * _LINE
        return size * (_LINE + 2 * line)

    @staticmethod
    def open(rank: int, size: int, count: int) -> Mailbox | None:
        """One for the processes of the default group, who must all call this; None where they cannot share memory.

        That is on several machines, where there is too little of it, on fewer cores than processes, of which some must
        sleep, and on processors that may show a process what another one wrote in an order of their own.
        """
        token, length = uuid.uuid4().hex.encode(), Mailbox.bytes_for(size, count)
        path = _reserved(token, length + _LINE) if rank == 0 else None
        box: list[object] = [str(path), token]
        dist.broadcast_object_list(box, src=0)
        memory = None
        if _cores() >= size and platform.machine().lower() in ("x86_64", "amd64"):
            memory = _mapped(Path(str(box[0])), box[1], length)
        able = torch.tensor(float(memory is not None))
        dist.all_reduce(able, op=dist.ReduceOp.MIN)
        if path is not None:
            path.unlink()  # the memory lives on with those who have it
        return Mailbox(memory, rank, size, count) if memory is not None and bool(able) else None

    def post(self, message: Tensor) -> None:
        """Send a message, `(count,)`, to all others."""
        self._number += 1
        self._places[self._number % 2, self.rank].copy_(message)
        self._sent[self.rank] = self._number

    def collect(self) -> Tensor:
        """The sum of all messages of this turn, the same to the last bit in every process; waits for them."""
        began = time.perf_counter()
        while int(self._sent.min()) < self._number:
            waited = time.perf_counter() - began
            if waited > _SPIN:
                time.sleep(2e-5 if waited < _LONG else _LONG)
            if waited > _LONG:
                self._look_for_others()
        return self._places[self._number % 2].sum(0)

    def _look_for_others(self) -> None:
        """Raise a `ConnectionError` if one of those that have not sent is gone."""
        for rank in range(self.size):
            if self._sent[rank] < self._number and not _runs(int(self._processes[rank])):
                raise ConnectionError(f"process {rank} of {self.size} is gone")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _reserved(token: bytes, length: int) -> Path | None:
    """A new file of this length in memory, if there is so much; it begins with the token."""
    shared = Path("/dev/shm")
    handle, name = tempfile.mkstemp(prefix="torchimplicit-", dir=shared if os.access(shared, os.W_OK) else None)
    path = Path(name)
    with os.fdopen(handle, "wb") as file:
        file.write(token)
        file.flush()
        try:
            # To write to what is not there would be the end of the process.
            os.posix_fallocate(handle, 0, length)
        except (OSError, AttributeError):  # of the operating system, or of Python for one
            path.unlink()
            return None
    return path


def _mapped(path: Path, token: object, length: int) -> Tensor | None:
    """The memory of a file, if it is there and the one that is meant."""
    assert isinstance(token, bytes)
    try:
        with path.open("rb") as file:
            if file.read(len(token)) != token:
                return None
        memory = torch.from_file(str(path), shared=True, size=length + _LINE, dtype=torch.uint8)
    except (OSError, RuntimeError):
        return None
    return memory[_LINE:]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
