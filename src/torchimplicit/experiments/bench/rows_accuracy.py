"""How long it takes to a test error: the fast layer against the notebook's fixed point and the explicit twin."""

from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from torch import nn

from torchimplicit.experiments.bench.accuracy import (
    LOOSE,
    STEPS,
    TERMS,
    Training,
    give,
    make_exact_model,
    make_fast_model,
    train,
    train_segment,
)
from torchimplicit.experiments.bench.epochs import FEATURES, learning_rate, make_batches
from torchimplicit.experiments.bench.notebook import NotebookFixedPoint, make_notebook_model
from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.bench.timing import Weights, paired_ratio
from torchimplicit.experiments.data import Digits, load_digits
from torchimplicit.experiments.recipe import make_model

EPOCHS = 10
SEEDS = (0, 1, 2)
TARGET = 3.1
"""Percent, the mean of the seeds."""
SAMPLE = 30
"""Batches that stand for an epoch of 600 when it is timed."""
QUICK = 20
"""Batches of an epoch that is to be quick."""

Build = Callable[[], nn.Sequential]
SETTINGS = {"solver": f"Picard, {STEPS} steps between checks", "tolerance": LOOSE, "adjoint": f"NeumannSeries({TERMS})"}


def make_twin() -> nn.Sequential:
    """The explicit network, `tanh(W x + x)`, with the same parameters."""
    return make_model("explicit", features=FEATURES)


def make_notebook() -> nn.Sequential:
    """The notebook's network."""
    return make_notebook_model(NotebookFixedPoint(FEATURES), FEATURES)


def to_equal_error(settings: Settings) -> Measurement:
    """Ten epochs of ours against ten of the notebook's; verified if ours end at the target or below.

    The evidence has the exact layer's error too, and that of a schedule: fast while the learning rate is high, exact
    from then on.
    """
    digits = load_digits(settings.data_dir)
    ours = _train_seeds([make_fast_model] * EPOCHS, digits, settings)
    exact = _train_seeds([make_exact_model] * EPOCHS, digits, settings)
    scheduled = _train_seeds([make_fast_model] * 5 + [make_exact_model] * 5, digits, settings)
    # The notebook's loop solves what the exact layer solves: the same weights.
    runs = _time(
        {"ours": (make_fast_model, ours[0].starts), "theirs": (make_notebook, exact[0].starts)}, digits, settings
    )
    error = _mean_errors(ours)[-1]
    trainings = {"ours": ours, "exact": exact, "loose until epoch 5, then exact": scheduled}
    return _measurement(runs, EPOCHS, EPOCHS, error <= TARGET, {"target": TARGET, **_evidence(trainings)})


def to_twin_error(settings: Settings) -> Measurement:
    """As many epochs of ours as come to the error that ten epochs of the explicit twin come to, against those ten."""
    digits = load_digits(settings.data_dir)
    ours = _train_seeds([make_fast_model] * EPOCHS, digits, settings)
    twin = _train_seeds([make_twin] * EPOCHS, digits, settings)
    runs = _time({"ours": (make_fast_model, ours[0].starts), "theirs": (make_twin, twin[0].starts)}, digits, settings)
    target = _mean_errors(twin)[-1]
    epochs = epochs_to(_mean_errors(ours), target)
    all_epochs = _ratio(runs, EPOCHS, EPOCHS)
    evidence = {"target": target, "all_epochs_ratio": all_epochs.median, **_evidence({"ours": ours, "twin": twin})}
    return _measurement(runs, epochs or EPOCHS, EPOCHS, epochs is not None, evidence)


def epochs_to(errors: Sequence[float], target: float) -> int | None:
    """How many epochs it takes until the error is at the target and stays there; None if it does not."""
    epochs = len(errors)
    while epochs and errors[epochs - 1] <= target:
        epochs -= 1
    return epochs + 1 if epochs < len(errors) else None


def _train_seeds(builds: list[Build], digits: Digits, settings: Settings) -> list[Training]:
    seeds, batches = (SEEDS[:1], QUICK) if settings.quick else (SEEDS, None)
    return [train(builds, digits, settings.seed + seed, batches) for seed in seeds]


def _mean_errors(trainings: list[Training]) -> list[float]:
    return [mean(errors) for errors in zip(*(training.errors for training in trainings), strict=True)]


def _time(
    contenders: dict[str, tuple[Build, list[Weights]]], digits: Digits, settings: Settings
) -> list[dict[str, list[float]]]:
    """Seconds per batch of each contender in each epoch, for each run: a sample of every epoch, from its own weights.

    The contenders take turns within each epoch, since how long a solve takes depends on the weights.
    """
    runs = []
    sample = 5 if settings.quick else SAMPLE
    for repeat in range(settings.repeats):
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for epoch in range(EPOCHS):
            batches = make_batches(digits, settings.seed + 100 * repeat + epoch, batches=sample)
            for name in sorted(contenders, reverse=(repeat + epoch) % 2 == 1):
                build, starts = contenders[name]
                taken = train_segment(give(build(), starts[epoch]), batches, learning_rate(epoch))
                seconds[name].append(taken / len(batches))
        runs.append(seconds)
    return runs


def _ratio(runs: list[dict[str, list[float]]], ours: int, theirs: int) -> Any:
    return paired_ratio([sum(run["ours"][:ours]) for run in runs], [sum(run["theirs"][:theirs]) for run in runs])


def _measurement(
    runs: list[dict[str, list[float]]], ours: int, theirs: int, verified: bool, evidence: dict[str, Any]
) -> Measurement:
    """Of the first `ours` epochs against the first `theirs`, each counted as 600 batches."""
    ratio = _ratio(runs, ours, theirs)
    return Measurement(
        value=ratio.median,
        low=ratio.low,
        high=ratio.high,
        runs=len(runs),
        ours=600 * median(sum(run["ours"][:ours]) for run in runs),
        theirs=600 * median(sum(run["theirs"][:theirs]) for run in runs),
        verified=verified,
        evidence={"epochs": {"ours": ours, "theirs": theirs}, "settings": SETTINGS, **evidence},
    )


def _evidence(trainings: dict[str, list[Training]]) -> dict[str, Any]:
    return {
        "test_error": {
            name: {"mean": _mean_errors(runs), "seeds": [training.errors for training in runs]}
            for name, runs in trainings.items()
        }
    }


ROWS = (
    Row(
        "mnist/to-equal-error",
        f"MNIST to at most {TARGET} % test error after 10 epochs, against the notebook's fixed point",
        0.30,
        to_equal_error,
    ),
    Row("mnist/vs-twin", "MNIST to the test error of the explicit twin's 10 epochs, against those", 2.5, to_twin_error),
)
