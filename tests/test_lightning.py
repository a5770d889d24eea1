"""The Lightning callback and the TensorBoard log, with the real things: what they write is read back from the files."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import torchimplicit as ti
from torchimplicit.integrations.tensorboard import log_scalars

pl: Any = pytest.importorskip("lightning.pytorch")
pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from torchimplicit.integrations.lightning import LogSolves  # noqa: E402

QUANTITIES = ("residual", "steps", "failures", "evaluations")
# Lightning's and TensorBoard's own, of this torch and this NumPy.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::torchimplicit")]


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return importlib.import_module("examples.lightning_mnist")


class Watching(LogSolves):
    """Keeps what it logs of each training batch, with the loss of the monitor's own records."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[dict[str, float]] = []

    def _end(self) -> dict[str, float]:
        scalars = super()._end()
        if scalars:
            self.seen.append(scalars)
        return scalars


def _fit(model: Any, folder: Path, callback: Any, train: Any, val: Any = None, **options: Any) -> None:
    logger = pl.loggers.TensorBoardLogger(folder, name="", version="")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(model, train, val)


def _batches(count: int, size: int = 8) -> Any:
    data = torch.utils.data.TensorDataset(torch.rand(count * size, 784), torch.arange(count * size) % 10)
    return torch.utils.data.DataLoader(data, batch_size=size)


def test_callback_logs_every_layer_forward_and_backward(example: ModuleType, tmp_path: Path) -> None:
    callback = Watching()
    _fit(example.Classifier(penalty=0.5), tmp_path, callback, _batches(3), _batches(2))
    curves = _curves(tmp_path)
    training = [s for s in callback.seen if "implicit/layer/adjoint_steps" in s]
    assert len(training) == 3
    for kind in ("", "adjoint_"):
        for quantity in QUANTITIES:
            name = f"implicit/layer/{kind}{quantity}"
            assert [step for step, _ in curves[name]] == [0, 1, 2]
            assert [v for _, v in curves[name]] == pytest.approx([s[name] for s in training], rel=1e-6)
    assert min(v for _, v in curves["implicit/layer/steps"]) >= 3
    assert max(v for _, v in curves["implicit/layer/residual"]) <= 1e-4
    # Validation: no backward pass; sums and the largest over the epoch (the sanity check before it is not logged).
    validation = callback.seen[-2:] if "implicit/layer/adjoint_steps" not in callback.seen[-1] else callback.seen[-5:-3]
    (_, evaluations), *more = curves["val_implicit/layer/evaluations"]
    assert not more
    assert evaluations == sum(s["implicit/layer/evaluations"] for s in validation)
    assert curves["val_implicit/layer/residual"][0][1] == pytest.approx(
        max(s["implicit/layer/residual"] for s in validation)
    )
    assert "val_implicit/layer/adjoint_steps" not in curves


def test_failures_are_counted_in_the_file(example: ModuleType, tmp_path: Path) -> None:
    model = example.Classifier()
    model.layer.max_steps = 1
    _fit(model, tmp_path, LogSolves(prefix="solves/"), _batches(2))
    curves = _curves(tmp_path)
    assert curves["solves/layer/failures"] == [(0, 8.0), (1, 8.0)]
    assert curves["solves/layer/steps"] == [(0, 1.0), (1, 1.0)]


def test_callback_leaves_no_monitor_behind_even_after_an_exception(example: ModuleType, tmp_path: Path) -> None:
    from torchimplicit.diagnostics import _monitor

    model = example.Classifier()
    _fit(model, tmp_path, LogSolves(), _batches(1))
    assert not _monitor._active

    def broken(*_: Any) -> None:
        model.layer(torch.zeros(1, 100))
        raise ZeroDivisionError

    model.training_step = broken
    with pytest.raises(ZeroDivisionError):
        _fit(model, tmp_path, LogSolves(), _batches(1))
    assert not _monitor._active


def test_example_trains(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its command line, on 300 of the digits: the error falls well below guessing, and the curves are there."""
    original = example.loader
    monkeypatch.delenv("TORCHIMPLICIT_DATA", raising=False)

    def few(split: Any, shuffle: bool) -> Any:
        images, labels = split.images[::12], split.labels[::12]
        return original(type(split)(images, labels), shuffle)

    monkeypatch.setattr(example, "loader", few)
    example.main(["--seeds", "0", "--epochs", "6", "--out", str(tmp_path)])
    (folder,) = (path.parent for path in tmp_path.rglob("events.*"))
    curves = _curves(folder)
    assert curves["error"][-1][1] < 70
    assert curves["implicit/layer/steps"][-1][1] > 3
    assert len(curves["val_implicit/layer/failures"]) == 6


def test_log_scalars_writes_the_same_without_lightning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

    model = nn.Sequential(nn.Linear(4, 3), ti.nn.TanhEquilibrium(3))
    expected = []
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            with ti.monitor(model) as log:
                model(torch.randn(5, 4)).sum().backward()
            log_scalars(writer, log, step)
            expected.append(log.scalars())
    curves = _curves(tmp_path)
    assert set(curves) == {f"implicit/1/{kind}{quantity}" for kind in ("", "adjoint_") for quantity in QUANTITIES}
    for name, points in curves.items():
        assert [step for step, _ in points] == [0, 1, 2]
        assert [value for _, value in points] == pytest.approx([scalars[name] for scalars in expected], rel=1e-6)
