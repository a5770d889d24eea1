"""The options of a run and the schedule of its learning rate."""

import pytest

from torchimplicit.experiments.config import TrainConfig, parse_schedule
from torchimplicit.experiments.errors import ExperimentError


@pytest.mark.parametrize(
    "text, steps",
    [
        ("5:0.01", ((5, 0.01),)),
        (" 2:1e-2, 4:0.5", ((2, 0.01), (4, 0.5))),
        ("constant", ()),
        ("Constant ", ()),
    ],
)
def test_schedule_is_read(text: str, steps: tuple[tuple[int, float], ...]) -> None:
    assert parse_schedule(text) == steps


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "cannot read ''"),
        ("5", "cannot read '5'"),
        ("5:fast", "cannot read '5:fast'"),
        ("1.5:0.1", "cannot read '1.5:0.1'"),
        ("5:0.01,", "cannot read ''"),
        ("-1:0.1", "an epoch of at least 0"),
        ("5:0", "a finite rate above 0"),
        ("5:nan", "a finite rate above 0"),
        ("5:inf", "a finite rate above 0"),
        ("5:0.1,5:0.2", "epochs must increase"),
        ("5:0.1,3:0.2", "epochs must increase"),
    ],
)
def test_unreadable_schedule_is_named(text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match="--lr-schedule") as caught:
        parse_schedule(text)
    assert message in str(caught.value)


def test_rate_follows_the_notebook() -> None:
    config = TrainConfig()
    assert [config.learning_rate(epoch) for epoch in range(7)] == [0.1] * 5 + [0.01] * 2


def test_rate_follows_several_steps() -> None:
    config = TrainConfig(lr=1.0, lr_schedule="1:0.5,3:0.25")
    assert [config.learning_rate(epoch) for epoch in range(5)] == [1.0, 0.5, 0.5, 0.25, 0.25]
