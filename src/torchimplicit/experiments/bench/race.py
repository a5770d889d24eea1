"""Timing in turns: contenders run one after the other, round by round, so that a slow moment hits all of them."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

LEAST = 0.05
"""Seconds that one timing should last at least: a contender that is faster is called several times in it."""


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios of adjacent runs, and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show `median (low-high)`."""
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class Race:
    """Seconds per call of each contender, one entry per round."""

    seconds: Mapping[str, Sequence[float]]

    def ratio(self, name: str, reference: str) -> Ratio:
        """Compare two contenders round by round: both times of a pair come from the same moment."""
        ratios = [ours / theirs for ours, theirs in zip(self.seconds[name], self.seconds[reference], strict=True)]
        return Ratio(median(ratios), min(ratios), max(ratios))

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return median(self.seconds[name])


def race(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    least: float = LEAST,
    clock: Callable[[], float] = time.perf_counter,
) -> Race:
    """Call every contender once to warm up, then time each in every round; the order is reversed after each round.

    Args:
        contenders: by name; each is called without arguments.
        repeats: rounds.
        least: seconds that a timing should last.
        clock: in seconds.
    """
    if repeats < 1:
        raise ValueError(f"repeats: must be at least 1, not {repeats}")
    loops = {name: _loops(run, least, clock) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(repeats):
        for name in order:
            seconds[name].append(_timed(contenders[name], loops[name], clock))
        order.reverse()
    return Race(seconds)


def _loops(run: Callable[[], object], least: float, clock: Callable[[], float]) -> int:
    """How many calls last `least` seconds, after one that warms up; the quicker of two is believed."""
    run()
    once = min(_timed(run, 1, clock), _timed(run, 1, clock))
    return max(1, math.ceil(least / max(once, 1e-9)))


def _timed(run: Callable[[], object], loops: int, clock: Callable[[], float]) -> float:
    with no_collection():
        began = clock()
        for _ in range(loops):
            run()
        return (clock() - began) / loops


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and not while the clock runs."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
