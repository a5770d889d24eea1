"""The best that contenders can do within the bounds: the loosest tolerances that suffice, and then the quickest."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torchimplicit.experiments.bench.contender import Contender, Trial
from torchimplicit.experiments.bench.race import race
from torchimplicit.experiments.bench.reference import Accuracy, Reference

# A little below the round numbers, which are the bounds: what meets a bound in float32 exactly may miss it in float64.
FORWARD = tuple(0.97 * 10 ** (-k / 4) for k in range(8, 27))
"""Forward tolerances that are tried, from 1e-2 to 3e-7 by quarters of a decade."""
BACKWARD = tuple(0.97 * 10 ** (-k / 4) for k in range(6, 25))
"""Backward tolerances that are tried, from 3e-2 to 1e-6."""
CURVE = tuple(10 ** (-k / 2) for k in range(2, 13))
"""Forward tolerances of a curve of time against residual."""
_BEGIN = 11
"""Index of the forward tolerance that most contenders need, about 2e-5."""
_CLOSE = 1.7
"""Who took so many times the quickest time, or more, at a first look, is out."""


def find_best(
    reference: Reference, contenders: Sequence[Contender], hopeless: float = float("inf")
) -> tuple[Trial | None, tuple[Trial, ...]]:
    """The quickest trial within the bounds among several contenders, if there is one, and all trials within them.

    A look at the clock is not enough to tell which is quickest: those that may be race one another.

    Args:
        reference: judges them.
        contenders: who may play.
        hopeless: seconds beyond which a contender is not looked at further.
    """
    trials: list[Trial] = []
    finalists: list[tuple[Trial, Callable[[], object]]] = []
    for contender in contenders:
        for trial in search(reference, contender, hopeless):
            trials.append(trial)
            runner = contender.make(trial.forward_tolerance, trial.backward_tolerance, trial.counts)
            finalists.append((trial, runner.both))
            hopeless = min(hopeless, 3 * trial.seconds)
    if not finalists:
        return None, ()
    quickest = min(trial.seconds for trial, _ in finalists)
    finalists = [final for final in finalists if final[0].seconds <= _CLOSE * quickest]
    if len(finalists) == 1:
        return finalists[0][0], tuple(trials)
    result = race({str(i): both for i, (_, both) in enumerate(finalists)}, 5, least=0.05)
    return finalists[min(range(len(finalists)), key=lambda i: result.cpu_median(str(i)))][0], tuple(trials)


def search(reference: Reference, contender: Contender, hopeless: float = float("inf")) -> list[Trial]:
    """The pairs of tolerances on the grid that just meet both bounds.

    First the loosest forward tolerance that meets the bound on the residual, with the loosest backward tolerance that
    then meets the bound on the gradients. A more exact solution may allow a looser adjoint: the next tighter forward
    tolerances follow, as long as that is so. What meets a bound is taken to meet it at all tighter tolerances.
    """

    def solved(i: int) -> bool:
        z = contender.make(FORWARD[i], BACKWARD[0], None).solution()
        return reference.solves(z)

    def accuracy(i: int, j: int) -> Accuracy:
        return reference.judge(*contender.make(FORWARD[i], BACKWARD[j], None).found())

    first_look = contender.make(FORWARD[_BEGIN], BACKWARD[0], None)
    first_look.solution()  # compiles what is compiled
    if _clocked(first_look.solution) > hopeless:
        return []
    first = _loosest_near(solved, _BEGIN, len(FORWARD))
    if first is None:
        return []
    trials: list[Trial] = []
    tightest = len(BACKWARD) - 1
    for i in range(first, len(FORWARD)):
        if tightest < 0:
            break
        if not accuracy(i, tightest).good:
            if trials:
                break  # no looser adjoint than before
            continue  # it is the forward pass that holds the gradient up
        j = _loosest(lambda j, i=i: accuracy(i, j).good, tightest + 1)
        if j is None:  # rounding decides
            j = tightest
        trial = _attempt(reference, contender, FORWARD[i], BACKWARD[j])
        if trial.accuracy.good:
            trials.append(trial)
        if trial.seconds > hopeless:
            break
        tightest = j - 1
    return trials


def _loosest(suffices: Callable[[int], bool], count: int) -> int | None:
    """The first of `count` indices that suffices, if all behind it do, by bisection; None if the last does not."""
    low, high = 0, count - 1
    if not suffices(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _loosest_near(suffices: Callable[[int], bool], begin: int, count: int) -> int | None:
    """The same by single steps from a guess: the tightest tolerances may be out of reach, and take forever."""
    if suffices(begin):
        while begin > 0 and suffices(begin - 1):
            begin -= 1
        return begin
    return next((i for i in range(begin + 1, count) if suffices(i)), None)


def _attempt(reference: Reference, contender: Contender, forward: float, backward: float) -> Trial:
    """Run a contender at one pair of tolerances: count, judge as it will run, and look at the clock."""
    counts = contender.make(forward, backward, None).count()
    runner = contender.make(forward, backward, counts)
    accuracy = reference.judge(*runner.found())
    before, both = (min(_clocked(run), _clocked(run)) for run in (runner.forward, runner.both))
    after = max(0.0, both - before)
    return Trial(contender.label, forward, backward, accuracy, counts, before, after, runner.settings)


def residual_curve(reference: Reference, contender: Contender) -> list[dict[str, Any]]:
    """Seconds of the forward pass against the residual that it reaches, over forward tolerances from 0.1 to 1e-6."""
    points = []
    for tolerance in CURVE:
        counts = contender.make(tolerance, BACKWARD[0], None).count()
        runner = contender.make(tolerance, BACKWARD[0], counts)
        residual = reference.residual(runner.solution())
        seconds = min(_clocked(runner.forward) for _ in range(3))
        points.append({"residual": residual, "seconds": seconds, "evaluations": counts.forward})
    return points


def _clocked(run: Callable[[], object]) -> float:
    """Seconds of the processor: a search is long, and a machine seldom quiet."""
    began = time.process_time()
    run()
    return time.process_time() - began
