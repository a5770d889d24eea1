"""A match: the best of ours against the best of a peer's, each at its loosest tolerances that meet the bounds."""

from collections.abc import Sequence
from typing import Any

import torch

from torchimplicit.experiments.bench import ours
from torchimplicit.experiments.bench.contender import Contender, Runner, Trial
from torchimplicit.experiments.bench.problems import Problem
from torchimplicit.experiments.bench.race import race
from torchimplicit.experiments.bench.reference import GRADIENT, RESIDUAL, Reference
from torchimplicit.experiments.bench.row import Measurement
from torchimplicit.experiments.bench.search import find_best, residual_curve


def play(
    problem: Problem,
    peers: Sequence[Sequence[Contender]],
    repeats: int,
    same: Sequence[Contender] = (),
    curves: bool = False,
    layer: bool = False,
) -> Measurement:
    """Search the tolerances of both sides, race the two winners, verify them once more, and keep the evidence.

    Args:
        problem: what is solved and differentiated.
        peers: groups of contenders; a later group plays only if no one of the earlier ones meets the bounds.
        repeats: rounds of the race.
        same: contenders of ours that use the peer's own method, for comparison.
        curves: whether to measure the time of the winners' forward passes against the residual, too.
        layer: whether the layer that we have for the cell may stand for ours, where it is quicker than the plain cell;
            also with its compiled loops.

    Raises:
        RuntimeError: if a side meets the bounds at no tolerance.
    """
    reference = Reference(problem)
    theirs, their_trials = None, ()
    for group in peers:
        theirs, their_trials = find_best(reference, group)
        if theirs is not None:
            break
    everything = ours.everything(problem)
    best, our_trials = find_best(reference, everything)
    alike, same_trials = find_best(reference, same)
    if alike is not None and (best is None or alike.seconds < best.seconds):  # Broyden, which the others leave out
        best = alike
    if theirs is None or best is None:
        raise RuntimeError(f"{'the peer' if theirs is None else 'ours'}: no tolerance meets the bounds")
    layers = ours.layers(problem) if layer else ()
    layered, layer_trials = find_best(reference, layers)
    contenders = {c.label: c for c in (*(c for group in peers for c in group), *everything, *same, *layers)}

    def ready(trial: Trial) -> Runner:
        return contenders[trial.label].make(trial.forward_tolerance, trial.backward_tolerance, trial.counts)

    runners = {"ours": ready(best), "theirs": ready(theirs)}
    if alike is not None:
        runners["same solver"] = ready(alike)
    if layered is not None:
        runners["layer"] = ready(layered)
    accuracies = {name: reference.judge(*runner.found()) for name, runner in runners.items()}
    result = race({name: runner.both for name, runner in runners.items()}, repeats)
    ratios = {name: result.ratio(name, "theirs") for name in runners if name != "theirs"}
    evidence: dict[str, Any] = {
        "bounds": {"residual": RESIDUAL, "gradient_error": GRADIENT},
        "spectral_radius": problem.radius,
        "ours": best.told(),
        "theirs": theirs.told(),
        "same_solver": alike.told() if alike is not None else None,
        "same_solver_ratio": ratios["same solver"].median if "same solver" in ratios else None,
        "layer": layered.told() if layered is not None else None,
        "layer_ratio": ratios["layer"].median if "layer" in ratios else None,
        "accuracy": {name: str(accuracy) for name, accuracy in accuracies.items()},
        "seconds": {name: result.median(name) for name in runners},
        "plain_cell_ratio": ratios["ours"].median,
        "cpu_ratio": result.cpu_ratio("ours", "theirs").median,
        "cell_seconds": _cell_seconds(problem),
        "within_bounds": {
            "ours": [trial.point() for trial in (*our_trials, *same_trials, *layer_trials)],
            "theirs": [trial.point() for trial in their_trials],
        },
        "curves": {
            name: residual_curve(reference, contenders[trial.label]) if curves else []
            for name, trial in (("ours", best), ("theirs", theirs))
        },
    }
    us = "layer" if "layer" in ratios and ratios["layer"].median < ratios["ours"].median else "ours"
    evidence["measured_as"] = us
    ratio = ratios[us]
    return Measurement(
        ratio.median,
        ratio.low,
        ratio.high,
        repeats,
        result.median(us),
        result.median("theirs"),
        accuracies[us].good and accuracies["theirs"].good,
        evidence,
    )


def _cell_seconds(problem: Problem) -> dict[str, float]:
    """What one evaluation and one product with Jᵀ take by themselves: no solver can be quicker than their sum."""
    z = problem.start.requires_grad_()
    value = problem.f(z)

    @torch.no_grad()
    def evaluate() -> object:
        return problem.f(z)

    def pull() -> object:
        return torch.autograd.grad(value, z, problem.cotangent, retain_graph=True)

    result = race({"evaluation": evaluate, "product": pull}, 3)
    return {name: result.cpu_median(name) for name in ("evaluation", "product")}
