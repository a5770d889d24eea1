"""How several processes divide a batch: evenly, or so that all of them are done with their parts at the same time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchimplicit.experiments.errors import ExperimentError

SHARES = ("even", "speed")
_RATE = 0.2  # how much the last step counts
_RANGE = 0.5  # no part is further from the even one than this fraction of it


class Shares:
    """The parts of a batch.

    A step takes as long as its slowest process, and cores are seldom equally fast for long, where others compute, too.
    All processes must be told the same speeds, in the same order.

    Args:
        rank: of this process.
        size: how many there are.
        kind: `"even"`, parts that differ by one at most, or `"speed"`, parts in proportion to the processes' speeds.
    """

    def __init__(self, rank: int, size: int, kind: str = "even") -> None:
        self.rank, self.size, self.kind = rank, size, kind
        self._weights = [1 / size] * size

    @staticmethod
    def check(kind: str) -> None:
        """Raise an `ExperimentError` if there is no such kind."""
        if kind not in SHARES:
            raise ExperimentError(f"--shares: unknown kind '{kind}', valid ones are {', '.join(SHARES)}")

    def observe(self, speeds: Sequence[float]) -> None:
        """Learn the processes' speeds, in samples per second; 0 for one that is not known."""
        if self.kind == "even" or not all(speed > 0 for speed in speeds):
            return
        total, even = sum(speeds), 1 / self.size
        weights = [w + _RATE * (s / total - w) for w, s in zip(self._weights, speeds, strict=True)]
        weights = [min(max(w, (1 - _RANGE) * even), (1 + _RANGE) * even) for w in weights]
        self._weights = [w / sum(weights) for w in weights]

    def of(self, index: Tensor) -> Tensor:
        """This process's part of a batch of indices, in order; it may be empty."""
        if self.size == 1:
            return index
        if self.kind == "even":
            return index.tensor_split(self.size)[self.rank]
        ends = [round(sum(self._weights[:i]) * len(index)) for i in range(self.size)] + [len(index)]
        return index[ends[self.rank] : ends[self.rank + 1]]
