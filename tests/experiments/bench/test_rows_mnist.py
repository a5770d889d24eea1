"""The MNIST rows measure what they say: same weights, same tolerance, gradients checked against an independent one."""

import json

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.experiments.bench import rows_accuracy, rows_mnist, rows_warm
from torchimplicit.experiments.bench.accuracy import make_exact_model, make_fast_model, train
from torchimplicit.experiments.bench.epochs import initial_model, make_batches, trained
from torchimplicit.experiments.bench.exactness import exact_gradient, gradient_errors
from torchimplicit.experiments.bench.row import Measurement, Row, Settings
from torchimplicit.experiments.bench.timing import Tally
from torchimplicit.experiments.data import load_digits

QUICK = Settings(repeats=1, quick=True)
ROWS = {row.name: row for rows in (rows_mnist, rows_accuracy, rows_warm) for row in rows.ROWS}


@pytest.fixture(autouse=True)
def _embedded_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHIMPLICIT_DATA", raising=False)


def _measured(row: Row) -> Measurement:
    found = row.measure(QUICK)
    assert found.low <= found.value <= found.high
    json.dumps(found.evidence)
    return found


def test_bars_are_those_of_the_claims() -> None:
    bars = {name: row.bar for name, row in ROWS.items()}
    assert bars == {
        "mnist/picard": 0.5,
        "mnist/picard-trained": None,
        "mnist/newton": 0.05,
        "mnist/to-equal-error": 0.3,
        "mnist/vs-twin": 2.5,
        "warm-start": 0.2,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist/picard", "mnist/newton"])
def test_an_epoch_at_equal_tolerance(name: str) -> None:
    found = _measured(ROWS[name])
    assert found.verified
    assert found.ours is not None and found.ours > 0
    assert max(found.evidence["worst_residual"].values()) <= 1e-4
    assert found.evidence["gradient_error"]["theirs"]["batches"] == 10


@pytest.mark.slow
def test_time_to_an_equal_error() -> None:
    found = _measured(ROWS["mnist/vs-twin"])
    errors = found.evidence["test_error"]
    assert len(errors["ours"]["mean"]) == len(errors["twin"]["mean"]) == 10
    assert found.verified == (found.evidence["test_error"]["ours"]["mean"][-1] <= found.evidence["target"])


@pytest.mark.slow
def test_the_warm_start_row_verifies_every_residual() -> None:
    found = _measured(ROWS["warm-start"])
    assert found.verified
    assert found.value < 0.2
    assert found.evidence["trained"]["previous"]["residual"] <= 1e-4


@pytest.mark.parametrize(
    "errors, target, epochs",
    [([4.0, 3.0, 2.0], 3.0, 2), ([4.0, 2.0, 3.5, 3.0], 3.0, 4), ([1.0, 1.0], 3.0, 1), ([4.0, 3.5], 3.0, None)],
)
def test_an_error_is_reached_where_it_stays(errors: list[float], target: float, epochs: int | None) -> None:
    assert rows_accuracy.epochs_to(errors, target) == epochs


def test_a_wrong_gradient_is_noticed() -> None:
    digits = load_digits()
    weights = trained(initial_model(0), [])
    batches = make_batches(digits, 0, batches=2)
    (good, also_good) = gradient_errors(make_exact_model, weights, batches)
    assert good is not None and good < 1e-5
    assert also_good is not None and also_good < 1e-5

    def make_rough() -> nn.Sequential:
        model = make_exact_model()
        model[2].adjoint = ti.JacobianFree()
        return model

    rough = gradient_errors(make_rough, weights, batches)
    assert all(error is not None and error > 0.01 for error in rough)


def test_the_reference_gradient_is_that_of_finite_differences() -> None:
    digits = load_digits()
    weights = trained(initial_model(0), [])
    images, labels = make_batches(digits, 0, batches=1, batch_size=5)[0]
    gradient = exact_gradient(weights, (images, labels))
    assert gradient is not None
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    losses = []
    for step in (-1e-5, 1e-5):
        model = make_exact_model().double()
        model[2].solver = ti.Newton(rtol=1e-13)
        with torch.no_grad():
            for parameter, weight, d in zip(model.parameters(), weights, direction, strict=True):
                parameter.copy_(weight.double() + step * d)
            losses.append(float(nn.functional.cross_entropy(model(images.double()), labels)))
    slope = float(sum((g * d.flatten()).sum() for g, d in zip(_split(gradient, weights), direction, strict=True)))
    assert (losses[1] - losses[0]) / 2e-5 == pytest.approx(slope, rel=1e-6)


def _split(flat: torch.Tensor, like: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return flat.split([t.numel() for t in like])


def test_a_training_passes_its_weights_from_model_to_model() -> None:
    digits = load_digits()
    both = train([make_fast_model, make_exact_model], digits, seed=0, batches=3)
    alone = train([make_fast_model], digits, seed=0, batches=3)
    assert len(both.errors) == len(both.starts) == 2
    assert both.errors[0] == alone.errors[0]
    assert not torch.equal(both.starts[0][0], both.starts[1][0])


def test_pieces_of_an_epoch_add_up() -> None:
    whole = Tally(1.0, 2.0, [3], [0.1], [4], [5], 6)
    whole.add(Tally(1.0, 1.0, [7], [0.2], [8], [9], 1))
    assert whole == Tally(2.0, 3.0, [3, 7], [0.1, 0.2], [4, 8], [5, 9], 7)
