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

Clock = Callable[[], float]


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
    """Seconds per call of each contender, one entry per round: on the clock, and of the processor.

    The two agree on a machine that has nothing else to do; where it has, the processor's are the better ones.
    """

    seconds: Mapping[str, Sequence[float]]
    cpu_seconds: Mapping[str, Sequence[float]]

    def ratio(self, name: str, reference: str) -> Ratio:
        """Compare two contenders round by round: both times of a pair come from the same moment."""
        return _compare(self.seconds[name], self.seconds[reference])

    def cpu_ratio(self, name: str, reference: str) -> Ratio:
        """The same by the time of the processor."""
        return _compare(self.cpu_seconds[name], self.cpu_seconds[reference])

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return median(self.seconds[name])

    def cpu_median(self, name: str) -> float:
        """Median seconds of the processor per call."""
        return median(self.cpu_seconds[name])


def _compare(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def race(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    least: float = LEAST,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> Race:
    """Call every contender once to warm up, then time each in every round; the order is reversed after each round.

    Args:
        contenders: by name; each is called without arguments.
        repeats: rounds.
        least: seconds that a timing should last.
        clock: in seconds.
        cpu_clock: in seconds of the processor.
    """
    if repeats < 1:
        raise ValueError(f"repeats: must be at least 1, not {repeats}")
    clocks = (clock, cpu_clock)
    loops = {name: _loops(run, least, clocks) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(repeats):
        for name in order:
            wall, cpu = _timed(contenders[name], loops[name], clocks)
            seconds[name].append(wall)
            cpu_seconds[name].append(cpu)
        order.reverse()
    return Race(seconds, cpu_seconds)


def _loops(run: Callable[[], object], least: float, clocks: tuple[Clock, Clock]) -> int:
    """How many calls last `least` seconds, after one that warms up; the quicker of two is believed."""
    run()
    once = min(_timed(run, 1, clocks)[0] for _ in range(2))
    return max(1, math.ceil(least / max(once, 1e-9)))


def _timed(run: Callable[[], object], loops: int, clocks: tuple[Clock, Clock]) -> tuple[float, float]:
    clock, cpu_clock = clocks
    with no_collection():
        began, cpu_began = clock(), cpu_clock()
        for _ in range(loops):
            run()
        ended, cpu_ended = clock(), cpu_clock()
    return (ended - began) / loops, (cpu_ended - cpu_began) / loops


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
