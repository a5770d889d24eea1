"""Sums over the processes of one machine, by memory that they share."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from torchimplicit.experiments import mailbox
from torchimplicit.experiments.mailbox import Mailbox

COUNT = 1003


def pair(size: int = 2) -> list[Mailbox]:
    memory = torch.zeros(Mailbox.bytes_for(size, COUNT), dtype=torch.uint8)
    return [Mailbox(memory, rank, size, COUNT) for rank in range(size)]


def test_all_have_the_same_sum_turn_after_turn() -> None:
    boxes = pair(3)
    for turn in range(5):
        messages = [torch.randn(COUNT) * 10.0**turn for _ in boxes]
        for box, message in zip(boxes, messages, strict=True):
            box.post(message)
        sums = [box.collect() for box in boxes]
        assert all(torch.equal(found, sums[0]) for found in sums)
        torch.testing.assert_close(sums[0], sum(messages[1:], messages[0]))


def test_a_message_is_there_until_all_have_read_it() -> None:
    first, second = pair()
    first.post(torch.full((COUNT,), 1.0))
    second.post(torch.full((COUNT,), 2.0))
    assert bool((first.collect() == 3).all())
    first.post(torch.full((COUNT,), 10.0))  # the second one has not read the first message yet
    assert bool((second.collect() == 3).all())


def test_who_waits_for_one_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "_LONG", 0.01)
    first, second = pair()
    gone = multiprocessing.get_context("spawn").Process(target=time.time)
    gone.start()
    gone.join()
    second._processes[1] = gone.pid
    first.post(torch.ones(COUNT))
    with pytest.raises(ConnectionError, match="process 1 of 2 is gone"):
        first.collect()


def _in_turns(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found: list[Tensor] = []
    box = Mailbox.open(rank, 2, COUNT)
    if box is not None:
        for turn in range(200):
            box.post(torch.full((COUNT,), float(turn + 1000 * rank)))
            if turn % 50 == rank:
                time.sleep(0.005)  # now one is late, now the other
            found.append(box.collect())
    torch.save(found, folder / f"{rank}.pt")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(mailbox, "_cores", lambda: 1 + rank)
    assert Mailbox.open(rank, 2, COUNT) is None  # one of them cannot, so none does
    monkeypatch.undo()
    assert Mailbox.open(rank, 2, 1 << 50) is None  # more than there is
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    before = {*Path("/dev/shm").glob("torchimplicit-*"), *Path().iterdir()}
    multiprocessing.start_processes(_in_turns, (tmp_path,), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == len(second) == (200 if mailbox._cores() > 1 else 0)
    for turn, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, other) and bool((one == 2 * turn + 1000).all())
    assert {*Path("/dev/shm").glob("torchimplicit-*"), *Path().iterdir()} == before
