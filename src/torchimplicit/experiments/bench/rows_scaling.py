"""How the advantage over TorchDEQ changes with the size of a sample and of the batch; no bars, two plots."""

from collections.abc import Sequence
from typing import Any

from torchimplicit.experiments.bench import ours, peer_torchdeq
from torchimplicit.experiments.bench.contender import Contender, Runner
from torchimplicit.experiments.bench.problems import Problem, make_problem
from torchimplicit.experiments.bench.race import race
from torchimplicit.experiments.bench.reference import Reference
from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.bench.search import find_best

RADIUS = 0.9
FEATURES = (32, 128, 512, 2048)
BATCHES = (1, 8, 64, 256, 1024)


def _point(problem: Problem, repeats: int) -> dict[str, Any]:
    reference = Reference(problem)
    runners: dict[str, Runner] = {}
    methods: dict[str, str] = {}
    sides: dict[str, Sequence[Contender]] = {
        "ours": ours.short_list(problem),
        "theirs": [c for solver in peer_torchdeq.SOLVERS for c in peer_torchdeq.torchdeq(problem, solver)[:1]],
    }
    for side, contenders in sides.items():
        best, _ = find_best(reference, contenders)
        if best is None:
            raise RuntimeError(f"{side} met the bounds at no tolerance: {problem.name}, batch {len(problem.x)}")
        make = next(c.make for c in contenders if c.label == best.label)
        runners[side] = make(best.forward_tolerance, best.backward_tolerance, best.counts)
        methods[side] = best.label
    result = race({side: runner.both for side, runner in runners.items()}, repeats)
    return {
        "features": problem.x.shape[1],
        "batch": len(problem.x),
        "ratio": result.ratio("ours", "theirs").median,
        "seconds": {side: result.median(side) for side in runners},
        "methods": methods,
    }


def _measure(sizes: Sequence[tuple[int, int]], settings: Settings) -> Measurement:
    """The largest of the ratios; each size is a problem of its own."""
    points = [
        _point(make_problem(f"tanh-{n}", RADIUS, settings.seed, batch), settings.repeats)
        for n, batch in (sizes[::2] if settings.quick else sizes)
    ]
    ratios = [point["ratio"] for point in points]
    worst = points[ratios.index(max(ratios))]["seconds"]
    return Measurement(
        max(ratios),
        min(ratios),
        max(ratios),
        settings.repeats,
        worst["ours"],
        worst["theirs"],
        True,
        {"points": points, "spectral_radius": RADIUS},
    )


ROWS = (
    Row(
        "scaling/features",
        f"forward + backward against TorchDEQ's best, batch 100, features {FEATURES[0]} to {FEATURES[-1]}: the worst",
        None,
        lambda settings: _measure([(n, 100) for n in FEATURES], settings),
        needs=("torchdeq",),
    ),
    Row(
        "scaling/batch",
        f"forward + backward against TorchDEQ's best, 100 features, batch {BATCHES[0]} to {BATCHES[-1]}: the worst",
        None,
        lambda settings: _measure([(100, batch) for batch in BATCHES], settings),
        needs=("torchdeq",),
    ),
)
