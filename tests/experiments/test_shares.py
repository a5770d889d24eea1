"""How several processes divide a batch."""

import pytest
import torch

from torchimplicit.experiments.errors import ExperimentError
from torchimplicit.experiments.shares import Shares

INDEX = torch.arange(1000)


def test_a_batch_is_divided_in_order_and_evenly() -> None:
    index = torch.arange(10)
    shares = [Shares(rank, 4) for rank in range(4)]
    for share in shares:
        share.observe([1.0, 9.0, 1.0, 1.0])  # which does not matter
    assert [share.of(index).tolist() for share in shares] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    assert shares[3].of(index[:2]).tolist() == []


@pytest.mark.parametrize("size", [2, 3])
def test_parts_by_speed_take_the_same_time_in_the_end(size: int) -> None:
    speed, fixed = [1.0, 1.6, 1.2][:size], 0.2 * len(INDEX) / size  # what a step takes however few the samples
    shares = [Shares(rank, size, "speed") for rank in range(size)]
    for _ in range(60):
        parts = [share.of(INDEX) for share in shares]
        assert torch.equal(torch.cat(parts), INDEX)
        times = [(fixed + len(part)) / s for part, s in zip(parts, speed, strict=True)]
        for share in shares:
            share.observe([len(part) / t for part, t in zip(parts, times, strict=True)])
    even = max((fixed + len(INDEX) / size) / s for s in speed)
    assert max(times) < 1.02 * min(times) < 0.9 * even


def test_a_speed_that_is_not_known_or_absurd_moves_little() -> None:
    shares = Shares(0, 2, "speed")
    shares.observe([0.0, 5.0])
    assert len(shares.of(INDEX)) == 500
    for _ in range(99):
        shares.observe([1e9, 1.0])
    assert len(shares.of(INDEX)) == 750
    assert torch.equal(Shares(0, 1, "speed").of(INDEX), INDEX)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ExperimentError, match=r"--shares: unknown kind 'odd', valid ones are even, speed"):
        Shares.check("odd")
